"""Tokens drawn from logits in plain torch, with the random numbers of the kernels: the same tokens."""

import torch
from torch import Tensor

MASS_ONE = 2.0**40  # integer mass of the most likely token
_LOW = 0xFFFFFFFF


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: Tensor) -> list[Tensor]:
    """The four 32-bit words (in int64) of Philox4x32-10; counter words and keys broadcast."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & _LOW, key >> 32 & _LOW
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # their 64 bits are right whatever the sign
        c0, c1, c2, c3 = (b >> 32 & _LOW) ^ c1 ^ k0, b & _LOW, (a >> 32 & _LOW) ^ c3 ^ k1, a & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return [c0, c1, c2, c3]


def gumbel(seeds: Tensor, positions: Tensor, count: int, begin: int = 0) -> Tensor:
    """Noise float64 [rows, count] of the tokens from ``begin`` on, a multiple of 4.

    Token v takes word v % 4 of the block (v // 4, 0, position, position >> 32).
    """
    block = torch.arange(begin // 4, (begin + count + 3) // 4, device=seeds.device)
    position, seed = positions[:, None], seeds[:, None]
    words = philox((block, torch.zeros_like(block), position & _LOW, position >> 32 & _LOW), seed)
    word = torch.stack(words, dim=-1).flatten(1)[:, :count]
    u = (word.float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24).double()
    return -torch.log(-torch.log1p(-u))


def kept(logits: Tensor, scaled: Tensor, top_k: Tensor, top_p: Tensor) -> Tensor:
    """Which tokens top_k and, after it, top_p leave; ``scaled`` is (logits - max) / temperature."""
    rank = torch.arange(logits.shape[1], device=logits.device)
    order = logits.sort(dim=1, descending=True, stable=True).indices
    keep = (rank < top_k[:, None]) | (top_k[:, None] == 0)
    mass = (scaled.gather(1, order).double().exp() * MASS_ONE).long() * keep
    target = (mass.sum(1).double() * top_p.double()).ceil().long().clamp(min=1)
    # A token stays if the ones before it fall short of the target, so the most likely one always stays.
    keep &= (mass.cumsum(1) - mass < target[:, None]) | (top_p[:, None] == 1)
    return torch.zeros_like(keep).scatter_(1, order, keep)


def sample(
    logits: Tensor, seeds: Tensor, positions: Tensor, temperatures: Tensor, top_k: Tensor, top_p: Tensor
) -> Tensor:
    """Token ids int64 [rows]: of each row of logits the kept token with the largest scaled logit plus noise."""
    if logits.numel() == 0:
        return seeds.new_empty(logits.shape[0])
    largest = logits.max(dim=1, keepdim=True).values
    scaled = torch.where(logits == largest, 0.0, (logits - largest) / temperatures[:, None])
    scores = scaled.double() + gumbel(seeds, positions, logits.shape[1])
    drawn = scores.masked_fill(~kept(logits, scaled, top_k, top_p), -torch.inf).argmax(dim=1)
    tokens = torch.where(temperatures == 0, logits.argmax(dim=1), drawn)
    valid = (temperatures >= 0) & temperatures.isfinite() & (top_k >= 0) & (top_p > 0) & (top_p <= 1)
    return tokens.masked_fill(~valid | logits.isnan().any(dim=1), -1)
