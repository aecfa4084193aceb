"""A step of a diffusion language model: 32 rows over all keys of a cache that their own are written to in that call.

The ceiling is the bytes of the cached keys, values and scales. LLaDA-8B has 32 heads that share no keys, Dream-7B 28
with 4 KV heads: of its 2.7 MB at batch 1 the launch is more than the bytes.
"""

import torch
import torch.nn.functional as F

from eightfold import reference

from .common import Bench, Case, relative_error

ops = torch.ops.eightfold
ROWS = 32


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    models = ((32, 32, 128), (28, 4, 128)) if cuda else ((9, 3, 64),)
    sizes = ((1, 1312), (1, 2048), (8, 1312), (8, 2048)) if cuda else ((1, 512),)
    for codes in (False, True):
        for model in models:
            for size in sizes:
                bench.add(_step(bench.device, *size, *model, codes))


def _step(
    device: torch.device, batch: int, keys: int, heads: int, kv_heads: int, dim: int, codes: bool = False
) -> Case:
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=device, dtype=torch.bfloat16)

    wide = normal(batch * ROWS, heads + 2 * kv_heads, dim).view(batch, ROWS, -1, dim)
    q, k, v = wide.split([heads, kv_heads, kv_heads], 2)
    dense = [normal(batch, kv_heads, keys, dim) for _ in range(2)]
    cache = [*dense, None, None]
    if codes:
        scales = [x.float().abs().amax(-1).clamp_min(1e-10) / 448 for x in dense]
        cache = [*((x / s[..., None]).to(torch.float8_e4m3fn) for x, s in zip(dense, scales, strict=True)), *scales]
    at = torch.full((batch,), keys // 2 // ROWS * ROWS, device=device, dtype=torch.int32)
    lengths = torch.full((batch,), keys, device=device, dtype=torch.int32)
    scale = dim**-0.5

    def ours() -> torch.Tensor:
        return ops.block_attention(q, k, v, *cache, at, lengths, scale)

    def error() -> float:
        caches = [x if x is None else x.clone() for x in cache]
        return relative_error(ours(), reference.block_attention(q, k, v, *caches, at, lengths, scale))

    queries = q.transpose(1, 2).contiguous()
    return Case(
        "block_attention",
        f"{batch}x{keys} {heads}:{kv_heads}x{dim}{' E4M3' if codes else ''}",
        ours=ours,
        error=error,
        tolerance=2e-2,
        bytes=sum(x.numel() * x.element_size() for x in cache if x is not None),
        peers={"torch, bf16, writes nothing": lambda: F.scaled_dot_product_attention(queries, *dense, enable_gqa=True)},
    )
