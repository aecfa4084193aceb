"""The head's token and its probability, and what a masked diffusion model's step uncovers, in plain torch."""

import torch
from torch import Tensor

from eightfold.reference.gemm import fp8_gemm, gemm
from eightfold.reference.sampling import gumbel

CHUNK = 1 << 13  # columns of logits that exist at once; a multiple of 128
LEAST_TEMPERATURE = 1e-30  # below it nothing is drawn


def lm_head_confidence(
    hidden: Tensor,
    hidden_scales: Tensor | None,
    weight: Tensor,
    weight_scales: Tensor | None,
    active: Tensor | None = None,
    forbidden: Tensor | None = None,
    temperatures: Tensor | None = None,
    seeds: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ids int64, confidence float32 [rows]: logits in float32 as the products give them, all else in float64.

    A chunk of the vocabulary at a time; of each row the largest logit, the sum of exponentials relative to it, and the
    best score (the logit, or logit / T + noise) with its logit and token are carried on.
    """
    rows, vocabulary = hidden.shape[0], weight.shape[0]

    def full(value, dtype=torch.float64):
        return torch.full((rows,), value, dtype=dtype, device=hidden.device)

    largest, total, score, logit, ids = (
        full(-torch.inf),
        full(0.0),
        full(-torch.inf),
        full(-torch.inf),
        full(0, torch.long),
    )
    drawn = full(False, torch.bool)
    if temperatures is not None:
        drawn = (temperatures >= LEAST_TEMPERATURE) & temperatures.isfinite()
    for begin in range(0, vocabulary, CHUNK):
        part = weight[begin : begin + CHUNK]
        if hidden_scales is None:
            logits = gemm(hidden, part)
        else:
            scales = weight_scales[begin // 128 : (begin + CHUNK) // 128]
            logits = fp8_gemm(hidden, hidden_scales, part, scales, out_dtype=torch.float32)
        logits = logits.double()
        if forbidden is not None:
            inside = (forbidden >= begin) & (forbidden < begin + len(part))
            logits[:, forbidden[inside] - begin] = -torch.inf
        scores = logits
        if drawn.any():
            noise = gumbel(seeds, positions, len(part), begin)
            scores = torch.where(drawn[:, None], logits / temperatures.double()[:, None] + noise, logits)
        best, at = scores.max(dim=1)
        better = best > score
        score = torch.where(better, best, score)
        ids = torch.where(better, at + begin, ids)
        logit = torch.where(better, logits.gather(1, at[:, None])[:, 0], logit)
        before, largest = largest, torch.maximum(largest, logits.amax(dim=1))
        origin = largest.masked_fill(largest == -torch.inf, 0)
        total = total * (before - origin).exp() + (logits - origin[:, None]).exp().sum(dim=1)

    exists = total > 0
    if temperatures is not None:
        exists &= (temperatures >= 0) & temperatures.isfinite()
    confidence = torch.where(exists, (logit - largest).exp() / total, torch.nan)
    ids = ids.masked_fill(~exists, -1)
    if active is not None:
        ids, confidence = ids.masked_fill(~active, -1), confidence.masked_fill(~active, -torch.inf)
    return ids, confidence.float()


def uncover_(
    tokens: Tensor,
    at: Tensor,
    ids: Tensor,
    confidence: Tensor,
    left: Tensor,
    mask_id: int,
    threshold: float | None = None,
    factor: float | None = None,
    counts: Tensor | None = None,
    eos_ids: Tensor | None = None,
    ended: Tensor | None = None,
    last_too: bool = False,
) -> None:
    """Sorts each block's candidates by confidence and takes the first ones that its rule allows; in place."""
    rows = ids.shape[1]
    places = at.long()[:, None] + torch.arange(rows, device=tokens.device)
    block = tokens.gather(1, places)
    candidate = (block == mask_id) & (ids >= 0) & (ids != mask_id) & ~confidence.isnan()

    # Candidates first, then by confidence, then by place; n is a token's number in that order, from 1 on.
    order = confidence.masked_fill(~candidate, -torch.inf).argsort(dim=1, descending=True, stable=True)
    order = order.gather(1, (~candidate).gather(1, order).byte().argsort(dim=1, stable=True))
    n = torch.arange(1, rows + 1, device=tokens.device).expand_as(order)
    ranked, count = confidence.gather(1, order), candidate.sum(dim=1, keepdim=True)
    if threshold is not None:
        taken = ranked >= threshold
    elif factor is not None:
        taken = ranked >= (1 - factor / (n.double() + 1)).float()
    else:
        taken = n <= counts[:, None]
    taken = (taken | (n == 1)) & (n <= count)
    taken = taken.cumprod(dim=1).bool()
    if last_too:
        taken |= (n == count) & (taken.sum(dim=1, keepdim=True) == count - 1) & (count > 1)
    taken = torch.zeros_like(taken).scatter(1, order, taken)

    block = torch.where(taken, ids, block)
    tokens.scatter_(1, places, block)
    masks = block == mask_id
    left.copy_(masks.sum(dim=1))
    if ended is not None:
        before_masks = masks.cumsum(dim=1) == 0
        ended.copy_(ended.bool() | (torch.isin(block, eos_ids) & before_masks).any(dim=1))
