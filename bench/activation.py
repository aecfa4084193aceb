"""SwiGLU, alone and fused with casts, forward and backward. Floor: inputs and outputs once, at copy bandwidth."""

import torch

from eightfold import reference

from . import chains
from .common import Bench, Case, compiled, relative_error

ops = torch.ops.eightfold


def run(bench: Bench) -> None:
    cuda = bench.device.type == "cuda"
    for rows, cols in ((16384, 11008), (16384, 18944)) if cuda else ((512, 1536), (2048, 4096)):
        gate, up, dh = (torch.randn(rows, cols, device=bench.device, dtype=torch.bfloat16) for _ in range(3))
        n, shape = rows * cols, f"{rows}x{cols}"
        bench.add(_alone(gate, up))
        for training, chain in ((False, chains.swiglu), (True, chains.swiglu_training)):
            bench.add(
                Case(
                    f"swiglu_quantize {'training' if training else 'inference'}",
                    shape,
                    ours=lambda g=gate, u=up, t=training: ops.swiglu_quantize(g, u, t),
                    error=lambda g=gate, u=up: _error(
                        ops.swiglu_quantize(g, u, False)[:2], reference.swiglu_quantize(g, u, False)[:2]
                    ),
                    tolerance=5e-3,
                    bytes=4 * n + (1 + 2 * training) * n * (1 + 4 / 128),
                    peers={"torch.compile": compiled(chain, gate, up)} if cuda else {},
                )
            )
        saved = ops.swiglu_quantize(gate, up, True)[2:]
        bench.add(
            Case(
                "swiglu_backward_quantize",
                shape,
                ours=lambda d=dh, s=saved: ops.swiglu_backward_quantize(d, *s),
                error=lambda d=dh, s=saved: _error(
                    ops.swiglu_backward_quantize(d, *s)[:2], reference.swiglu_backward_quantize(d, *s)[:2]
                ),
                tolerance=5e-3,
                bytes=2 * n + 7 * n * (1 + 4 / 128),
                peers={"torch.compile": compiled(chains.swiglu_backward, dh, *saved)} if cuda else {},
            )
        )


def _alone(gate: torch.Tensor, up: torch.Tensor) -> Case:
    return Case(
        "swiglu",
        f"{gate.shape[0]}x{gate.shape[1]}",
        ours=lambda: ops.swiglu(gate, up),
        error=lambda: relative_error(ops.swiglu(gate, up), reference.swiglu(gate.float(), up.float())),
        tolerance=5e-3,
        bytes=6 * gate.numel(),
        peers={"torch.compile": compiled(chains.swiglu_alone, gate, up)} if gate.is_cuda else {},
    )


def _error(got, expected) -> float:
    return relative_error(*(reference.dequantize(c, s, [1, 128], torch.float32) for c, s in (got, expected)))
