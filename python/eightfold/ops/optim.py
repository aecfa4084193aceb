"""8-bit optimizer states: AdamW over moments with dynamic range expansion, CAME over a first moment in bytes.

With dynamic range expansion a state is three tensors: ``codes`` (float8_e4m3fn, shape of the parameter), ``maxima``
(float32) and ``exponents`` (uint8), the last two [rows, ceil(row_length / 128)]. Groups are 128 consecutive elements of
one row and restart at each row, so they do not depend on how rows are spread over processes. 1 + 5/128 = 1.039 bytes an
element for rows that are multiples of 128.

Sources: COAT (arXiv 2410.19313), section 4, in the form of csrc/optim/dre.h; CAME (arXiv 2307.02047), its first moment
in bytes as in SANA-1.5 (arXiv 2501.18427), with blocks of 2,048 elements.
"""

import torch
from torch import Tensor

from eightfold.ops import _library  # noqa: F401
from eightfold.ops.layouts import CODES, ceil_div

GROUP = 128
CAME_BLOCK = 2048  # elements of CAME's first moment that share a scale and a minimum


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


def came8bit_(
    params: list[Tensor],
    grads: list[Tensor],
    m: list[Tensor],
    m_scales: list[Tensor],
    v_rows: list[Tensor],
    v_cols: list[Tensor],
    u_rows: list[Tensor],
    u_cols: list[Tensor],
    offsets: list[int],
    steps: list[Tensor],
    lr: Tensor,
    grad_scale: Tensor | None = None,
    *,
    beta1: float = 0.9,
    beta2: float = 0.999,
    beta3: float = 0.9999,
    eps1: float = 1e-30,
    eps2: float = 1e-16,
    clip_threshold: float = 1.0,
    weight_decay: float = 0.0,
    seed: int = 0,
) -> None:
    """One CAME step over many tensors, in place; csrc/optim/came8bit.h has the formulas. There is no bias correction.

    Every list has one entry for each parameter; all tensors are contiguous and on one device. Empty parameters are
    skipped. A parameter with ``v_cols`` is a matrix of [v_rows, v_cols] elements, any other keeps its whole second
    moment. The step uses the fresh float32 first moment, then it is stored.

    A gradient with a NaN or Inf (of a matrix also one whose square overflows) makes the parameter, m, u_rows and u_cols
    of the whole tensor NaN (a block of 8-bit m has a NaN scale and minimum): the mean of v_rows and the clipping need
    all of it. In other tensors a square that overflows leaves an infinite v, and that element stays where it is.

    Args:
        params: float32, or bfloat16, rounded stochastically.
        grads: float32 or bfloat16, as many elements.
        m: first moments, float32 or (matrices only) uint8.
        m_scales: of uint8 m float32 [ceil(numel / 2048), 2]: scale and minimum of 2,048 consecutive elements, which
            are code * scale + minimum. A block of one value has scale 0. Of float32 m without elements.
        v_rows, v_cols: float32 decayed means of g^2 + eps1 over each row and each column; without v_cols, v_rows is the
            decayed g^2 + eps1 of each element.
        u_rows, u_cols: float32 decayed means of (w - m)^2 + eps2, w being the clipped update; without v_cols no
            elements.
        offsets: place of each parameter's first element in the stream of random bits (as in ``adamw_dre_``).
        steps: float32 tensors of one element, which key the random bits.
        lr, grad_scale: float32 tensors of one element; gradients are multiplied by ``grad_scale``.
        beta1, beta2, beta3: decay of m, v and u.
        eps1, eps2: added to g^2 and to (w - m)^2; at least 1e-36.
        clip_threshold: root mean square of w above which w is scaled down to it; at least 1e-36.
        weight_decay: decoupled, p *= 1 - lr * weight_decay.
        seed: key of the Philox random bits.

    Raises:
        RuntimeError: lists of different lengths; wrong dtype, size, stride or device of an entry; an option out of
            range.
    """
    torch.ops.eightfold.came8bit_(
        params,
        grads,
        m,
        m_scales,
        v_rows,
        v_cols,
        u_rows,
        u_cols,
        offsets,
        steps,
        lr,
        grad_scale,
        beta1,
        beta2,
        beta3,
        eps1,
        eps2,
        clip_threshold,
        weight_decay,
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


@torch.library.register_fake("eightfold::came8bit_")
def _(*args):
    return None
