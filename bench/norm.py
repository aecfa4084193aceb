"""RMSNorm fused with casts. Floor: input, outputs and rstd once, at copy bandwidth."""

import torch

from eightfold import reference

from . import chains
from .common import Bench, Case, compiled, relative_error

ops = torch.ops.eightfold
EPS = chains.EPS


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    for rows, cols in ((16384, 4096), (16384, 3584)) if cuda else ((512, 576), (2048, 2048)):
        x, residual, dy = (torch.randn(rows, cols, device=bench.device, dtype=torch.bfloat16) for _ in range(3))
        weight = torch.rand(cols, device=bench.device, dtype=torch.bfloat16) + 0.5
        n, shape = rows * cols, f"{rows}x{cols}"
        for training in (False, True):
            written = (1 + training * 2) * n * (1 + 4 / 128)
            name = "training" if training else "inference"
            plain = chains.norm_training if training else chains.norm
            plain_add = chains.add_norm_training if training else chains.add_norm
            bench.add(
                Case(
                    f"rms_norm_quantize {name}",
                    shape,
                    ours=lambda x=x, w=weight, t=training: ops.rms_norm_quantize(x, w, EPS, t),
                    error=lambda x=x, w=weight, t=training: _error(ops, x, w, t),
                    tolerance=5e-3,
                    bytes=2 * n + written,
                    peers={"torch.compile": compiled(plain, x, weight)} if cuda else {},
                )
            )
            bench.add(
                Case(
                    f"add_rms_norm_quantize {name}",
                    shape,
                    ours=lambda x=x, r=residual, w=weight, t=training: ops.add_rms_norm_quantize(x, r, w, EPS, t),
                    error=lambda x=x, r=residual, w=weight, t=training: relative_error(
                        ops.add_rms_norm_quantize(x, r, w, EPS, t)[0], x.double() + r.double()
                    ),
                    tolerance=5e-3,
                    bytes=6 * n + written,
                    peers={"torch.compile": compiled(plain_add, x, residual, weight)} if cuda else {},
                )
            )
        _, x_codes, x_scales, rstd = ops.rms_norm(x, weight, EPS, True)
        arguments = (dy, x_codes, x_scales, rstd, weight, None)
        bench.add(
            Case(
                "rms_norm_backward from FP8",
                shape,
                ours=lambda a=arguments: ops.rms_norm_backward(*a),
                error=lambda a=arguments: relative_error(
                    ops.rms_norm_backward(*a)[0], reference.rms_norm_backward(*a)[0]
                ),
                tolerance=5e-3,
                bytes=5 * n,
                peers={"torch.compile": compiled(chains.norm_backward, *arguments[:-1])} if cuda else {},
            )
        )


def _error(ops, x, weight, training) -> float:
    codes, scales = ops.rms_norm_quantize(x, weight, EPS, training)[:2]
    expected = reference.rms_norm_quantize(x, weight, EPS, training)[:2]
    return relative_error(
        *(reference.dequantize(c, s, [1, 128], torch.float32) for c, s in ((codes, scales), expected))
    )
