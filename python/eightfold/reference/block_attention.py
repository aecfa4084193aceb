"""Attention of a block of queries over a KV cache, in plain torch (Fast-dLLM, arXiv 2505.22618, section 3.2)."""

import torch
from torch import Tensor

from eightfold.reference.attention import paged_attention, paged_store_


def block_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    at: Tensor,
    lengths: Tensor,
    scale: float,
) -> Tensor:
    """softmax(scale q k^T) v of the rows q [batch, rows, heads, dim] over the first lengths[b] keys of caches [batch,
    kv_heads, room, dim], after k and v [batch, rows, kv_heads, dim], where given, have been written to them from key
    at[b] on. Of a sequence of length 0 nothing is written, and the result is 0.
    """
    batch, rows, room = *q.shape[:2], k_cache.shape[2]
    used = lengths > 0
    index = torch.arange(batch, device=q.device)
    if k is not None:
        places = (index * room + at)[:, None] + torch.arange(rows, device=q.device)
        slots = torch.where(used[:, None], places, -1).flatten()
        paged_store_(k.flatten(0, 1), v.flatten(0, 1), k_cache, v_cache, k_scales, v_scales, slots)
    out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    starts = torch.arange(int(used.sum()) + 1, device=q.device, dtype=torch.int32) * rows
    caches = k_cache, v_cache, k_scales, v_scales
    whole = paged_attention(
        q[used].flatten(0, 1), *caches, index[used, None], starts, lengths[used], rows, scale, causal=False
    )
    out[used] = whole.view(-1, *q.shape[1:])
    return out
