"""Attention of a block of queries over all keys of a cache that its own are written to: a step of a diffusion language
model (Fast-dLLM, arXiv 2505.22618, section 3.2)."""

import torch
from torch import Tensor

from eightfold.ops import _library  # noqa: F401  (loads torch.ops.eightfold)

_ops = torch.ops.eightfold


def block_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    k_cache: Tensor,
    v_cache: Tensor,
    at: Tensor,
    lengths: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """softmax(scale q k^T) v of the rows of a block over all keys of their sequence, those behind it too; the block's
    own keys and values are written to the cache in the same call, in place: replaced (DualCache), or appended (prefix
    cache, block-causal models). The bits are those of ``paged_store_`` first and this without k and v then; those of a
    sequence do not depend on the others in the batch, nor on the cache's room.

    Args:
        q: bfloat16, or float32 on the CPU, [batch, rows, heads, dim], rotated already; 1 to 64 rows. dim contiguous,
            any other strides, copied where batch and rows make no one dimension. dim: 64, 96 or 128; on the CPU any
            multiple of 8 from 16 to 256.
        k, v: [batch, rows, kv_heads, dim] likewise, k rotated; or both None, where the cache holds them already.
        k_cache, v_cache: [batch, kv_heads, room, dim], contiguous, room a multiple of 16, in q's dtype or
            float8_e4m3fn. What lies beyond a sequence's length is not read.
        at: int32 [batch], contiguous: the key that a sequence's first row is.
        lengths: int32 [batch], contiguous: keys of a sequence, at least at + rows, at most the room. 0: nothing is read
            or written for this sequence, and its rows of the result are 0.
        k_scales, v_scales: float32 [batch, kv_heads, room], contiguous, with float8_e4m3fn caches alone: a key is
            bfloat16(code * scale); k and v are quantised with one scale for a row of a head, amax / 448.
        scale: of the scores, more than 0; default dim ** -0.5.

    Returns a contiguous tensor of q's shape and dtype; it has no gradient. at and lengths are read where the kernel
    runs: one CUDA graph serves all blocks. Raises RuntimeError for other dtypes, shapes, devices or layouts and, on the
    CPU, for places out of range; on CUDA nothing outside of the cache is read or written for those.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.ndim == 4:
        q, k, v = (x if x is None or x.ndim != 4 else x.flatten(0, 1).view(x.shape) for x in (q, k, v))
    return _ops.block_attention(q, k, v, k_cache, v_cache, k_scales, v_scales, at, lengths, scale)


@torch.library.register_fake("eightfold::block_attention")
def _(q, *args):
    return q.new_empty(q.shape)
