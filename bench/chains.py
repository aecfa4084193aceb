"""The chains that our fused kernels replace, in plain torch, for torch.compile. Casts are 1x128 or 128x1 to E4M3."""

import torch
from torch import Tensor

Codes = tuple[Tensor, Tensor]  # codes, scales
EPS = 1e-5


def rows(x: Tensor) -> Codes:
    groups = x.float().view(x.shape[0], -1, 128)
    scales = groups.abs().amax(-1, keepdim=True).clamp(min=1e-10) / 448
    return (groups / scales).to(torch.float8_e4m3fn).view(x.shape), scales[..., 0].t().contiguous()


def columns(x: Tensor) -> Codes:
    """Codes of the transpose, as the product wants them."""
    return rows(x.t())


def squares(x: Tensor) -> Codes:
    blocks = x.float().view(x.shape[0] // 128, 128, x.shape[1] // 128, 128)
    scales = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-10) / 448
    return (blocks / scales).to(torch.float8_e4m3fn).view(x.shape), scales[:, 0, :, 0]


def both(x: Tensor) -> tuple[Codes, Codes]:
    return rows(x), columns(x)


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    return (codes.float().view(codes.shape[0], -1, 128) * scales[..., None]).view(codes.shape)


def norm(x: Tensor, weight: Tensor) -> Codes:
    return rows(torch.nn.functional.rms_norm(x, (x.shape[1],), weight, EPS))


def norm_training(x: Tensor, weight: Tensor) -> tuple[Codes, Codes, Codes]:
    y = torch.nn.functional.rms_norm(x, (x.shape[1],), weight, EPS)
    return rows(y), columns(y), rows(x)


def add_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Codes]:
    s = x + residual
    return s, norm(s, weight)


def add_norm_training(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, tuple[Codes, Codes, Codes]]:
    s = x + residual
    return s, norm_training(s, weight)


def norm_backward(dy: Tensor, codes: Tensor, scales: Tensor, rstd: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    xhat, g = decoded(codes, scales) * rstd[:, None], dy.float() * weight.float()
    dx = rstd[:, None] * (g - xhat * (g * xhat).mean(1, keepdim=True))
    return dx.to(dy.dtype), (dy.float() * xhat).sum(0)


def swiglu_alone(gate: Tensor, up: Tensor) -> Tensor:
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Codes:
    return rows(torch.nn.functional.silu(gate.float()) * up.float())


def swiglu_training(gate: Tensor, up: Tensor) -> tuple[Codes, Codes, Codes]:
    return swiglu(gate, up), rows(gate), rows(up)


def swiglu_backward(
    dh: Tensor, gate: Tensor, gate_scales: Tensor, up: Tensor, up_scales: Tensor
) -> tuple[tuple[Codes, Codes], tuple[Codes, Codes], Codes]:
    g, u, d = decoded(gate, gate_scales), decoded(up, up_scales), dh.float()
    s = torch.sigmoid(g)
    dgate, dup = d * u * (s * (1 + g * (1 - s))), d * (g * s)
    return both(dgate.to(dh.dtype)), both(dup.to(dh.dtype)), columns((g * s * u).to(dh.dtype))
