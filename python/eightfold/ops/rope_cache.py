"""Between the projection to queries, keys and values and attention: head norms, rotation, the cache, its rounding."""

import torch
from torch import Tensor

from eightfold.ops import _library  # noqa: F401  (loads torch.ops.eightfold)

_ops = torch.ops.eightfold


def rope_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> Tensor:
    """Rotates queries and keys, each head normalised first where weights are given, and writes keys and values into
    pages, in place. One kernel; the bits are those of ``rms_norm``, ``rotary`` and ``paged_store_`` after each other.

    Args:
        q: bfloat16, or float32 on the CPU, [tokens, heads, dim], dim contiguous, any other strides: a slice of the
            projection's output will do. dim: 64, 96 or 128; on the CPU any even number.
        k, v: [tokens, kv_heads, dim] likewise.
        cos, sin: float32 [tokens, dim / 2], contiguous: the angles of each row.
        k_pages, v_pages, slots, k_scales, v_scales: as for ``paged_store_``. A row with a slot below 0 is written
            nowhere; its query is still made.
        q_weight, k_weight: bfloat16 or float32 [dim], both of one dtype, or None, both: weights of the norm of a head
            of q and of k (Qwen3). On CUDA tables and weights begin at a multiple of 16 bytes.
        eps: of that norm.

    Returns q rotated, contiguous; it has no gradient. Raises RuntimeError for other dtypes, shapes, devices or layouts
    and, on the CPU, for slots out of range.
    """
    weights = q_weight, k_weight, eps
    return _ops.rope_cache_write(q, k, v, cos, sin, k_pages, v_pages, k_scales, v_scales, slots, *weights)


@torch.library.register_fake("eightfold::rope_cache_write")
def _(q, *args):
    return q.new_empty(q.shape)


def kv_round(x: Tensor) -> Tensor:
    """Keys or values as a cache of E4M3 pages gives them back: each row of a head times its scale, amax / 448, with the
    codes of ``paged_store_``. Attention over packed sequences of them has the bits of ``paged_attention`` over pages.

    Args:
        x: bfloat16, or float32 on the CPU, [tokens, heads, dim], dim contiguous, any other strides; on CUDA dim is 64,
            96 or 128.

    Returns a contiguous tensor of x's shape and dtype. Its gradient is passed on as it is (a straight-through
    estimate). Raises RuntimeError for other dtypes, shapes or layouts.
    """
    return _KvRound.apply(x)


class _KvRound(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return _ops.kv_round(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


@torch.library.register_fake("eightfold::kv_round")
def _(x):
    return x.new_empty(x.shape)
