"""RMS normalisation that keeps its input for the backward pass in FP8."""

import torch
from torch import Tensor, nn

from eightfold.nn import functional


class FP8RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension [..., hidden]; the output is not quantised.

    The parameter is ``weight`` [hidden], as in `torch.nn.RMSNorm` and the Hugging Face models. (COAT, section 4.)
    """

    def __init__(
        self,
        hidden: int,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden, self.eps = hidden, eps
        self.weight = nn.Parameter(torch.ones(hidden, device=device, dtype=dtype))

    @classmethod
    def from_norm(cls, norm: nn.Module) -> "FP8RMSNorm":
        """An FP8RMSNorm that shares the weight of ``norm``, which has ``eps`` or ``variance_epsilon``."""
        layer = cls(norm.weight.shape[0], norm_eps(norm), "meta")
        layer.weight = norm.weight
        return layer.train(norm.training)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return functional.fp8_rms_norm(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{self.hidden}, eps={self.eps}"


def norm_eps(norm: nn.Module) -> float | None:
    return getattr(norm, "eps", getattr(norm, "variance_epsilon", None))
