"""SwiGLU, alone and fused with casts, in plain torch (COAT, section 4; DeepSeek-V3 report, section 3.3.3).

    h = gate * sigmoid(gate) * up        in float32, rounded once to gate's dtype, then quantised

Training keeps gate and up as FP8 codes; the backward pass recomputes h from them, so that h is never stored. Signatures
are those of torch.ops.eightfold.*.
"""

import torch
from torch import Tensor

from eightfold.reference.quant import dequantize, quantize, quantize_both


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """h."""
    g = gate.float()
    return (g * torch.sigmoid(g) * up.float()).to(gate.dtype).contiguous()


def swiglu_quantize(gate: Tensor, up: Tensor, training: bool) -> tuple[Tensor, ...]:
    """(codes, scales) of h, then those of gate and of up (size 0 unless ``training``), all in groups (1, 128)."""
    h = swiglu(gate, up)
    if training:
        return *quantize(h, [1, 128]), *quantize(gate, [1, 128]), *quantize(up, [1, 128])
    nothing = [torch.empty((0, 0), dtype=t, device=h.device) for t in (torch.float8_e4m3fn, torch.float32) * 2]
    return *quantize(h, [1, 128]), *nothing


def swiglu_backward_quantize(
    dh: Tensor, gate_codes: Tensor, gate_scales: Tensor, up_codes: Tensor, up_scales: Tensor, beside: bool = False
) -> tuple[Tensor, ...]:
    """(codes, scales, col_codes, col_scales) of dgate, the same of dup, (col_codes, col_scales) of the recomputed h.

    With s = sigmoid(gate): h = gate * s * up, dup = dh * gate * s, dgate = dh * up * s * (1 + gate * (1 - s)), each
    rounded to dh's dtype before it is quantised. With ``beside`` (a multiple of 128 columns), [dgate | dup] comes first
    and what would be dup's is of size 0.
    """
    g = dequantize(gate_codes, gate_scales, [1, 128], torch.float32)
    u = dequantize(up_codes, up_scales, [1, 128], torch.float32)
    d = dh.float()
    s = torch.sigmoid(g)
    silu = g * s
    dgate = ((d * u) * (s * (1.0 + g * (1.0 - s)))).to(dh.dtype)
    dup = (d * silu).to(dh.dtype)
    h = (silu * u).to(dh.dtype)
    if not beside:
        return *quantize_both(dgate), *quantize_both(dup), *quantize(h, [128, 1])
    nothing = [torch.empty((0, 0), dtype=t, device=h.device) for t in (torch.float8_e4m3fn, torch.float32) * 2]
    return *quantize_both(torch.cat((dgate, dup), 1)), *nothing, *quantize(h, [128, 1])
