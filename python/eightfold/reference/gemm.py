"""Matrix products in plain torch. FP8: blocks of 128 along K in turn, each promoted to float32 with its scales."""

import torch
from torch import Tensor


def _product(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, b_group_rows: int, dtype: torch.dtype) -> Tensor:
    """a @ b^T in ``dtype``; row i of the result depends on row i of ``a`` only up to rounding inside a block."""
    (rows, depth), cols = a.shape, b.shape[0]
    out = torch.zeros(rows, cols, dtype=dtype, device=a.device)
    for block, start in enumerate(range(0, depth, 128)):
        a_block = a[:, start : start + 128].to(dtype)
        b_block = b[:, start : start + 128].to(dtype)
        b_scale = b_scales[:, block].repeat_interleave(b_group_rows)[:cols]
        scale = a_scales[:, block, None].to(dtype) * b_scale[None, :].to(dtype)
        out += (a_block @ b_block.t()) * scale
    return out


def fp8_gemm(
    a: Tensor,
    a_scales: Tensor,
    b: Tensor,
    b_scales: Tensor,
    b_group_rows: int = 128,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    settled: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """``a`` [M, K] @ ``b`` [N, K]^T (+ ``bias`` [N]), rounded once to ``out_dtype``. settled decides no number.

    ``a_scales`` is [M, ceil(K/128)]; ``b_scales`` is [ceil(N/b_group_rows), ceil(K/128)]. The operator computes in
    float32; ``compute_dtype=torch.float64`` gives the value that errors are measured against.
    """
    out = _product(a, a_scales, b, b_scales, b_group_rows, compute_dtype)
    if bias is not None:
        out += bias.to(compute_dtype)
    return out.to(out_dtype)


def fp8_gemm_accumulate_(
    out: Tensor, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, b_group_rows: int = 128
) -> None:
    """``out`` [M, N] float32 or bfloat16 += ``a`` @ ``b``^T, added in float32 and rounded once."""
    out.copy_(out.float() + _product(a, a_scales, b, b_scales, b_group_rows, torch.float32))


def gemm(
    a: Tensor, b: Tensor, out_dtype: torch.dtype = torch.float32, compute_dtype: torch.dtype = torch.float32
) -> Tensor:
    """``a`` [M, K] @ ``b`` [N, K]^T, rounded once to ``out_dtype``: row by row, so that a row's bits are its own."""
    weight = b.to(compute_dtype)
    out = torch.empty(a.shape[0], b.shape[0], dtype=compute_dtype, device=a.device)
    for i, row in enumerate(a.to(compute_dtype)):
        out[i] = weight @ row
    return out.to(out_dtype)
