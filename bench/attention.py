"""Attention whose rows keep their bits: training (half of the square counts), decoding over pages, and what lies
between the projection and these.

The ceiling of the first is an E4M3 product, twice what bf16 operands can reach; of the second the bytes of its keys; of
the third q, k and v read and written once.
"""

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from eightfold import reference

from .common import Bench, Case, relative_error

ops = torch.ops.eightfold


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    layers = ((4, 2048, 32, 32, 128), (4, 2048, 28, 4, 128), (4, 2048, 9, 3, 64)) if cuda else ((1, 512, 9, 3, 64),)
    for layer in layers:
        bench.add(_training(bench.device, *layer))
    for layer in (*layers, (2, 2559, 32, 8, 128)) if cuda else layers:
        bench.add(_gradients(bench.device, *layer))
    caches = ((64, 1024, 28, 4, 128), (64, 1024, 32, 8, 128), (64, 1024, 32, 32, 128), (16, 4096, 32, 8, 128))
    for cache in caches if cuda else ((8, 512, 9, 3, 64),):
        bench.add(_decode(bench.device, *cache))
    steps = ((1, 28, 4, 128), (64, 28, 4, 128), (64, 32, 8, 128), (512, 32, 8, 128), (8192, 32, 8, 128))
    for step in steps if cuda else ((64, 9, 3, 64),):
        for norm in (False, True):
            bench.add(_write(bench.device, *step, norm))
    for cache in caches[:2] if cuda else ((8, 512, 9, 3, 64),):
        bench.add(_decode(bench.device, *cache, codes=True))


def _rows(device: torch.device, batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> list[torch.Tensor]:
    """q, k, v and starts."""
    counts = heads, kv_heads, kv_heads
    rows = [torch.randn(batch * tokens, n, dim, device=device, dtype=torch.bfloat16) for n in counts]
    return [*rows, torch.arange(batch + 1, device=device, dtype=torch.int32) * tokens]


def _training(device: torch.device, batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> Case:
    q, k, v, starts = _rows(device, batch, tokens, heads, kv_heads, dim)
    scale, group = dim**-0.5, heads // kv_heads

    def ours() -> torch.Tensor:
        return ops.attention(q, k, v, starts, tokens, scale, True)[0]

    def error() -> float:
        part = [x[:tokens, :n] for x, n in ((q, group), (k, 1), (v, 1))]
        exact, _ = reference.attention(*part, starts[:2], tokens, scale, True)
        return relative_error(ours()[:tokens, :group], exact)

    heads_first = [x.view(batch, tokens, -1, dim).transpose(1, 2) for x in (q, k, v)]
    kinds = (
        {"torch flash": SDPBackend.FLASH_ATTENTION, "cuDNN": SDPBackend.CUDNN_ATTENTION}
        if device.type == "cuda"
        else {}
    )
    kinds = kinds or {"torch": SDPBackend.FLASH_ATTENTION}
    return Case(
        "attention",
        f"{batch}x{tokens} {heads}:{kv_heads}x{dim}",
        ours=ours,
        error=error,
        tolerance=2e-2,
        flop=2 * batch * heads * tokens * tokens * dim,
        peers={name: _sdpa(heads_first, kind) for name, kind in kinds.items()},
    )


def _gradients(device: torch.device, batch: int, tokens: int, heads: int, kv_heads: int, dim: int) -> Case:
    q, k, v, starts = _rows(device, batch, tokens, heads, kv_heads, dim)
    scale, group = dim**-0.5, heads // kv_heads
    out, lse = ops.attention(q, k, v, starts, tokens, scale)
    dout = torch.randn_like(out)

    def ours() -> tuple[torch.Tensor, ...]:
        return ops.attention_backward(dout, q, k, v, out, lse, starts, tokens, scale)

    def error() -> float:
        first = [x[:tokens, :n] for x, n in ((dout, group), (q, group), (k, 1), (v, 1), (out, group))]
        exact = reference.attention_backward(*first, lse[:group, :tokens], starts[:2], tokens, scale)
        parts = [x[:tokens, :n] for x, n in zip(ours(), (group, 1, 1), strict=True)]
        return max(relative_error(a, b) for a, b in zip(parts, exact, strict=True))

    leaves = [x.view(batch, tokens, -1, dim).transpose(1, 2).requires_grad_() for x in (q, k, v)]
    kinds = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch flash, same bits": SDPBackend.FLASH_ATTENTION}
    if device.type == "cuda":
        kinds["cuDNN"] = SDPBackend.CUDNN_ATTENTION
    grad = dout.view(batch, tokens, heads, dim).transpose(1, 2)

    def peer(kind: SDPBackend, same_bits: bool):
        theirs = _sdpa(leaves, kind)()

        def call() -> tuple[torch.Tensor, ...]:
            torch.use_deterministic_algorithms(same_bits)
            found = torch.autograd.grad(theirs, leaves, grad, retain_graph=True)
            torch.use_deterministic_algorithms(False)
            return found

        return call

    return Case(
        "attention_backward",
        f"{batch}x{tokens} {heads}:{kv_heads}x{dim}",
        ours=ours,
        error=error,
        tolerance=2e-2,
        flop=5 * batch * heads * tokens * tokens * dim,
        peers={name: peer(kind, "same bits" in name) for name, kind in kinds.items()},
        graph=False,
        queue_cycles=1_000_000,
    )


def _sdpa(heads_first: list[torch.Tensor], kind: SDPBackend, causal: bool = True):
    def call() -> torch.Tensor:
        with sdpa_kernel(kind):
            return F.scaled_dot_product_attention(*heads_first, is_causal=causal, enable_gqa=True)

    return call


def _decode(
    device: torch.device, batch: int, keys: int, heads: int, kv_heads: int, dim: int, codes: bool = False
) -> Case:
    page_size = 64
    count = keys // page_size
    pages = torch.randperm(batch * count, device=device, dtype=torch.int32).view(batch, count)
    shape = (batch * count, kv_heads, page_size, dim)
    k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(2))
    dense = [x[pages.long()].transpose(1, 2).flatten(2, 3).contiguous() for x in (k, v)]
    cache = [k, v, None, None]
    if codes:
        scales = [x.float().abs().amax(-1).clamp_min(1e-10) / 448 for x in (k, v)]
        cache = [*((x / s[..., None]).to(torch.float8_e4m3fn) for x, s in zip((k, v), scales, strict=True)), *scales]
    q = torch.randn(batch, heads, dim, device=device, dtype=torch.bfloat16)
    starts = torch.arange(batch + 1, device=device, dtype=torch.int32)
    lengths = torch.full((batch,), keys, device=device, dtype=torch.int32)
    scale = dim**-0.5

    def ours() -> torch.Tensor:
        return ops.paged_attention(q, *cache, pages, starts, lengths, 1, scale)

    def error() -> float:
        few = (q[:2], *cache, pages[:2], starts[:3], lengths[:2], 1, scale)
        return relative_error(ours()[:2], reference.paged_attention(*few))

    return Case(
        "paged_attention",
        f"{batch}x{keys} {heads}:{kv_heads}x{dim}{' E4M3' if codes else ''}",
        ours=ours,
        error=error,
        tolerance=2e-2,
        bytes=sum(x.numel() * x.element_size() for x in cache if x is not None),
        peers={"torch, dense cache": lambda: F.scaled_dot_product_attention(q[:, :, None], *dense, enable_gqa=True)},
    )


def _write(device: torch.device, tokens: int, heads: int, kv_heads: int, dim: int, norm: bool) -> Case:
    """Slices of one projection's output, each row to a page of its own, as when decoding; with ``norm`` as in Qwen3."""
    wide = torch.randn(tokens, heads + 2 * kv_heads, dim, device=device, dtype=torch.bfloat16)
    q, k, v = wide.split([heads, kv_heads, kv_heads], 1)
    angle = torch.rand(tokens, dim // 2, device=device) * 100
    cos, sin = angle.cos(), angle.sin()
    slots = torch.randperm(tokens, device=device) * 16 + torch.randint(0, 16, (tokens,), device=device)
    weights = [torch.rand(dim, device=device) if norm else None for _ in range(2)]

    def pages() -> list[torch.Tensor]:
        return [torch.zeros(tokens, kv_heads, 16, dim, device=device, dtype=torch.bfloat16) for _ in range(2)]

    def arguments(pages: list[torch.Tensor]) -> tuple:
        return q, k, v, cos, sin, *pages, None, None, slots, *weights, 1e-6

    def error() -> float:
        made, exact = pages(), pages()
        ours, theirs = ops.rope_cache_write(*arguments(made)), reference.rope_cache_write(*arguments(exact))
        return max(relative_error(a, b) for a, b in zip((ours, *made), (theirs, *exact), strict=True))

    def turned(x: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
        if weight is not None:
            x = ops.rms_norm(x.contiguous().flatten(0, 1), weight, 1e-6, False)[0].view(x.shape)
        return ops.rotary(x[None], cos[None, :, None], sin[None, :, None])[0]

    def apart() -> torch.Tensor:
        ops.paged_store_(turned(k, weights[1]), v, *used, None, None, slots)
        return turned(q, weights[0])

    used = pages()
    return Case(
        "rope_cache_write" + (" with norms" if norm else ""),
        f"{tokens} {heads}:{kv_heads}x{dim}",
        ours=lambda: ops.rope_cache_write(*arguments(used)),
        error=error,
        tolerance=2e-3,
        bytes=4 * wide.numel(),
        peers={"ops apart": apart},
    )
