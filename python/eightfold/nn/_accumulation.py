"""Gradients added to `.grad` by whatever makes them, so that autograd has nothing left to add: over several
micro-batches a product reads the sum so far beside its own work, instead of a pass over three matrices after it.
"""

import torch
from torch import Tensor, nn

DTYPES = (torch.bfloat16, torch.float32)


def kept(asked: bool, *weights: Tensor) -> tuple[Tensor | None, ...]:
    """What an autograd Function's context keeps as ``kept`` for ``sums_so_far``: its weights, if that is asked for; a
    saved tensor may come back as another one of the same memory, as in a checkpointed layer. None while compiling."""
    return weights if asked and not torch.compiler.is_compiling() else (None,) * len(weights)


def sums_so_far(ctx) -> list[Tensor | None]:
    """Of each of ``ctx.kept`` the `.grad` that the backward pass under way would have autograd add its gradient to,
    where adding it here is the same to everyone: a plain contiguous tensor, no hooks, and the pass is one that
    accumulates (`backward`, not `torch.autograd.grad`). Else None."""
    if ctx.kept[0] is None:
        return [None] * len(ctx.kept)
    nodes = (node for node, _ in ctx.next_functions if isinstance(node, torch._C._functions.AccumulateGrad))
    node_of = {id(node.variable): node for node in nodes}  # of leaves
    return [_sum_so_far(weight, node_of.get(id(weight))) for weight in ctx.kept]


def _sum_so_far(weight: Tensor, node) -> Tensor | None:
    if node is None or weight.grad is None:
        return None
    total = weight.grad
    plain = type(weight) in (Tensor, nn.Parameter) and type(total) is Tensor and total.layout == torch.strided
    if not plain or total.requires_grad or weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return None
    if total.dtype != weight.dtype or total.dtype not in DTYPES or total.device != weight.device:
        return None
    if not total.is_contiguous() or total.data_ptr() % 16:
        return None
    try:
        return total if torch._C._will_engine_execute_node(node) else None
    except RuntimeError:  # of torch.autograd.grad, whose caller gets the gradient
        return None


def joined(totals: list[Tensor | None]) -> Tensor | None:
    """Matrices that lie one below the other in one storage, as the parts of a product do, as one; else None."""
    if any(total is None for total in totals):
        return None
    first, end = totals[0], totals[0].data_ptr()
    for total in totals:
        if total.data_ptr() != end or total.untyped_storage().data_ptr() != first.untyped_storage().data_ptr():
            return None
        end += total.numel() * total.element_size()
    rows = sum(total.shape[0] for total in totals)
    return first.as_strided((rows, first.shape[1]), first.stride())
