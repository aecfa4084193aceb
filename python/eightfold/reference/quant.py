"""The quantiser, in plain torch: the specification that the CPU and CUDA kernels match byte for byte.

Signatures are those of torch.ops.eightfold.*; shapes are logical, layouts those of eightfold.ops.layouts.
"""

import torch
from torch import Tensor

from eightfold.ops import layouts

E4M3_MAX = 448.0
AMAX_FLOOR = 1e-10


def group_scales(amax: Tensor, power_of_two: bool = False) -> Tensor:
    """Scales of groups whose largest magnitudes are ``amax`` (float32); NaN where amax is NaN or Inf."""
    # By a tensor: torch on CUDA turns division by a number into multiplication with its rounded reciprocal.
    scale = amax.clamp(min=AMAX_FLOOR) / torch.full_like(amax, E4M3_MAX)
    if power_of_two:
        bits = (scale.view(torch.int32) + 0x7FFFFF) & 0x7F800000  # up to the next power of two
        scale = bits.view(torch.float32)
    return torch.where(torch.isfinite(amax), scale, torch.full_like(amax, float("nan")))


def to_e4m3(x: Tensor) -> Tensor:
    """float32 -> E4M3, nearest even, saturating; every NaN becomes the code 0x7F."""
    codes = x.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (
        torch.where(x.isnan(), 0x7F, codes.view(torch.uint8).to(torch.int16)).to(torch.uint8).view(torch.float8_e4m3fn)
    )


def _expand(scales: Tensor, group: tuple[int, int], shape: torch.Size) -> Tensor:
    rows, cols = shape
    return scales.repeat_interleave(group[0], 0)[:rows].repeat_interleave(group[1], 1)[:, :cols]


def _place(codes: Tensor, scales: Tensor, group: tuple[int, int]) -> tuple[Tensor, Tensor]:
    rows, cols = codes.shape
    out_codes = layouts.empty_codes(rows, cols, group, codes.device)
    out_scales = layouts.empty_scales(rows, cols, group, codes.device)
    return out_codes.view(torch.uint8).copy_(codes.view(torch.uint8)).view(torch.float8_e4m3fn), out_scales.copy_(
        scales
    )


def quantize(x: Tensor, group: list[int], power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and scales of ``x`` [rows, cols] (bfloat16 or float32), one scale for each ``group`` block of it."""
    rows, cols = x.shape
    group_rows, group_cols = group
    values = x.float()
    padded = torch.nn.functional.pad(values, (0, -cols % group_cols, 0, -rows % group_rows))
    blocks = padded.view(padded.shape[0] // group_rows, group_rows, padded.shape[1] // group_cols, group_cols)
    amax = blocks.abs().amax((1, 3)) if blocks.numel() else blocks.new_zeros(blocks.shape[0], blocks.shape[2])
    scales = group_scales(amax, power_of_two)
    return _place(
        to_e4m3(values / _expand(scales, (group_rows, group_cols), x.shape)), scales, (group_rows, group_cols)
    )


def quantize_both(x: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``quantize`` in groups (1, 128) and (128, 1) from one read of ``x``."""
    return *quantize(x, [1, 128], power_of_two), *quantize(x, [128, 1], power_of_two)


def quantize_stacked(xs: list[Tensor], transposed: bool = False) -> tuple[Tensor, Tensor]:
    """Codes and scales in groups (128, 128) of ``xs`` laid one below the other, or of the transpose of that.

    All but the last are a multiple of 128 high. Transposed codes have rows at multiples of 16 bytes.
    """
    codes, scales = quantize(torch.cat(xs), [128, 128])
    if not transposed:
        return codes, scales
    rows, cols = codes.shape
    turned = layouts.empty_turned_codes(rows, cols, codes.device)
    turned.view(torch.uint8).copy_(codes.view(torch.uint8).t())
    return turned, layouts.empty_scales(cols, rows, (128, 128), codes.device).copy_(scales.t())


def quantize_beside(xs: list[Tensor], columns: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``quantize_both`` of ``xs`` laid beside each other; all but the last are a multiple of 128 wide.

    The columns are of size 0 unless wanted.
    """
    whole = torch.cat(xs, 1)
    if columns:
        return quantize_both(whole)
    nothing = [torch.empty((0, 0), dtype=t, device=whole.device) for t in (layouts.CODES, torch.float32)]
    return *quantize(whole, [1, 128]), *nothing


def dequantize(codes: Tensor, scales: Tensor, group: list[int], dtype: torch.dtype) -> Tensor:
    """codes * scales, multiplied in float32 and rounded once to ``dtype``; row-major."""
    values = (codes.float() * _expand(scales, (group[0], group[1]), codes.shape)).to(dtype)
    return values.clone(memory_format=torch.contiguous_format)


def requantize(codes: Tensor, scales: Tensor, power_of_two: bool = False) -> tuple[Tensor, Tensor]:
    """Row codes (1, 128) to column codes (128, 1). The second rounding adds error: DESIGN "Groups"."""
    return quantize(dequantize(codes, scales, [1, 128], torch.float32), [128, 1], power_of_two)


def transpose_codes(codes: Tensor) -> Tensor:
    """Row-major copy of ``codes``.T; exact. With group (128, 128) the scales transpose along."""
    return codes.view(torch.uint8).t().clone(memory_format=torch.contiguous_format).view(torch.float8_e4m3fn)
