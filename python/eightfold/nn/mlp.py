"""The gated MLP of Llama-like models as one FP8 function."""

import torch
from torch import Tensor, nn

from eightfold.nn import functional
from eightfold.nn.linear import FP8Linear


class FP8SwiGLU(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)) without biases, computed by `functional.fp8_swiglu_mlp`.

    The three projections are FP8Linear submodules under their Hugging Face names, so state_dict keys are the same.
    """

    def __init__(
        self,
        hidden: int,
        intermediate: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.gate_proj = FP8Linear(hidden, intermediate, False, device, dtype)
        self.up_proj = FP8Linear(hidden, intermediate, False, device, dtype)
        self.down_proj = FP8Linear(intermediate, hidden, False, device, dtype)

    @classmethod
    def from_mlp(cls, mlp: nn.Module) -> "FP8SwiGLU":
        """An FP8SwiGLU that shares the parameters of ``mlp``'s gate_proj, up_proj and down_proj (without biases)."""
        layer = cls(mlp.gate_proj.in_features, mlp.gate_proj.out_features, "meta")
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(layer, name, FP8Linear.from_linear(getattr(mlp, name)))
        return layer.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        layers = self.gate_proj, self.up_proj, self.down_proj
        options = {
            "caches": [layer.cache for layer in layers],
            "add_to_grad": all(layer.add_to_grad for layer in layers),
        }
        return functional.fp8_swiglu_mlp(x, *(layer.weight for layer in layers), **options)
