"""Rotary position embedding. Floor: queries or keys in and out once, at copy bandwidth."""

import torch

from eightfold import reference

from .common import Bench, Case, compiled, relative_error

ops = torch.ops.eightfold


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    shapes = ((4, 2048, 32, 128), (4, 2048, 28, 128), (4, 2048, 4, 128)) if cuda else ((1, 512, 9, 64),)
    for batch, tokens, heads, dim in shapes:
        x = torch.randn(batch, tokens, heads, dim, device=bench.device, dtype=torch.bfloat16)
        angle = torch.rand(1, tokens, 1, dim // 2, device=bench.device) * 100
        cos, sin = angle.cos(), angle.sin()
        bench.add(
            Case(
                "rotary",
                f"{batch}x{tokens}x{heads}x{dim}",
                ours=lambda x=x, cos=cos, sin=sin: ops.rotary(x, cos, sin),
                error=lambda x=x, cos=cos, sin=sin: relative_error(
                    ops.rotary(x, cos, sin), reference.rotary(x, cos, sin)
                ),
                tolerance=1e-6,
                bytes=4 * x.numel() + 8 * cos.numel(),
                peers={"torch.compile": compiled(_plain, x, cos, sin)} if cuda else {},
            )
        )


def _plain(x, cos, sin):
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
