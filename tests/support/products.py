"""Operands of fp8_gemm with NaN in their padding, and the exact product of their values."""

import torch

from eightfold import reference
from eightfold.ops import _library, layouts  # noqa: F401
from eightfold.ops.quant import QuantizedTensor
from eightfold.reference import quant as reference_quant

# Relative Frobenius error. The tensor core keeps about 14 bits inside a block of 128; a CPU keeps 24.
FP32_ERROR = {"cpu": 1e-5, "cuda": 1e-3}
BF16_ERROR = {"cpu": 2**-9, "cuda": 2.2e-3}


def operand(rows, depth, group, device, mean=0.0):
    """Random values on levels that differ from group to group; group "cols" gives transposed column codes, (1, 128)."""
    level = 10 ** torch.empty(layouts.ceil_div(rows, 32), layouts.ceil_div(depth, 128)).uniform_(-2, 2)
    x = torch.randn(rows, depth) + mean
    x *= level.repeat_interleave(32, 0)[:rows].repeat_interleave(128, 1)[:, :depth]
    if group == "cols":
        codes, scales = reference_quant.quantize(x.t().contiguous(), [128, 1])
        columns = QuantizedTensor(codes, scales, (128, 1))
        return on_device(columns, device).t()
    return on_device(QuantizedTensor(*reference_quant.quantize(x, list(group)), group), device)


def on_device(q, device):
    return QuantizedTensor(strided_copy(q.codes, device), strided_copy(q.scales, device), q.group)


def strided_copy(t, device):
    """``t`` on ``device`` with its strides, the padding filled with NaN."""
    if 0 in t.shape:
        return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
    size = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True))
    bytes_of = torch.full((size * t.element_size(),), 0xFF, dtype=torch.uint8)
    storage = bytes_of.view(t.dtype)
    raw = {1: torch.uint8, 4: torch.int32}[t.element_size()]
    storage.view(raw).as_strided(t.shape, t.stride()).copy_(t.view(raw))
    return storage.to(device).as_strided(t.shape, t.stride())


def exact(a, b, bias=None):
    args = (a.codes.cpu(), a.scales.cpu(), b.codes.cpu(), b.scales.cpu(), b.group[0])
    return reference.fp8_gemm(*args, None if bias is None else bias.cpu(), torch.float64, torch.float64)


def error(actual, expected):
    return float((actual.cpu().double() - expected).norm() / expected.norm())
