"""The cross-entropy of logits and its gradient in plain torch."""

import torch
from torch import Tensor

IGNORED_LABEL = -100


def cross_entropy(
    logits: Tensor, labels: Tensor, training: bool = False, grad_dtype: torch.dtype = torch.bfloat16
) -> tuple[Tensor, Tensor]:
    """(loss [rows], softmax - onehot [rows, classes], or size 0 unless ``training``): 0 where the label is -100, NaN
    where it is another value outside [0, classes)."""
    counts = labels != IGNORED_LABEL
    known = (labels >= 0) & (labels < logits.shape[1])
    label = torch.where(known, labels, 0)[:, None]
    loss = (logits.logsumexp(dim=1) - logits.gather(1, label)[:, 0]).masked_fill(~known, torch.nan)
    loss = loss.masked_fill(~counts, 0.0)
    if not training:
        return loss, logits.new_empty((0, 0), dtype=grad_dtype)
    grad = logits.softmax(dim=1)
    grad = grad.scatter_add(1, label, grad.new_full(label.shape, -1.0)).masked_fill(~known[:, None], torch.nan)
    return loss, grad.masked_fill(~counts[:, None], 0.0).to(grad_dtype)
