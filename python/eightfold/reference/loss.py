"""The cross-entropy of logits and its gradient in plain torch."""

import torch
from torch import Tensor

IGNORED_LABEL = -100


def cross_entropy(
    logits: Tensor,
    labels: Tensor,
    training: bool = False,
    grad_dtype: torch.dtype = torch.bfloat16,
    temperatures: Tensor | None = None,
    grad_output: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss [rows], (softmax - onehot) / T [rows, classes], or size 0 unless ``training``) of logits / T, T being
    `temperatures` (1 where that is 0): 0 where the label is -100, NaN where it is another value outside
    [0, classes). The gradient is multiplied by `grad_output` [rows] before it is rounded."""
    cold = 1.0
    if temperatures is not None:
        cold = torch.where(temperatures > 0, temperatures, 1.0).reciprocal()[:, None]
        logits = logits * cold
    counts = labels != IGNORED_LABEL
    known = (labels >= 0) & (labels < logits.shape[1])
    label = torch.where(known, labels, 0)[:, None]
    loss = (logits.logsumexp(dim=1) - logits.gather(1, label)[:, 0]).masked_fill(~known, torch.nan)
    loss = loss.masked_fill(~counts, 0.0)
    if not training:
        return loss, logits.new_empty((0, 0), dtype=grad_dtype)
    grad = logits.softmax(dim=1)
    grad = grad.scatter_add(1, label, grad.new_full(label.shape, -1.0)).masked_fill(~known[:, None], torch.nan) * cold
    grad = grad.masked_fill(~counts[:, None], 0.0)
    if grad_output is not None:
        grad = grad * grad_output[:, None]
    return loss, grad.to(grad_dtype)
