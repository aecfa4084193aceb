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
        bench.add(_backward(arguments, cuda))
    for rows, cols in ((8192 * 32, 128),) if cuda else ((2048 * 9, 64),):  # heads, as Qwen3 norms them
        x, dy = (torch.randn(rows, cols, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
        weight = torch.rand(cols, device=bench.device, dtype=torch.bfloat16) + 0.5
        bench.add(
            Case(
                "rms_norm training",
                f"{rows}x{cols}",
                ours=lambda x=x, w=weight: ops.rms_norm(x, w, EPS, True),
                error=lambda x=x, w=weight: relative_error(
                    ops.rms_norm(x, w, EPS, True)[0], reference.rms_norm(x, w, EPS, True)[0]
                ),
                tolerance=5e-3,
                bytes=rows * (5 * cols + 8),
            )
        )
        bench.add(_backward((dy, *ops.rms_norm(x, weight, EPS, True)[1:], weight, None), cuda))


def _backward(arguments: tuple, cuda: bool) -> Case:
    """Of s in codes, as training saves it."""
    dy = arguments[0]
    return Case(
        "rms_norm_backward from FP8",
        f"{dy.shape[0]}x{dy.shape[1]}",
        ours=lambda: ops.rms_norm_backward(*arguments),
        error=lambda: relative_error(ops.rms_norm_backward(*arguments)[0], reference.rms_norm_backward(*arguments)[0]),
        tolerance=5e-3,
        bytes=5 * dy.numel(),
        peers={"torch.compile": compiled(chains.norm_backward, *arguments[:-1])} if cuda else {},
    )


def _error(ops, x, weight, training) -> float:
    codes, scales = ops.rms_norm_quantize(x, weight, EPS, training)[:2]
    expected = reference.rms_norm_quantize(x, weight, EPS, training)[:2]
    return relative_error(
        *(reference.dequantize(c, s, [1, 128], torch.float32) for c, s in ((codes, scales), expected))
    )
