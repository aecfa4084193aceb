"""LayerNorm and modulation, alone, after a gated residual and with casts. Floor: inputs and outputs once, at copy
bandwidth; a sample's vectors are nothing beside them."""

import torch

from eightfold import reference

from . import chains
from .common import Bench, Case, compiled, relative_error

ops = torch.ops.eightfold
EPS = 1e-6


def run(bench: Bench) -> None:
    """SANA: a CFG pair of the 1.6B model at 1024 and 4096 pixels, a batch it trains with, and one of the 0.6B model."""
    cuda = bench.device.type == "cuda"
    shapes = ((2, 1024, 2240), (8, 1024, 2240), (2, 16384, 2240), (8, 1024, 1152)) if cuda else ((2, 256, 1152),)
    for shape in shapes:
        x, branch, dy = (torch.randn(shape, device=bench.device, dtype=torch.bfloat16) for _ in range(3))
        table = torch.randn(shape[0], 6, shape[2], device=bench.device)
        for case in _cases("x".join(map(str, shape)), x, branch, dy, table[:, 2], table[:, 4], table[:, 3], cuda):
            bench.add(case)


def _cases(shape, x, branch, dy, gate, scale, shift, cuda):
    n = x.numel()
    codes = n * (1 + 4 / 128)
    yield Case(
        "layer_norm_modulate",
        shape,
        ours=lambda: ops.layer_norm_modulate(x, scale, shift, EPS, False),
        error=lambda: relative_error(
            ops.layer_norm_modulate(x, scale, shift, EPS, False)[0],
            reference.layer_norm_modulate(x, scale, shift, EPS, False)[0],
        ),
        tolerance=5e-3,
        bytes=4 * n,
        peers={"torch.compile": compiled(_norm, x, scale, shift)} if cuda else {},
    )
    for training in (False, True):
        yield Case(
            f"gated LN modulate quantize {'training' if training else 'inference'}",
            shape,
            ours=lambda t=training: ops.gated_residual_layer_norm_modulate_quantize(
                x, branch, gate, scale, shift, EPS, t
            ),
            error=lambda t=training: _cast_error(x, branch, gate, scale, shift, t),
            tolerance=5e-3,
            bytes=6 * n + (1 + training) * codes,
            peers={
                "torch.compile": compiled(
                    _gated_training if training else _gated_inference, x, branch, gate, scale, shift
                )
            }
            if cuda
            else {},
        )
    r, _, mean, rstd = ops.gated_residual_layer_norm_modulate(x, branch, gate, scale, shift, EPS, True)
    arguments = dy, r, mean, rstd, scale, dy, branch, gate
    yield Case(
        "gated LN modulate backward",
        shape,
        ours=lambda: ops.layer_norm_modulate_backward(*arguments),
        error=lambda: relative_error(
            ops.layer_norm_modulate_backward(*arguments)[0], reference.layer_norm_modulate_backward(*arguments)[0]
        ),
        tolerance=5e-3,
        bytes=12 * n,
        peers={"torch.compile": compiled(_backward, *arguments)} if cuda else {},
    )


def _norm(x, scale, shift):
    y = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=EPS) * (1 + scale[:, None]) + shift[:, None]
    return y.to(x.dtype)


def _gated(x, branch, gate, scale, shift):
    r = (x + gate[:, None] * branch).to(x.dtype)
    y = _norm(r, scale, shift).flatten(0, 1)
    return r, torch.nn.functional.pad(y, (0, -y.shape[1] % 128))


def _gated_inference(*arguments):
    r, y = _gated(*arguments)
    return r, chains.rows(y)


def _gated_training(*arguments):
    r, y = _gated(*arguments)
    return r, chains.both(y)


def _backward(dy, r, mean, rstd, scale, residual_grad, branch, gate):
    return reference.layer_norm_modulate_backward(dy, r, mean, rstd, scale, residual_grad, branch, gate)


def _cast_error(x, branch, gate, scale, shift, training) -> float:
    arguments = x, branch, gate, scale, shift, EPS, training
    got = ops.gated_residual_layer_norm_modulate_quantize(*arguments)[1:3]
    want = reference.gated_residual_layer_norm_modulate_quantize(*arguments)[1:3]
    return relative_error(*(reference.dequantize(c, s, [1, 128], torch.float32) for c, s in (got, want)))
