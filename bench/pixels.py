"""Between the convolutions of an autoencoder: bias and SiLU, norm and residual. Floor: inputs and outputs once, at copy
bandwidth."""

import torch
import torch.nn.functional as F

from eightfold import reference

from .common import Bench, Case, compiled, relative_error

ops = torch.ops.eightfold


def run(bench: Bench) -> None:
    """Stages of DC-AE's decoder at 1024 pixels."""
    cuda = bench.device.type == "cuda"
    for shape in ((1, 1024, 1024, 128), (1, 512, 512, 256), (1, 128, 128, 512)) if cuda else ((1, 64, 64, 128),):
        x, residual = (torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for _ in range(2))
        weight, bias = torch.randn(2, shape[-1], device=bench.device, dtype=torch.bfloat16)
        calls = {"bias_silu": (_silu, (x, bias), 4), "rms_norm_add": (_norm, (x, weight, bias, residual), 6)}
        for name, (plain, arguments, bytes_each) in calls.items():
            ours, spec = getattr(ops, name), getattr(reference, name)
            bench.add(
                Case(
                    name,
                    "x".join(map(str, shape)),
                    ours=lambda ours=ours, a=arguments: ours(*a),
                    error=lambda ours=ours, spec=spec, a=arguments: relative_error(ours(*a), spec(*a)),
                    tolerance=5e-3,
                    bytes=bytes_each * x.numel(),
                    peers={"torch.compile": compiled(plain, *arguments)} if cuda else {},
                )
            )


def _silu(x, bias):
    return F.silu(x + bias)


def _norm(x, weight, bias, residual):
    return F.rms_norm(x, x.shape[-1:], weight, 1e-5) + bias + residual
