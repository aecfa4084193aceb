"""Attention in plain torch: the maths, not the order of operations that kernels keep (csrc/attention/attention.h).

Sources: FlashAttention-2 (arXiv 2307.08691), PagedAttention (arXiv 2309.06180). Inputs of float64 are computed in
float64, all others in float32; the result is rounded once.
"""

from itertools import pairwise

import torch
from torch import Tensor

from eightfold.reference.quant import group_scales, quantize, to_e4m3


def _heads_first(x: Tensor, heads: int) -> Tensor:
    """[tokens, heads of x, dim] as [heads, tokens, dim], each head as often as query heads share it."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32)).transpose(0, 1)
    return wide.repeat_interleave(heads // x.shape[1], dim=0)


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, block: int) -> Tensor:
    """[heads, rows, keys]; the rows are the last of the sequence. Causal: each sees its block of ``block`` tokens,
    counted from the sequence's first, and those before."""
    z = (_heads_first(q, q.shape[1]) @ _heads_first(k, q.shape[1]).mT) * scale
    if not causal:
        return z
    rows, keys = z.shape[1:]
    own = torch.arange(keys, device=z.device) // block
    return z.masked_fill(own > own[keys - rows :, None], -torch.inf)


def _ranges(starts: Tensor) -> list[slice]:
    return [slice(*bounds) for bounds in pairwise(starts.tolist())]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    causal: bool = True,
    block: int = 1,
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v of packed sequences: rows starts[s] to starts[s + 1] of q [tokens, heads, dim] and k, v
    [tokens, kv_heads, dim]. ``longest`` bounds the sequences' lengths and changes nothing.

    Returns out, as q, and the log-sum-exp of each row's scores [heads, tokens].
    """
    tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(heads, tokens, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for rows in _ranges(starts):
        z = _scores(q[rows], k[rows], scale, causal, block)
        out[rows] = (z.softmax(-1) @ _heads_first(v[rows], heads)).transpose(0, 1).to(q.dtype)
        lse[:, rows] = z.logsumexp(-1)
    return out, lse


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor,
    longest: int,
    scale: float,
    causal: bool = True,
    block: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``attention`` from its own results: p = exp(scores - lse) and delta, a row's sum of dout * out."""
    heads, kv_heads = q.shape[1], k.shape[1]
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))

    def shared(x: Tensor) -> Tensor:  # [heads, keys, dim]: query heads that share a KV head are added up
        return x.unflatten(0, (kv_heads, heads // kv_heads)).sum(1).transpose(0, 1)

    for rows in _ranges(starts):
        queries, keys, values, grad, result = (_heads_first(x[rows], heads) for x in (q, k, v, dout, out))
        p = (_scores(q[rows], k[rows], scale, causal, block) - lse[:, rows, None]).exp()
        ds = p * (grad @ values.mT - (grad * result).sum(-1, keepdim=True)) * scale
        dq[rows] = (ds @ keys).transpose(0, 1).to(q.dtype)
        dk[rows] = shared(ds.mT @ queries).to(k.dtype)
        dv[rows] = shared(p.mT @ grad).to(v.dtype)
    return dq, dk, dv


def _gather(pages: Tensor, scales: Tensor | None, numbers: Tensor, length: int) -> Tensor:
    """The first ``length`` keys or values [length, kv_heads, dim] of the pages of these numbers."""
    count = -(-length // pages.shape[2])
    chosen = pages[numbers[:count].long()]
    if scales is not None:
        chosen = (chosen.float() * scales[numbers[:count].long()][..., None]).to(torch.bfloat16)
    return chosen.transpose(1, 2).flatten(0, 1)[:length]


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    pages: Tensor,
    starts: Tensor,
    lengths: Tensor,
    longest: int,
    scale: float,
    causal: bool = True,
    block: int = 1,
    settled: bool = False,
) -> Tensor:
    """Attention of the last rows of sequences, starts[s] to starts[s + 1] of q [tokens, heads, dim], over the
    lengths[s] keys, theirs included, that lie in pages[s]: [page, kv_heads, page_size, dim].

    Pages of E4M3 codes hold bfloat16(code * scale), scales [page, kv_heads, page_size]. settled decides no number.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for rows, numbers, length in zip(_ranges(starts), pages, lengths.tolist(), strict=True):
        if rows.start == rows.stop:
            continue
        k = _gather(k_pages, k_scales, numbers, length)
        v = _heads_first(_gather(v_pages, v_scales, numbers, length), q.shape[1])
        z = _scores(q[rows], k, scale, causal, block)
        out[rows] = (z.softmax(-1) @ v).transpose(0, 1).to(q.dtype)
    return out


def paged_attention_quantize(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    pages: Tensor,
    starts: Tensor,
    lengths: Tensor,
    longest: int,
    scale: float,
    causal: bool = True,
    block: int = 1,
    settled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Row codes [tokens, heads * dim] in groups (1, 128) of ``paged_attention``, dim being 128, and their scales."""
    cache = k_pages, v_pages, k_scales, v_scales, pages, starts, lengths
    return quantize(paged_attention(q, *cache, longest, scale, causal, block).flatten(1), [1, 128])


def paged_next_rows_(
    positions: Tensor, tokens: Tensor, active: Tensor, pages: Tensor, page_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The newest tokens (0 for one below 0), their positions, their slots (-1 in a page below 0) and the numbers of
    keys up to them (0 where not active); then positions go on by one where active."""
    at = positions.clone()
    own = pages.gather(1, at[:, None] // page_size)[:, 0].long()
    slots = torch.where(own < 0, -1, own * page_size + at % page_size)
    positions += active
    return tokens.clamp(min=0), at, slots, ((at + 1) * active).int()


def paged_store_(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    k_scales: Tensor | None,
    v_scales: Tensor | None,
    slots: Tensor,
) -> None:
    """Writes row i of k and v [tokens, kv_heads, dim] to place slots[i] % page_size of page slots[i] // page_size;
    nowhere where slots[i] is below 0. Into E4M3 pages with one scale for a row of a head."""
    kept = slots >= 0
    page, place = slots[kept] // k_pages.shape[2], slots[kept] % k_pages.shape[2]
    for rows, pages, scales in ((k[kept], k_pages, k_scales), (v[kept], v_pages, v_scales)):
        if scales is None:
            pages[page, :, place] = rows
            continue
        made = group_scales(rows.float().abs().amax(-1))
        scales[page, :, place] = made
        pages.view(torch.uint8)[page, :, place] = to_e4m3(rows.float() / made[..., None]).view(torch.uint8)
