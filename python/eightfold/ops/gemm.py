"""The FP8 matrix product: operands with one scale per 128 of K, sums promoted to float32 every 128 of K.

Source of the scheme: DeepSeek-V3 (arXiv 2412.19437, section 3.3.2). An output element depends on its own row of ``a``
and row of ``b`` only, to the last bit: not on the number of rows, on the rows around it, on threads or on the run.
"""

import torch
from torch import Tensor

from eightfold.ops import _library  # noqa: F401  (loads torch.ops.eightfold)
from eightfold.ops.quant import QuantizedTensor

_ops = torch.ops.eightfold


def _check_groups(op: str, a: QuantizedTensor, b: QuantizedTensor) -> None:
    if a.group != (1, 128):
        raise ValueError(f"{op}: a.group must be (1, 128), got {a.group}")
    if b.group not in ((128, 128), (1, 128)):
        raise ValueError(f"{op}: b.group must be (128, 128) or (1, 128), got {b.group}")


def fp8_gemm(
    a: QuantizedTensor, b: QuantizedTensor, bias: Tensor | None = None, out_dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """``a`` [M, K] @ ``b`` [N, K]^T (+ ``bias`` [N]) -> [M, N] in ``out_dtype``, rounded once.

    Args:
        a: group (1, 128); any M. ``quantize(x, (1, 128))``, or ``cols.t()`` of a cast in groups (128, 1).
        b: group (128, 128), N a multiple of 16 (a weight), or (1, 128), any N. Rows of the codes of ``a`` and ``b``
            start at multiples of 16 bytes, so K is a multiple of 16 unless they are transposed column codes.
        bias: bfloat16 or float32 [N], added in float32.
        out_dtype: torch.bfloat16 or torch.float32.

    The gradient's products: dX = ``fp8_gemm(dy_rows, transpose(w))``; dW = ``fp8_gemm(dy_cols.t(), x_cols.t())``.
    Relative (Frobenius) error against the exact product of the operands, float32 out: below 1e-5 on CPUs.
    Raises ValueError for another group, RuntimeError for sizes, dtypes, layouts or devices that do not fit.
    """
    _check_groups("fp8_gemm", a, b)
    return _ops.fp8_gemm(a.codes, a.scales, b.codes, b.scales, b.group[0], bias, out_dtype)


def fp8_gemm_accumulate_(out: Tensor, a: QuantizedTensor, b: QuantizedTensor) -> Tensor:
    """``out`` [M, N] float32, contiguous, += ``a`` [M, K] @ ``b`` [N, K]^T, added once in float32; returns ``out``.

    Operands and errors as in ``fp8_gemm``; a weight gradient summed over micro-batches is
    ``fp8_gemm_accumulate_(grad, dy_cols.t(), x_cols.t())``.
    """
    _check_groups("fp8_gemm_accumulate_", a, b)
    _ops.fp8_gemm_accumulate_(out, a.codes, a.scales, b.codes, b.scales, b.group[0])
    return out


@torch.library.register_fake("eightfold::fp8_gemm")
def _(a, a_scales, b, b_scales, b_group_rows, bias, out_dtype):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@torch.library.register_fake("eightfold::fp8_gemm_accumulate_")
def _(out, a, a_scales, b, b_scales, b_group_rows):
    return None
