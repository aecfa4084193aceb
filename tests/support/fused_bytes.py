"""Comparison of what the fused ops write: to the byte, to one code, and the layout."""

import torch

from eightfold.ops import layouts
from eightfold.ops.quant import QuantizedTensor


def same_bytes(a, b):
    assert a.shape == b.shape
    assert a.dtype == b.dtype
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[a.element_size()]
    differ = a.view(bits) != b.view(bits)
    assert not differ.any(), f"{differ.sum()} of {differ.numel()} elements differ"


def same_cast(a: QuantizedTensor, b: QuantizedTensor):
    assert a.group == b.group
    same_bytes(a.codes, b.codes)
    same_bytes(a.scales, b.scales)


def steps(codes):
    """Codes as integers in the order of their values, so that neighbours differ by 1."""
    c = codes.contiguous().view(torch.uint8).to(torch.int32)
    return torch.where(c < 128, c, 128 - c)


def close_cast(codes, scales, expected_codes, expected_scales, share=0.01):
    """At most one step apart, and seldom: a sum in another order or an exp of another library may move a value over a
    rounding boundary."""
    assert codes.shape == expected_codes.shape
    torch.testing.assert_close(scales, expected_scales, rtol=2**-7, atol=0, equal_nan=True)
    if codes.numel():
        apart = (steps(codes) - steps(expected_codes)).abs()
        assert apart.max() <= 1
        assert (apart > 0).float().mean() <= share


def check_layout(codes, scales, group):
    like = (
        layouts.empty_codes(*codes.shape, group, codes.device),
        layouts.empty_scales(*codes.shape, group, codes.device),
    )
    assert (codes.stride(), scales.stride()) == (like[0].stride(), like[1].stride())
