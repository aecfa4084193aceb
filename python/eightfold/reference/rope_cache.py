"""What lies between the projection to q, k and v and attention over pages, in plain torch."""

import torch
from torch import Tensor

from eightfold.reference.attention import paged_store_
from eightfold.reference.norm import rms_norm
from eightfold.reference.quant import group_scales, to_e4m3
from eightfold.reference.rotary import rotary


def rope_cache_write(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    slots: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> Tensor:
    """``rms_norm`` of every head of q [tokens, heads, dim] and k [tokens, kv_heads, dim] where weights [dim] are given,
    ``rotary`` of both by the angles of cos and sin [tokens, dim / 2], and ``paged_store_`` of k and v.

    Returns what q became.
    """
    tables = cos[None, :, None], sin[None, :, None]

    def turned(x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is not None:
            x = rms_norm(x.flatten(0, 1), weight, eps, False)[0].view(x.shape)
        return rotary(x[None], *tables)[0]

    paged_store_(turned(k, k_weight), v, k_pages, v_pages, k_scales, v_scales, slots)
    return turned(q, q_weight)


def kv_round(x: Tensor) -> Tensor:
    """Keys or values [tokens, heads, dim] as E4M3 pages give them back: bfloat16(code * scale), a scale a row."""
    scales = group_scales(x.float().abs().amax(-1))[..., None]
    return (to_e4m3(x.float() / scales).float() * scales).to(torch.bfloat16).to(x.dtype)
