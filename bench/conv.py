"""The middle of SANA's feed-forward block: SiLU, depthwise 3x3, gate, cast. Floor: inputs and outputs once, at copy
bandwidth."""

import torch
import torch.nn.functional as F

from eightfold import reference

from . import chains
from .common import Bench, Case, compiled, relative_error

ops = torch.ops.eightfold


def run(bench: Bench) -> None:
    """A CFG pair of the 1.6B and 0.6B models at 1024 and, of the larger, 4096 pixels."""
    cuda = bench.device.type == "cuda"
    for shape in ((2, 32, 32, 5600), (2, 32, 32, 2880), (2, 128, 128, 5600)) if cuda else ((2, 16, 16, 640),):
        channels = 2 * shape[3]
        x = torch.randn(*shape[:3], channels, device=bench.device, dtype=torch.bfloat16)
        weight = torch.randn(channels, 1, 3, 3, device=bench.device, dtype=torch.bfloat16) / 3
        bias = torch.randn(channels, device=bench.device, dtype=torch.bfloat16)
        dy = torch.randn(*shape, device=bench.device, dtype=torch.bfloat16)
        for case in _cases("x".join(map(str, shape)), dy, x, weight, bias, cuda):
            bench.add(case)


def _cases(shape, dy, x, weight, bias, cuda):
    n = dy.numel()
    yield Case(
        "depthwise_glu",
        shape,
        ours=lambda: ops.depthwise_glu(x, weight, bias),
        error=lambda: relative_error(ops.depthwise_glu(x, weight, bias), reference.depthwise_glu(x, weight, bias)),
        tolerance=5e-3,
        bytes=6 * n,
        peers={"torch.compile": compiled(_glu, x, weight, bias)} if cuda else {},
    )
    yield Case(
        "depthwise_glu_quantize",
        shape,
        ours=lambda: ops.depthwise_glu_quantize(x, weight, bias),
        error=lambda: _cast_error(x, weight, bias),
        tolerance=5e-3,
        bytes=n * (5 + 4 / 128),
        peers={"torch.compile": compiled(_glu_quantize, x, weight, bias)} if cuda else {},
    )
    yield Case(
        "depthwise_glu_backward",
        shape,
        ours=lambda: ops.depthwise_glu_backward(dy, x, weight, bias),
        error=lambda: relative_error(
            ops.depthwise_glu_backward(dy, x, weight, bias)[0],
            reference.depthwise_glu_backward(dy, x, weight, bias)[0],
        ),
        tolerance=5e-3,
        bytes=10 * n,
        peers={"torch.compile": _backward_peer(dy, x, weight, bias)} if cuda else {},
    )


def _glu(x, weight, bias):
    """As a model has it in bfloat16, channels last."""
    s = F.silu(x).permute(0, 3, 1, 2)
    value, gate = F.conv2d(s, weight, bias, padding=1, groups=weight.shape[0]).permute(0, 2, 3, 1).chunk(2, 3)
    return value * F.silu(gate)


def _glu_quantize(x, weight, bias):
    y = _glu(x, weight, bias).flatten(0, 2)
    return chains.rows(F.pad(y, (0, -y.shape[1] % 128)))


def _backward_peer(dy, x, weight, bias):
    """Gradients alone, of a compiled forward pass that has run once."""
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y = torch.compile(_glu)(*leaves)
    return lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True)


def _cast_error(x, weight, bias) -> float:
    pairs = ops.depthwise_glu_quantize(x, weight, bias), reference.depthwise_glu_quantize(x, weight, bias)
    return relative_error(*(reference.dequantize(c, s, [1, 128], torch.float32) for c, s in pairs))
