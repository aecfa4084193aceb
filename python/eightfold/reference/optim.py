"""Optimizers over 8-bit states in plain torch: AdamW with dynamic range expansion (csrc/optim/dre.h), and CAME.

Powers are taken in float64. Group maxima and exponents match the CPU and CUDA kernels bit for bit; a code may differ
where the expanded value lies within 1e-4 (relative) of a rounding boundary.
"""

import math

import torch
from torch import Tensor

from eightfold.reference.quant import E4M3_MAX, to_e4m3

GROUP = 128
BOUND_LOG2 = 16.222392421336448  # log2(448 / (3 2^-9))
TOP_LOG2 = 16.807354922057604  # log2(448 / (2 2^-9))
TINY = 2.0**-9  # smallest positive E4M3 value
SMALLEST = 2.0**-149  # smallest positive float32


def _to_groups(x: Tensor, row_length: int) -> Tensor:
    """[rows, groups, 128], the tail of each row padded with zeros."""
    rows = x.reshape(-1, row_length)
    return torch.nn.functional.pad(rows, (0, -row_length % GROUP)).view(rows.shape[0], -1, GROUP)


def _from_groups(groups: Tensor, row_length: int, shape: torch.Size) -> Tensor:
    return groups.flatten(1)[:, :row_length].reshape(shape)


def range_exponents(maximum: Tensor, minimum: Tensor) -> Tensor:
    """16 k - 1 (uint8) of groups with these largest and smallest non-zero magnitudes; 255 (k = 16) where they are 0.

    k = log2(76458.7) / log2(maximum / minimum) to the nearest 1/16 with (maximum / minimum)^k <= 114688,
    in [1/16, 16]; float32 without fused multiply-add, so that every implementation gets the same integer.
    """
    some = maximum > 0
    (top, top_exponent), (low, low_exponent) = (
        torch.frexp(torch.where(some, x, 1.0).double()) for x in (maximum, minimum)
    )
    ratio = (2 * top).float() / (2 * low).float()
    s = (ratio - 1) / (ratio + 1)
    z = s * s
    series = torch.full_like(z, 1 / 11)
    for term in (1 / 9, 1 / 7, 1 / 5, 1 / 3, 1.0):
        series = series * z + term
    log2_range = (top_exponent - low_exponent).float() + series * s * (2 / math.log(2))
    log2_range = log2_range.clamp(min=1)
    nearest, highest = (torch.full_like(z, 16 * bound) / log2_range for bound in (BOUND_LOG2, TOP_LOG2))
    k16 = torch.minimum(nearest + 0.5, highest).floor().clamp(1, 256)
    return torch.where(some, k16 - 1, 255).to(torch.uint8)


def _decode(codes: Tensor, maxima: Tensor, exponents: Tensor) -> Tensor:
    """Values (float32) of grouped codes [..., 128]."""
    values = codes.float().double()
    power = 16 / (exponents.double() + 1)
    x = maxima.double()[..., None] * (values.abs() / E4M3_MAX) ** power[..., None]
    x = torch.where(values == 0, 0.0, x.clamp(min=SMALLEST)).copysign(values).float()
    return torch.where(maxima.isnan()[..., None], torch.nan, x)


def _expand(x: Tensor, maxima: Tensor, exponents: Tensor) -> Tensor:
    """448 (|x| / M)^k in float64, at least the smallest code's value unless x is 0."""
    k = (exponents.double() + 1) / 16
    safe = torch.where(maxima > 0, maxima, 1.0).double()[..., None]
    y = E4M3_MAX * (x.abs().double() / safe) ** k[..., None]
    return torch.where(x == 0, 0.0, y.clamp(TINY, E4M3_MAX))


def _scales(x: Tensor) -> tuple[Tensor, Tensor]:
    magnitude = x.abs()
    maxima = magnitude.amax(-1)
    minima = torch.where(magnitude == 0, math.inf, magnitude).amin(-1)
    broken = ~torch.isfinite(maxima)
    exponents = range_exponents(torch.where(broken, 0.0, maxima), torch.where(broken, 0.0, minima))
    return torch.where(broken, torch.nan, maxima), exponents


def _encode(x: Tensor, random: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, maxima and exponents of grouped values [rows, groups, 128]; ``random``: 16 bits an element, or None."""
    maxima, exponents = _scales(x)
    y = _expand(x, maxima, exponents)
    codes = to_e4m3(y.float()).view(torch.uint8)
    if random is not None:
        nearest = codes.view(torch.float8_e4m3fn).double()
        low = (codes.int() - (nearest > y).int()).clamp(min=0)
        high = (low + 1).clamp(max=0x7E)
        a, b = (_decode(c.to(torch.uint8).view(torch.float8_e4m3fn), maxima, exponents) for c in (low, high))
        up = x.abs() - a > (random.float() + 0.5) / 65536 * (b - a)
        codes = torch.where(x == 0, 0, torch.where(up, high, low)).to(torch.uint8)
    codes = codes | torch.signbit(x).to(torch.uint8) << 7
    codes = torch.where(maxima.isnan()[..., None], 0x7F, codes.int()).to(torch.uint8)
    return codes.view(torch.float8_e4m3fn), maxima, exponents


def dre_quantize(x: Tensor, row_length: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (E4M3, shape of x), maxima (float32) and exponents (uint8, 16 k - 1), both [rows, groups per row]."""
    codes, maxima, exponents = _encode(_to_groups(x.float(), row_length), None)
    flat = _from_groups(codes.view(torch.uint8), row_length, x.shape).view(torch.float8_e4m3fn)
    return flat.contiguous(), maxima, exponents


def dre_dequantize(codes: Tensor, maxima: Tensor, exponents: Tensor, row_length: int) -> Tensor:
    """float32 values of ``codes``; a group with NaN maximum is NaN."""
    groups = _to_groups(codes.contiguous().view(torch.uint8), row_length).view(torch.float8_e4m3fn)
    return _from_groups(_decode(groups, maxima, exponents), row_length, codes.shape).contiguous()


def philox4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> list[Tensor]:
    """Philox4x32-10: four words (int64 tensors in [0, 2^32)) of four counter words and a 64-bit key."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & mask, seed >> 32 & mask
    for _ in range(10):
        # int64 products wrap, but their low 64 bits are those of the unsigned product
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (b >> 32 & mask) ^ c1 ^ k0, b & mask, (a >> 32 & mask) ^ c3 ^ k1, a & mask
        k0, k1 = k0 + 0x9E3779B9 & mask, k1 + 0xBB67AE85 & mask
    return [c0, c1, c2, c3]


def random_words(offset: int, numel: int, step: int, purpose: int, seed: int, device: torch.device) -> Tensor:
    """Random bits (int64) for elements offset .. offset + numel.

    Purpose 0 rounds parameters: 16 bits, eight elements to a Philox block, the even one in the low half of its word.
    Purpose 1 rounds states: 32 bits, four elements to a block (bits 0-15 for m, 16-31 for v).
    """
    index = torch.arange(offset, offset + numel, dtype=torch.int64, device=device)
    block = index >> (3 if purpose == 0 else 2)
    counter = (
        block & 0xFFFFFFFF,
        block >> 32,
        torch.full_like(block, step),
        torch.full_like(block, purpose),
    )
    words = torch.stack(philox4x32(counter, seed))
    if purpose == 0:
        return words.gather(0, (index >> 1 & 3)[None])[0] >> 16 * (index & 1) & 0xFFFF
    return words.gather(0, (index & 3)[None])[0]


def to_bf16_stochastic(x: Tensor, random: Tensor) -> Tensor:
    """bfloat16 from float32, up with probability (distance to the lower neighbour) / spacing; 16 random bits each."""
    bits = x.view(torch.int32).long() + (random & 0xFFFF)
    rounded = (bits & 0xFFFF0000).to(torch.int32).view(torch.float32)
    return torch.where(torch.isfinite(x), rounded, x).to(torch.bfloat16)


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
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    stochastic_states: bool,
    seed: int,
) -> None:
    """One AdamW step, in place, over lists of tensors: eightfold.ops.optim.adamw_dre_ says what each argument is."""
    for i, param in enumerate(params):
        if param.numel() == 0:
            continue
        length, step = row_lengths[i], float(steps[i])
        m = dre_dequantize(m_codes[i], m_maxima[i], m_exponents[i], length).view(param.shape)
        v = dre_dequantize(v_codes[i], v_maxima[i], v_exponents[i], length).view(param.shape)
        g = grads[i].float() * (1.0 if grad_scale is None else grad_scale)
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        p = masters[i] if masters[i].numel() else param.float()
        denominator = v.sqrt() / math.sqrt(1 - beta2**step) + eps
        p = p * (1 - lr * weight_decay) - lr / (1 - beta1**step) * m / denominator
        if masters[i].numel():
            masters[i].copy_(p)
        elif param.dtype == torch.bfloat16:
            p = to_bf16_stochastic(p, random_words(offsets[i], p.numel(), int(step), 0, seed, p.device).view(p.shape))
        param.copy_(p)

        random = None
        if stochastic_states:
            random = _to_groups(random_words(offsets[i], p.numel(), int(step), 1, seed, p.device), length)
        for x, shift, codes, maxima, exponents in (
            (m, 0, m_codes[i], m_maxima[i], m_exponents[i]),
            (v, 16, v_codes[i], v_maxima[i], v_exponents[i]),
        ):
            bits = None if random is None else random >> shift & 0xFFFF
            new_codes, new_maxima, new_exponents = _encode(_to_groups(x, length), bits)
            codes.view(torch.uint8).copy_(_from_groups(new_codes.view(torch.uint8), length, codes.shape))
            maxima.copy_(new_maxima.view(maxima.shape))
            exponents.copy_(new_exponents.view(exponents.shape))


CAME_BLOCK = 2048  # elements of m that share a scale and a minimum
SMALLEST_NORMAL = 2.0**-126


def affine_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (uint8, shape of x) and [blocks, 2] (float32: scale, minimum) of blocks of 2,048 consecutive elements.

    scale = (maximum - minimum) / 255, or 0 where that is below 2^-126; code = RNE((x - minimum) (1 / scale)), 0 with
    scale 0. A block with a NaN or Inf has a NaN scale and minimum.
    """
    flat = x.float().flatten()
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % CAME_BLOCK)).view(-1, CAME_BLOCK)
    inside = (torch.arange(blocks.numel(), device=x.device) < flat.numel()).view(blocks.shape)
    low = torch.where(inside, blocks, math.inf).amin(1)
    high = torch.where(inside, blocks, -math.inf).amax(1)
    scale = (high - low) / 255
    broken = ~(scale.isfinite() & low.isfinite())
    scale = torch.where(broken, torch.nan, torch.where(scale < SMALLEST_NORMAL, 0.0, scale))
    inverse = torch.where(scale > 0, 1 / scale, 0.0)
    codes = ((blocks - low[:, None]) * inverse[:, None]).round().nan_to_num(0.0)
    codes = codes.to(torch.uint8).flatten()[: flat.numel()].view(x.shape)
    return codes, torch.stack((scale, torch.where(broken, torch.nan, low)), 1)


def affine_dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """float32 values code * scale + minimum, shape of ``codes``."""
    scale, low = scales.repeat_interleave(CAME_BLOCK, 0)[: codes.numel()].view(*codes.shape, 2).unbind(-1)
    return codes.float() * scale + low


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
    grad_scale: Tensor | None,
    beta1: float,
    beta2: float,
    beta3: float,
    eps1: float,
    eps2: float,
    clip_threshold: float,
    weight_decay: float,
    seed: int,
) -> None:
    """One CAME step, in place, over lists of tensors: eightfold.ops.optim.came8bit_ says what each argument is."""

    def decayed(mean: Tensor, beta: float, values: Tensor) -> Tensor:
        return mean.copy_(beta * mean + (1 - beta) * values)

    for i, param in enumerate(params):
        if param.numel() == 0:
            continue
        g = grads[i].float() * (1.0 if grad_scale is None else grad_scale)
        factored = v_cols[i].numel() > 0
        if factored:
            g = g.reshape(v_rows[i].numel(), v_cols[i].numel())
        squares = g * g + eps1
        if factored:
            rows = decayed(v_rows[i], beta2, squares.mean(1).view_as(v_rows[i])).view(-1, 1)
            cols = decayed(v_cols[i], beta2, squares.mean(0).view_as(v_cols[i])).view(1, -1)
            w = g * (rows / rows.mean()).rsqrt() * cols.rsqrt()
        else:
            w = g * decayed(v_rows[i], beta2, squares.view_as(v_rows[i])).view_as(g).rsqrt()
        w = w / (w.square().mean().sqrt() / clip_threshold).clamp(min=1.0)

        quantized = m[i].dtype == torch.uint8
        moment = affine_dequantize(m[i], m_scales[i]) if quantized else m[i]
        moment = beta1 * moment.view_as(w) + (1 - beta1) * w
        step = moment
        if factored:
            instability = (w - moment).square() + eps2
            rows = decayed(u_rows[i], beta3, instability.mean(1).view_as(u_rows[i])).view(-1, 1)
            cols = decayed(u_cols[i], beta3, instability.mean(0).view_as(u_cols[i])).view(1, -1)
            step = moment * (rows / rows.mean()).rsqrt() * cols.rsqrt()

        p = param.float() * (1 - lr * weight_decay) - lr * step.view_as(param)
        if param.dtype == torch.bfloat16:
            random = random_words(offsets[i], p.numel(), int(steps[i]), 0, seed, p.device).view(p.shape)
            p = to_bf16_stochastic(p, random)
        param.copy_(p)
        if quantized:
            codes, scales = affine_quantize(moment)
            m[i].copy_(codes.view_as(m[i]))
            m_scales[i].copy_(scales)
        else:
            m[i].copy_(moment.view_as(m[i]))
