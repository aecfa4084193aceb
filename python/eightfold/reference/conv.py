"""The middle of SANA's feed-forward block, alone and fused with a cast, in plain torch (arXiv 2410.10629, section 2.2).

    s = silu(x)        d = depthwise 3x3 of s, zeros around the image, plus bias        y = d[:C] * silu(d[C:])

per pixel of 2C channels, in float32, rounded once to x's dtype. Signatures are those of torch.ops.eightfold.*.
"""

import torch
from torch import Tensor

from eightfold.reference.quant import quantize

TAPS = [(down, right) for down in range(3) for right in range(3)]


def _shifted(x: Tensor) -> list[Tensor]:
    """For each tap of the window the input under it, zeros outside the image: nine tensors of x's shape."""
    _, height, width, _ = x.shape
    padded = torch.nn.functional.pad(x, (0, 0, 1, 1, 1, 1))
    return [padded[:, down : down + height, right : right + width] for down, right in TAPS]


def _depthwise(s: Tensor, taps: Tensor, bias: Tensor) -> Tensor:
    d = bias.float().expand(s.shape)
    for tap, under in zip(taps, _shifted(s), strict=True):
        d = d + tap * under
    return d


def _taps(weight: Tensor) -> Tensor:
    """[9, 2C], in the order of TAPS."""
    return weight.float().reshape(weight.shape[0], 9).t()


def depthwise_glu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """y [batch, height, width, C] of ``x`` [batch, height, width, 2C], ``weight`` [2C, 3, 3] or [2C, 1, 3, 3]."""
    value, gate = _depthwise(torch.nn.functional.silu(x.float()), _taps(weight), bias).chunk(2, 3)
    return (value * torch.nn.functional.silu(gate)).to(x.dtype).contiguous()


def depthwise_glu_quantize(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scales) of y as [batch * height * width, C], in groups (1, 128)."""
    return quantize(depthwise_glu(x, weight, bias).flatten(0, 2), [1, 128])


def depthwise_glu_backward(dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dx in x's dtype, dweight in float32 and weight's shape, dbias in float32), all made from ``x`` again.

    With dd the gradient of d, (dy * silu(gate), dy * value * silu'(gate)): dx = silu'(x) * the transposed convolution
    of dd, rounded once; dweight = sum over pixels of dd * s under the tap; dbias = sum over pixels of dd.
    """
    values, grad, taps = x.float(), dy.float(), _taps(weight)
    sigmoid = torch.sigmoid(values)
    s = values * sigmoid
    value, gate = _depthwise(s, taps, bias).chunk(2, 3)
    gate_sigmoid = torch.sigmoid(gate)
    slope = gate_sigmoid * (1 + gate * (1 - gate_sigmoid))
    dd = torch.cat((grad * (gate * gate_sigmoid), grad * value * slope), 3)
    ds = torch.zeros_like(dd)
    for tap, under in zip(taps.flip(0), _shifted(dd), strict=True):
        ds = ds + tap * under
    dx = ds * (sigmoid * (1 + values * (1 - sigmoid)))
    dtaps = [(dd * under).sum((0, 1, 2)) for under in _shifted(s)]
    dweight = torch.stack(dtaps, 1).reshape(weight.shape)
    return dx.to(x.dtype).contiguous(), dweight, dd.sum((0, 1, 2))
