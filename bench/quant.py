"""Casts to E4M3. Floor: the bytes read and written once, at copy bandwidth."""

import torch

from eightfold import reference
from eightfold.ops.layouts import ceil_div

from . import chains
from .common import Bench, Case, compiled

ops = torch.ops.eightfold
CUDA_SHAPES = ((16384, 4096), (16384, 8192), (16384, 28672))
CPU_SHAPES = ((512, 576), (512, 1536), (2048, 4096))


def run(bench: Bench) -> None:
    for rows, cols in CUDA_SHAPES if bench.device.type == "cuda" else CPU_SHAPES:
        x = torch.randn(rows, cols, device=bench.device, dtype=torch.bfloat16)
        n, shape = x.numel(), f"{rows}x{cols}"
        for group in ((1, 128), (128, 128), (1, 16)):
            scales = ceil_div(rows, group[0]) * ceil_div(cols, group[1])
            bench.add(
                Case(
                    f"quantize {group[0]}x{group[1]}",
                    shape,
                    ours=lambda x=x, group=group: ops.quantize(x, group),
                    error=lambda x=x, group=group: _different_bytes(
                        ops.quantize(x, group), reference.quantize(x, list(group))
                    ),
                    tolerance=0.0,
                    bytes=3 * n + 4 * scales,
                    peers=_peers(x, group),
                )
            )
        bench.add(
            Case(
                "quantize_both",
                shape,
                ours=lambda x=x: ops.quantize_both(x),
                error=lambda x=x: _different_bytes(ops.quantize_both(x), reference.quantize_both(x)),
                tolerance=0.0,
                bytes=4 * n + 8 * n / 128,
                peers={"torch.compile": compiled(chains.both, x)} if x.is_cuda else {},
            )
        )
        codes, scales = ops.quantize(x, (1, 128))
        bench.add(
            Case(
                "requantize",
                shape,
                ours=lambda c=codes, s=scales: ops.requantize(c, s),
                error=lambda c=codes, s=scales: _different_bytes(ops.requantize(c, s), reference.requantize(c, s)),
                tolerance=0.0,
                bytes=2 * n + 8 * n / 128,
            )
        )


def _different_bytes(got: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> float:
    """Share of bytes that differ: the casts are exact, so it must be 0."""
    pairs = [(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8)) for a, b in zip(got, expected)]
    return sum((a != b).sum().item() for a, b in pairs) / sum(a.numel() for a, _ in pairs)


def _peers(x: torch.Tensor, group: tuple[int, int]) -> dict:
    plain = {(1, 128): chains.rows, (128, 128): chains.squares}.get(group)
    return {"torch.compile": compiled(plain, x)} if x.is_cuda and plain else {}
