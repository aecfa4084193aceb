"""Packed sequences, their exact attention in float64, and their keys and values in shuffled pages among NaN."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F

DTYPES = [torch.bfloat16, torch.float32]
LENGTHS = [1, 31, 128, 0, 129, 513, 700]
MASKS = [(True, 1), (False, 1), (True, 32), (True, 200)]  # causal, block


def takes_pages_of(device, page_size):
    return device.type != "cuda" or 128 % page_size == 0 or page_size % 128 == 0


def skip_what_cuda_lacks(device, dtype=torch.bfloat16, dim=64, page_size=16):
    if device.type != "cuda":
        return
    if dtype != torch.bfloat16 or dim not in (64, 96, 128):
        pytest.skip("bfloat16 with heads of 64, 96 or 128 alone on CUDA")
    if not takes_pages_of(device, page_size):
        pytest.skip("on CUDA pages of 16, 32, 64 or a multiple of 128 keys")


def starts_of(lengths, device="cpu"):
    return torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)


def packed(lengths, heads, kv_heads, dim, dtype, device="cpu"):
    """q, k, v and starts."""
    tensors = (torch.randn(sum(lengths), h, dim, device=device).to(dtype) for h in (heads, kv_heads, kv_heads))
    return *tensors, starts_of(lengths, device)


def exact(q, k, v, starts, scale=None, causal=True, block=1):
    """torch's own attention of each sequence, in float64."""
    heads = q.shape[1] // k.shape[1]
    q, k, v = (x.double().transpose(0, 1) for x in (q, k, v))
    k, v = (x.repeat_interleave(heads, 0) for x in (k, v))

    def mask(tokens):
        at = torch.arange(tokens, device=q.device) // block
        return at[None] <= at[:, None] if causal else None

    parts = [
        F.scaled_dot_product_attention(q[:, a:b], k[:, a:b], v[:, a:b], attn_mask=mask(b - a), scale=scale)
        for a, b in pairwise(starts.tolist())
        if a < b
    ]
    return torch.cat(parts, 1).transpose(0, 1)


def relative(ours, exact):
    ours, exact = ours.detach().double(), exact.detach().double()
    return float((ours - exact).norm() / exact.norm())


class Cache:
    """Pages in random order, all NaN at first, with as many again that nobody uses."""

    def __init__(self, lengths, kv_heads, dim, dtype, device="cpu", page_size=16, codes=False):
        counts = [-(-n // page_size) for n in lengths]
        self.page_size, most = page_size, max([1, *counts])
        order = torch.randperm(2 * sum(counts) + 1)
        self.pages = torch.full((len(lengths), most + 1), -1, dtype=torch.int32)
        for i, (count, first) in enumerate(zip(counts, starts_of(counts).tolist())):
            self.pages[i, :count] = order[first : first + count]
        self.pages = self.pages.to(device)
        shape = len(order), kv_heads, page_size
        made = [torch.full((*shape, dim), torch.nan, dtype=dtype, device=device) for _ in range(2)]
        self.k_pages, self.v_pages = (x.to(torch.float8_e4m3fn) for x in made) if codes else made
        scales = [torch.full(shape, torch.nan, device=device) if codes else None for _ in range(2)]
        self.k_scales, self.v_scales = scales

    @property
    def tensors(self):
        return self.k_pages, self.v_pages, self.k_scales, self.v_scales

    def slots(self, sequence, first, end):
        at = torch.arange(first, end, device=self.pages.device)
        return self.pages[sequence, at // self.page_size].long() * self.page_size + at % self.page_size

    def store(self, k, v, starts):
        """All tokens of packed sequences."""
        bounds = pairwise(starts.tolist())
        slots = torch.cat([self.slots(s, 0, b - a) for s, (a, b) in enumerate(bounds)])
        torch.ops.eightfold.paged_store_(k, v, *self.tensors, slots)

    def values(self, lengths):
        """The packed bfloat16 keys and values that E4M3 pages stand for."""
        counts, made = [-(-n // self.page_size) for n in lengths], []
        for pages, scales in ((self.k_pages, self.k_scales), (self.v_pages, self.v_scales)):
            wide = (pages.float() * scales[..., None]).bfloat16().transpose(1, 2)
            owned = [wide[own[:count].long()].flatten(0, 1) for own, count in zip(self.pages, counts, strict=True)]
            made.append(torch.cat([x[:n] for x, n in zip(owned, lengths, strict=True)]))
        return made

    def attend(self, q, starts, lengths, longest=None, scale=None, causal=True, block=1, settled=False):
        device = q.device
        lengths = torch.as_tensor(lengths, dtype=torch.int32, device=device)
        longest, scale = longest or q.shape[0], scale or q.shape[-1] ** -0.5
        options = longest, scale, causal, block, settled
        return torch.ops.eightfold.paged_attention(q, *self.tensors, self.pages, starts, lengths, *options)
