"""The cross-entropy of logits with its gradient from one call: a loss that is computed in chunks keeps no logits."""

import torch
from torch import Tensor

from eightfold.ops import _library  # noqa: F401  (loads torch.ops.eightfold)

IGNORED_LABEL = -100


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    *,
    training: bool = False,
    grad_dtype: torch.dtype = torch.bfloat16,
    temperatures: Tensor | None = None,
    grad_output: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(log sum exp(x) - x[label], (softmax(x) - onehot(label)) / T * grad_output) of each row, in float32;
    x = logits / T.

    Args:
        logits: float32 [rows, classes], last dimension contiguous, any row stride.
        labels: int64 [rows]; -100 gives loss 0 and gradient 0 * grad_output. Another label outside [0, classes) gives
            NaN.
        training: whether the gradient is wanted (else None).
        grad_dtype: of the gradient, torch.bfloat16 or torch.float32; rounded once.
        temperatures: float32 [rows], T of each row (default 1); 0, at which ``sample`` takes the most likely token,
            counts as 1.
        grad_output: float32 [rows], the gradient that reaches each row's loss (default 1). The gradient is multiplied
            by it in float32, before it is rounded.

    A row's loss depends on that row alone, to the last bit. Raises RuntimeError for other dtypes, shapes or layouts.
    """
    loss, grad = torch.ops.eightfold.cross_entropy(logits, labels, training, grad_dtype, temperatures, grad_output)
    return loss, grad if training else None


@torch.library.register_fake("eightfold::cross_entropy")
def _(logits, labels, training=False, grad_dtype=torch.bfloat16, temperatures=None, grad_output=None):
    grad = logits.new_empty(logits.shape if training else (0, 0), dtype=grad_dtype)
    return logits.new_empty(logits.shape[0]), grad
