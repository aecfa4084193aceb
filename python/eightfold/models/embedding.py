"""The embedding lookup, with a gradient that reaches `.grad` as the rows of the tokens at hand."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from eightfold.nn._accumulation import kept, sums_so_far


class _Embedding(torch.autograd.Function):
    """torch's gradient, bit for bit. Where it is added to a sum, it is made for the distinct tokens alone: the whole
    one, a row for each of the vocabulary, would be cleared, added and dropped for a few thousand rows."""

    @staticmethod
    def forward(ctx, ids, weight):
        ctx.save_for_backward(ids)
        ctx.rows = weight.shape[0]
        ctx.kept = kept(True, weight)
        return F.embedding(ids, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        (ids,) = ctx.saved_tensors
        ids, dy = ids.flatten().long(), dy.flatten(0, -2)
        (total,) = sums_so_far(ctx)
        if total is None or not 0 < ids.numel() < ctx.rows:
            return None, _rows_gradient(dy, ids, ctx.rows)
        # All sizes are known to the host: as many places as tokens, those left over for rows that get a zero each.
        ordered, order = ids.sort(stable=True)
        place = F.pad((ordered[1:] != ordered[:-1]).cumsum(0), (1, 0))
        places = torch.empty_like(ids).scatter_(0, order, place)
        rows = torch.arange(ids.numel(), device=ids.device).scatter_(0, place, ordered)
        # A row gets one sum, and zeros: the order of the additions changes no bit.
        total.index_add_(0, rows, _rows_gradient(dy, places, ids.numel()))
        return None, None


def _rows_gradient(dy: torch.Tensor, ids: torch.Tensor, rows: int) -> torch.Tensor:
    return torch.ops.aten.embedding_dense_backward(dy, ids, rows, -1, False)


def embedding(ids: torch.Tensor, weight: torch.Tensor, add_to_grad: bool = False) -> torch.Tensor:
    """weight[ids]; with ``add_to_grad``, its gradient is added to `.grad` as `nn.functional` says of that option."""
    if add_to_grad and torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling():
        return _Embedding.apply(ids, weight)
    return F.embedding(ids, weight)
