"""Plain torch in the place of ops that are being written."""

from __future__ import annotations

import torch

from eightfold.ops import QuantizedTensor
from eightfold.reference.attention import _gather, _heads_first
from eightfold.reference.sampling import gumbel


def block_attention(q, k, v, k_cache, v_cache, at, lengths, *, k_scales=None, v_scales=None, scale=None):
    rows = q.shape[1]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out = torch.empty_like(q)
    for b, length in enumerate(lengths.tolist()):
        if k is not None:
            begin = int(at[b])
            k_cache[b, :, begin : begin + rows] = k[b].transpose(0, 1)
            v_cache[b, :, begin : begin + rows] = v[b].transpose(0, 1)
        out[b] = _one(q[b], k_cache, v_cache, k_scales, v_scales, torch.tensor([b]), length, scale)
    return out


def _one(q, k_pages, v_pages, k_scales, v_scales, numbers, length, scale):
    heads = q.shape[1]
    k, v = (_heads_first(_gather(p, s, numbers, length), heads) for p, s in ((k_pages, k_scales), (v_pages, v_scales)))
    z = (_heads_first(q, heads) @ k.mT) * scale
    return (z.softmax(-1) @ v).transpose(0, 1).to(q.dtype)


def lm_head_confidence(hidden, weight, *, active=None, forbidden=None, temperatures=None, seeds=None, positions=None):
    if isinstance(hidden, QuantizedTensor):
        hidden, weight = hidden.dequantize(torch.float32), weight.dequantize(torch.float32)
    logits = hidden.float() @ weight.float().T
    if forbidden is not None:
        logits[:, forbidden] = -torch.inf
    ids = logits.argmax(dim=1)
    if temperatures is not None:
        noise = gumbel(seeds, positions, logits.shape[1])
        scaled = ((logits - logits.amax(1, keepdim=True)) / temperatures[:, None]).double() + noise
        ids = torch.where(temperatures > 0, scaled.argmax(dim=1), ids)
    confidence = logits.softmax(dim=1).gather(1, ids[:, None])[:, 0]
    if active is not None:
        ids, confidence = ids.masked_fill(~active, -1), confidence.masked_fill(~active, -torch.inf)
    return ids, confidence


def uncover_(
    tokens,
    at,
    ids,
    confidence,
    left,
    *,
    mask_id,
    threshold=None,
    factor=None,
    counts=None,
    eos_ids=None,
    ended=None,
    compat=False,
):
    rows = ids.shape[1]
    for b, begin in enumerate(at.tolist()):
        block = tokens[b, begin : begin + rows]
        masked = block == mask_id
        if not masked.any():
            continue
        places = masked.nonzero()[:, 0]
        order = places[confidence[b][places].sort(descending=True, stable=True).indices]
        values = confidence[b][order]
        n = torch.arange(1, len(order) + 1)
        if threshold is not None:
            good = values >= threshold
        elif factor is not None:
            good = values >= 1 - factor / (n + 1)
        else:
            good = n <= counts[b]
        good[0] = True
        run = int(good.long().cumprod(0).sum())
        if compat and factor is not None and run == len(order) - 1:
            run += 1
        block[order[:run]] = ids[b][order[:run]]
        left[b] = int((block == mask_id).sum())
        if eos_ids is not None:
            masks = torch.cumsum(block == mask_id, 0)
            ended[b] |= int((torch.isin(block, eos_ids) & (block != mask_id) & (masks == 0)).any())
