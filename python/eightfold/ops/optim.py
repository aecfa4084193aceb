"""8-bit optimizer states with dynamic range expansion, and AdamW over them.

A state is three tensors: ``codes`` (float8_e4m3fn, shape of the parameter), ``maxima`` (float32) and ``exponents``
(uint8), the last two [rows, ceil(row_length / 128)]. Groups are 128 consecutive elements of one row and restart at each
row, so they do not depend on how rows are spread over processes. 1 + 5/128 = 1.039 bytes an element for rows that are
multiples of 128.

Source: COAT (arXiv 2410.19313), section 4, in the form of csrc/optim/dre.h.
"""

import torch
from torch import Tensor

from eightfold.ops import _library  # noqa: F401
from eightfold.ops.layouts import CODES, ceil_div

GROUP = 128


def _row_length(x: Tensor, row_length: int | None) -> int:
    if row_length is not None:
        return row_length
    return max(x[:1].numel() if x.ndim and x.shape[0] else x.shape[1:].numel() if x.ndim else 1, 1)


def dre_quantize(x: Tensor, row_length: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """``x`` in E4M3 with each group of 128 stretched over the format's range: code = RNE(448 (|x| / max)^k), sign of x.

    Args:
        x: float32 or bfloat16, contiguous, any shape.
        row_length: elements of a row; must divide ``x.numel()``. Default: ``x.numel() / x.size(0)``.

    Returns:
        codes (float8_e4m3fn, shape of x), maxima (float32 [rows, ceil(row_length / 128)]) and exponents (uint8,
        likewise, 16 k - 1 with k in [1/16, 16]). Non-zero elements never get code 0. A group with a NaN or Inf has a
        NaN maximum.

    Raises:
        RuntimeError: wrong dtype, non-contiguous x, or a row_length that does not divide its elements.
    """
    return torch.ops.eightfold.dre_quantize(x, _row_length(x, row_length))


def dre_dequantize(codes: Tensor, maxima: Tensor, exponents: Tensor, row_length: int | None = None) -> Tensor:
    """The float32 values of a state: sign(code) max (|code| / 448)^(1/k), shape of ``codes``.

    Raises:
        RuntimeError: wrong dtype, shape, device or stride of an argument.
    """
    return torch.ops.eightfold.dre_dequantize(codes, maxima, exponents, _row_length(codes, row_length))


def adamw_dre_(
    params: list[Tensor],
    grads: list[Tensor],
    masters: list[Tensor],
    m_codes: list[Tensor],
    m_maxima: list[Tensor],
    m_exponents: list[Tensor],
    v_codes: list[Tensor],
    v_maxima: list[Tensor],
    v_exponents: list[Tensor],
    row_lengths: list[int],
    offsets: list[int],
    steps: list[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None = None,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    stochastic_states: bool = False,
    seed: int = 0,
) -> None:
    """One AdamW step over many tensors, in place, with the fresh float32 moments; then these are stored in 8 bits.

    Every list has one entry for each parameter; all tensors are contiguous and on one device. Empty parameters are
    skipped.

    Args:
        params: float32 or bfloat16. bfloat16 without a master is rounded stochastically.
        grads: float32 or bfloat16, as many elements.
        masters: float32 copies of the parameters, or tensors without elements. With a master the parameter is its
            rounding.
        m_codes, m_maxima, m_exponents, v_codes, v_maxima, v_exponents: the states, as ``dre_quantize`` returns them.
        row_lengths: elements of a row of each parameter; groups restart at each row.
        offsets: place of each parameter's first element in the random stream. A shard passes the place of its first
            element, so the random bits do not depend on the sharding; ranges of different parameters should not
            overlap.
        steps: float32 tensors of one element that already count this step (1, 2, ...).
        lr, grad_scale: float32 tensors of one element; gradients are multiplied by ``grad_scale``.
        beta1, beta2, eps, weight_decay: as in torch.optim.AdamW.
        stochastic_states: round states stochastically (unbiased in value) instead of to nearest.
        seed: key of the Philox random bits.

    Raises:
        RuntimeError: lists of different lengths; wrong dtype, size, stride or device of an entry; betas outside [0, 1).
    """
    torch.ops.eightfold.adamw_dre_(
        params,
        grads,
        masters,
        m_codes,
        m_maxima,
        m_exponents,
        v_codes,
        v_maxima,
        v_exponents,
        row_lengths,
        offsets,
        steps,
        lr,
        grad_scale,
        beta1,
        beta2,
        eps,
        weight_decay,
        stochastic_states,
        seed,
    )


@torch.library.register_fake("eightfold::dre_quantize")
def _(x, row_length):
    shape = (x.numel() // row_length, ceil_div(row_length, GROUP))
    codes = torch.empty(x.shape, dtype=CODES, device=x.device)
    return codes, x.new_empty(shape, dtype=torch.float32), x.new_empty(shape, dtype=torch.uint8)


@torch.library.register_fake("eightfold::dre_dequantize")
def _(codes, maxima, exponents, row_length):
    return torch.empty(codes.shape, dtype=torch.float32, device=codes.device)


@torch.library.register_fake("eightfold::adamw_dre_")
def _(*args):
    return None
