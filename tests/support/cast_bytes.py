"""Comparison of tensors by their bytes, and values of every kind to cast."""

import torch

from eightfold.ops import _library, layouts  # noqa: F401
from eightfold.reference import quant as reference

ops = torch.ops.eightfold
GROUPS = [(1, 128), (128, 128), (128, 1), (1, 16)]
E4M3 = torch.float8_e4m3fn
BITS = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float8_e4m3fn: torch.uint8}


def bits(t):
    return t.contiguous().view(BITS[t.dtype])


def assert_same(actual, expected):
    """Same dtype, shape, strides and bytes; NaNs count by their bytes."""
    if isinstance(actual, tuple):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
        return
    assert (actual.dtype, actual.shape, actual.stride()) == (expected.dtype, expected.shape, expected.stride())
    different = bits(actual.cpu()) != bits(expected.cpu())
    assert not different.any(), (
        f"{int(different.sum())} of {different.numel()} differ, first at {different.nonzero()[0].tolist()}"
    )


def bit_patterns(rows, cols, dtype, specials=2e-5):
    """Random bit patterns of either sign, denormals included; a few elements are NaN or Inf of any payload.

    Exponents fall up to 24 below a level that each 64x64 block has of its own, so that codes cover their whole range.
    """
    mantissa = {torch.bfloat16: 7, torch.float32: 23}[dtype]
    level = torch.randint(0, 255, (layouts.ceil_div(rows, 64), layouts.ceil_div(cols, 64)))
    level = level.repeat_interleave(64, 0)[:rows].repeat_interleave(64, 1)[:, :cols]
    exponent = (level - torch.randint(0, 25, (rows, cols))).clamp(min=0)
    exponent = torch.where(torch.rand(rows, cols) < specials, 255, exponent)
    sign = torch.randint(0, 2, (rows, cols)) << (mantissa + 8)
    fraction = torch.randint(0, 1 << mantissa, (rows, cols))
    fraction = torch.where((exponent == 255) & (fraction % 2 == 0), 0, fraction)  # half of them Inf
    pattern = sign | exponent << mantissa | fraction
    width = mantissa + 9
    signed = torch.where(pattern >= 1 << (width - 1), pattern - (1 << width), pattern)
    return signed.to(BITS[dtype]).view(dtype)


def check_all(x, device, power_of_two=False, groups=GROUPS):
    """Every op that quantises, on ``x`` given on the CPU."""
    on_device = x.to(device)
    for group in groups:
        expected = reference.quantize(x, list(group), power_of_two)
        assert_same(ops.quantize(on_device, list(group), power_of_two), expected)
    rows, cols = (reference.quantize(x, list(g), power_of_two) for g in ((1, 128), (128, 1)))
    assert_same(ops.quantize_both(on_device, power_of_two), (*rows, *cols))
    again = ops.requantize(*ops.quantize(on_device, [1, 128], power_of_two), power_of_two)
    assert_same(again, reference.requantize(*rows, power_of_two))
