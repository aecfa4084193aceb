"""Matrix products. FP8: operands with one scale per 128 of K, sums promoted to float32 every 128 of K.

Source of the scheme: DeepSeek-V3 (arXiv 2412.19437, section 3.3.2). An output element depends on its own row of ``a``
and row of ``b`` only, to the last bit: not on the number of rows, on the rows around it, on threads or on the run.
``gemm`` promises the same for bfloat16 and float32.
"""

import torch
from torch import Tensor

from eightfold.ops import _library
from eightfold.ops.quant import QuantizedTensor

_ops = torch.ops.eightfold
_fp8_gemm = _library.direct("fp8_gemm")


def product(a, a_scales, b, b_scales, b_group_rows=128, bias=None, out_dtype=torch.bfloat16, settled=False) -> Tensor:
    """torch.ops.eightfold.fp8_gemm without arguments at their defaults: each that is no tensor costs 0.5 us a call."""
    if settled:
        return _fp8_gemm(a, a_scales, b, b_scales, b_group_rows, bias, out_dtype, True)
    if b_group_rows == 128 and out_dtype is torch.bfloat16:
        if bias is None:
            return _fp8_gemm(a, a_scales, b, b_scales)
        return _fp8_gemm(a, a_scales, b, b_scales, 128, bias)
    if bias is None and out_dtype is torch.bfloat16:
        return _fp8_gemm(a, a_scales, b, b_scales, b_group_rows)
    return _fp8_gemm(a, a_scales, b, b_scales, b_group_rows, bias, out_dtype)


def _check_groups(op: str, a: QuantizedTensor, b: QuantizedTensor) -> None:
    if a.group != (1, 128):
        raise ValueError(f"{op}: a.group must be (1, 128), got {a.group}")
    if b.group not in ((128, 128), (1, 128)):
        raise ValueError(f"{op}: b.group must be (128, 128) or (1, 128), got {b.group}")


def fp8_gemm(
    a: QuantizedTensor,
    b: QuantizedTensor,
    bias: Tensor | None = None,
    out_dtype: torch.dtype = torch.bfloat16,
    settled: bool = False,
) -> Tensor:
    """``a`` [M, K] @ ``b`` [N, K]^T (+ ``bias`` [N]) -> [M, N] in ``out_dtype``, rounded once.

    Args:
        a: group (1, 128); any M. ``quantize(x, (1, 128))``, or ``cols.t()`` of a cast in groups (128, 1).
        b: group (128, 128), N a multiple of 16 (a weight), or (1, 128), any N. Rows of the codes of ``a`` and ``b``
            start at multiples of 16 bytes, so K is a multiple of 16 unless they are transposed column codes.
        bias: bfloat16 or float32 [N], added in float32.
        out_dtype: torch.bfloat16 or torch.float32.
        settled: a promise: ``b`` was written before the last CUDA kernel of torch's own on the stream, or before the
            CUDA graph that this is a part of. A product of few rows then reads ``b`` while the kernels ahead still
            run. Decides no number.

    The gradient's products: dX = ``fp8_gemm(dy_rows, transpose(w))``; dW = ``fp8_gemm(dy_cols.t(), x_cols.t())``.
    Relative (Frobenius) error against the exact product of the operands, float32 out: below 1e-5 on CPUs.
    Raises ValueError for another group, RuntimeError for sizes, dtypes, layouts or devices that do not fit.
    """
    _check_groups("fp8_gemm", a, b)
    return product(a.codes, a.scales, b.codes, b.scales, b.group[0], bias, out_dtype, settled)


def fp8_gemm_accumulate_(out: Tensor, a: QuantizedTensor, b: QuantizedTensor) -> Tensor:
    """``out`` [M, N], contiguous, += ``a`` [M, K] @ ``b`` [N, K]^T; returns ``out``.

    The product is added once, in float32, and the sum rounded once to the dtype of ``out``: float32, or, with ``b`` in
    groups (1, 128), bfloat16. Operands and errors as in ``fp8_gemm``; a weight gradient summed over micro-batches is
    ``fp8_gemm_accumulate_(grad, dy_cols.t(), x_cols.t())``.
    """
    _check_groups("fp8_gemm_accumulate_", a, b)
    _ops.fp8_gemm_accumulate_(out, a.codes, a.scales, b.codes, b.scales, b.group[0])
    return out


def gemm_plan(m: int, n: int, k: int, *, b_group_rows: int = 128, sm_count: int | None = None) -> dict[str, int | str]:
    """How the Hopper kernels split ``fp8_gemm`` of [m, k] by [n, k]: a function of the arguments alone.

    Args:
        m, n, k: sizes, from 1 on.
        b_group_rows: 128 for b in groups (128, 128), 1 for (1, 128).
        sm_count: multiprocessors; default: those of the current CUDA device, or an H100's 132 where there is none.

    Returns {"kernel", "tile_m", "tile_n", "tiles_m", "tiles_n", "grid", "waves"}: which kernel ("small": up to 128 rows
    of a; "pairs": large tiles, two blocks share an operand; "tiles": small tiles), the rows of a and of b in a tile,
    tiles along each side, blocks launched, tiles of the busiest block. A plan moves time only: the bits of a result do
    not depend on it. Raises ValueError for a size or group out of range.
    """
    from eightfold import _C  # the Python-version-specific half, not needed to run an op

    if sm_count is None:
        cuda = torch.cuda.is_available()
        sm_count = torch.cuda.get_device_properties().multi_processor_count if cuda else 132
    return _C.gemm_plan(m, n, k, b_group_rows, sm_count)


def gemm(a: Tensor, b: Tensor, out_dtype: torch.dtype = torch.float32) -> Tensor:
    """``a`` [M, K] @ ``b`` [N, K]^T -> [M, N] in ``out_dtype``, accumulated in float32 and rounded once.

    Args:
        a, b: both bfloat16, or both float32 (CPU only); last dimension contiguous, rows at multiples of 16 bytes. Any
            M; N and K are multiples of 8.
        out_dtype: torch.float32 or torch.bfloat16.

    A row has the same bits whatever rows stand beside it, and for any number of threads: a head that scores one token
    while it generates, and thousands while it trains, gives each token the same logits. No gradient: whoever calls it
    in training writes the backward.
    Raises RuntimeError for dtypes, sizes, layouts or devices that do not fit.
    """
    return _ops.gemm(a, b, out_dtype)


@torch.library.register_fake("eightfold::fp8_gemm")
def _(a, a_scales, b, b_scales, b_group_rows=128, bias=None, out_dtype=torch.bfloat16, settled=False):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)


@torch.library.register_fake("eightfold::fp8_gemm_accumulate_")
def _(out, a, a_scales, b, b_scales, b_group_rows=128):
    return None


@torch.library.register_fake("eightfold::gemm")
def _(a, b, out_dtype=torch.float32):
    return a.new_empty((a.shape[0], b.shape[0]), dtype=out_dtype)
