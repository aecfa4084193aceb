"""A linear layer whose three products run in FP8."""

import torch
from torch import Tensor, nn

from eightfold.nn import functional
from eightfold.nn._weight_cache import WeightCache


class FP8Linear(nn.Linear):
    """`torch.nn.Linear` computing `functional.fp8_linear`: same parameters, same state_dict keys.

    ``in_features`` and ``out_features`` are multiples of 16 (ValueError otherwise). ``save`` is fp8_linear's option;
    ``cache_weight`` keeps the weight's FP8 codes between calls, one byte an element, for as long as it does not change:
    for generation, and for many backward passes per optimizer step. ``add_to_grad`` is fp8_linear's option, off until
    it is set (``add_to_grads`` sets it in a whole model).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        save: str = "columns",
        cache_weight: bool = False,
    ) -> None:
        check_sizes(in_features, out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.save, self.cache_weight, self._cache = save, cache_weight, WeightCache()
        self.add_to_grad = False

    @classmethod
    def from_linear(cls, linear: nn.Linear, *, save: str = "columns", cache_weight: bool = False) -> "FP8Linear":
        """An FP8Linear that shares the parameters of ``linear``, its device, dtypes and training mode."""
        layer = cls(linear.in_features, linear.out_features, False, "meta", save=save, cache_weight=cache_weight)
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    @property
    def cache(self) -> WeightCache | None:
        return self._cache if self.cache_weight else None

    def forward(self, x: Tensor) -> Tensor:
        options = {"cache": self.cache, "add_to_grad": self.add_to_grad}
        return functional.fp8_linear(x, self.weight, self.bias, self.save, **options)

    def extra_repr(self) -> str:
        options = "" if self.save == "columns" else f", save={self.save!r}"
        return super().extra_repr() + options + (", cache_weight=True" if self.cache_weight else "")


def check_sizes(in_features: int, out_features: int) -> None:
    if in_features % 16 or out_features % 16 or in_features <= 0 or out_features <= 0:
        raise ValueError(
            "FP8Linear: in_features and out_features must be positive multiples of 16, "
            f"got {in_features} and {out_features}"
        )


def add_to_grads(module: nn.Module, enabled: bool = True) -> nn.Module:
    """Turns ``add_to_grad`` on or off in every FP8Linear inside ``module``: for training on several micro-batches a
    step, whose weight gradients are then added up inside the products that make them (`functional`)."""
    for layer in module.modules():
        if isinstance(layer, FP8Linear):
            layer.add_to_grad = enabled
    return module


def cache_weights(module: nn.Module, enabled: bool = True) -> nn.Module:
    """Turns ``cache_weight`` on or off in every FP8Linear inside ``module``, and empties the caches."""
    for layer in module.modules():
        if isinstance(layer, FP8Linear):
            layer.cache_weight = enabled
            layer._cache.clear()
    return module
