"""Attention over packed sequences, with gradients, and over a paged cache (FlashAttention-2, arXiv 2307.08691;
PagedAttention, arXiv 2309.06180).

A row has one order of operations (csrc/attention/attention.h): on one device its bits are the same in a batch or alone,
in a whole sequence, a piece of it or token by token, from packed keys or from pages.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from eightfold.ops import _library, layouts  # noqa: F401  (the first loads torch.ops.eightfold)
from eightfold.ops.quant import QuantizedTensor

_ops = torch.ops.eightfold


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    starts: Tensor | None = None,
    longest: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    block: int = 1,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v, each sequence by itself; query heads share KV heads in order (heads a multiple of
    kv_heads).

    Args:
        q, k, v: bfloat16, or float32 on the CPU, of one dtype. Packed: [tokens, heads, dim] and [tokens, kv_heads,
            dim], dim contiguous, any other strides; or, without starts, [batch, tokens, heads, dim] likewise, copied
            where batch and tokens make no one dimension. dim: 64, 96 or 128; on the CPU any multiple of 8 from 16 to
            256.
        starts: int32 [sequences + 1], contiguous, rising from 0 to tokens: the first row of each sequence.
        longest: at least the length of every sequence; default: of a batch its tokens, else all tokens. Decides the
            launch on CUDA, no number.
        scale: of the scores, more than 0; default dim ** -0.5.
        causal: a token sees itself and what is before it; else all of its sequence.
        block: with causal, a token sees its block of so many tokens, counted from the sequence's first, and the blocks
            before: key j is seen by query i iff j // block <= i // block. 1 to 2^30; 1 where causal is False.
        return_lse: also returns the natural log-sum-exp of each row's scores, float32 [heads, rows], not
            differentiable.

    Returns a contiguous tensor of q's shape and dtype. Differentiable once in q, k and v; a sequence's gradients do not
    depend on its neighbours, nor on threads. On CUDA the weights and the gradients of scores are rounded to bfloat16
    before they are multiplied. Raises RuntimeError for other dtypes, shapes, devices or layouts and,
    on the CPU, starts that do not rise from 0 to tokens; ValueError for starts beside a batch, or their lack beside
    packed sequences.
    """
    shape = q.shape
    if (starts is None) != (q.ndim == 4):
        expected = "4 dimensions without starts" if starts is None else "3 dimensions with starts"
        raise ValueError(f"attention: q must have {expected}, got shape {list(q.shape)}")
    if starts is None:
        batch, tokens = shape[:2]
        for name, x in (("k", k), ("v", v)):
            if x.ndim != 4 or x.shape[:2] != shape[:2]:
                expected = f"[{batch}, {tokens}, kv_heads, {shape[3]}]"
                raise ValueError(f"attention: {name} must have shape {expected}, got {list(x.shape)}")
        starts = torch.arange(batch + 1, dtype=torch.int32, device=q.device) * tokens
        longest = tokens if longest is None else longest
        q, k, v = (x.reshape(batch * tokens, *x.shape[2:]) for x in (q, k, v))
    longest = q.shape[0] if longest is None else longest
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        out, lse = _Attention.apply(q, k, v, starts, longest, scale, causal, block)
    else:
        out, lse = _ops.attention(q, k, v, starts, longest, scale, causal, block)
    return (out.view(shape), lse) if return_lse else out.view(shape)


def paged_attention(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    longest: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    block: int = 1,
    settled: bool = False,
) -> Tensor:
    """Attention of the last rows of each sequence over its keys, which lie in pages: one row when decoding, many in a
    prefill. The bits are those of ``attention`` over the same keys.

    Args:
        q: bfloat16, or float32 on the CPU, [tokens, heads, dim] as for ``attention``.
        k_pages, v_pages: [page, kv_heads, page_size, dim], contiguous, page_size a multiple of 16 (on CUDA 16, 32, 64
            or a multiple of 128), in q's dtype or float8_e4m3fn. Key i of sequence s is at place i % page_size of page
            pages[s, i // page_size].
        pages: int32 [sequences, most_pages], contiguous; what lies beyond a sequence's length is not read.
        starts: int32 [sequences + 1], rising from 0 to tokens: the first row of q of each sequence.
        lengths: int32 [sequences]: keys of each sequence, those of its rows of q included.
        k_scales, v_scales: float32 [page, kv_heads, page_size], contiguous, with float8_e4m3fn pages alone: a key is
            bfloat16(code * scale).
        longest: at least the rows of q of every sequence; default: tokens. Decides the launch on CUDA, no number.
        scale: of the scores, more than 0; default dim ** -0.5.
        causal, block: as for ``attention``, positions and blocks counted from a sequence's first key.
        settled: a promise, for the step of a decoder: between whatever wrote these arguments and this op some CUDA
            kernel of torch's own ran on the stream; but for q, and the keys and values of q's rows (the last of each
            sequence), which may be new. On CUDA all else is read while the kernels ahead still run. Decides no number.

    Returns a contiguous tensor of q's shape and dtype; it has no gradient. Raises RuntimeError for other dtypes,
    shapes, devices or layouts and, on the CPU, for lengths or page numbers out of range.
    """
    longest = q.shape[0] if longest is None else longest
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = longest, scale, causal, block, settled
    return _ops.paged_attention(q, k_pages, v_pages, k_scales, v_scales, pages, starts, lengths, *options)


def paged_attention_quantize(
    q: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    pages: Tensor,
    starts: Tensor,
    lengths: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
    longest: int | None = None,
    scale: float | None = None,
    causal: bool = True,
    block: int = 1,
    settled: bool = False,
) -> QuantizedTensor:
    """``quantize(paged_attention(...).flatten(1), (1, 128))``, the same bytes: what an FP8 product reads next. The
    arguments are those of ``paged_attention``; q's dim is 128, so that a head is a group.

    Returns codes [tokens, heads * 128] with scales [tokens, heads]; no gradient. Raises RuntimeError as
    ``paged_attention`` does, and for another dim.
    """
    longest = q.shape[0] if longest is None else longest
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    options = longest, scale, causal, block, settled
    cache = k_pages, v_pages, k_scales, v_scales, pages, starts, lengths
    return QuantizedTensor(*_ops.paged_attention_quantize(q, *cache, *options), (1, 128))


def paged_store_(
    k: Tensor,
    v: Tensor,
    k_pages: Tensor,
    v_pages: Tensor,
    slots: Tensor,
    *,
    k_scales: Tensor | None = None,
    v_scales: Tensor | None = None,
) -> None:
    """Writes keys and values into pages, in place: row i to slot slots[i] = page * page_size + place in it.

    Args:
        k, v: bfloat16, or float32 on the CPU, [tokens, kv_heads, dim], dim contiguous, any other strides.
        k_pages, v_pages, k_scales, v_scales: as for ``paged_attention``; into float8_e4m3fn pages a row of a head is
            quantised with one scale, amax / 448.
        slots: int64 [tokens], contiguous, no slot twice; a row with a slot below 0 is written nowhere.

    Raises RuntimeError for other dtypes, shapes, devices or layouts and, on the CPU, for slots out of range.
    """
    _ops.paged_store_(k, v, k_pages, v_pages, k_scales, v_scales, slots)


def paged_next_rows_(
    positions: Tensor, tokens: Tensor, active: Tensor, pages: Tensor, page_size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What a decoding step reads of sequences in pages, made of the newest token of each and its position, which then
    moves on by one, in place, where a sequence is active.

    Args:
        positions: int64 [rows], from 0 on: of the newest token in its text.
        tokens: int64 [rows]: that token.
        active: int32 [rows], 1, or 0 where there is no sequence.
        pages: int32 [rows, most]: as for ``paged_attention``, by ``page_size`` tokens.

    Returns ids int64 [rows], the tokens, 0 for one below 0; positions int64 [rows] as they were; slots int64 [rows] as
    for ``paged_store_``, -1 in a page below 0 and, on CUDA, beyond the pages; lengths int32 [rows] as for
    ``paged_attention``: the keys up to that token, 0 where there is no sequence. Raises RuntimeError for other dtypes,
    shapes, devices or layouts and, on the CPU, for positions beyond the pages.
    """
    return _ops.paged_next_rows_(positions, tokens, active, pages, page_size)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(q, k, v, starts, longest, scale, causal, block):
        return _ops.attention(q, k, v, starts, longest, scale, causal, block)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, starts, *ctx.options = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(q, k, v, *output, starts)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        if grad.stride(-1) != 1 or any(stride % 8 for stride in grad.stride()[:-1]):  # what a kernel cannot read
            grad = grad.contiguous()
        return *_ops.attention_backward(grad, *ctx.saved_tensors, *ctx.options), None, None, None, None, None


@torch.library.register_fake("eightfold::attention")
def _(q, k, v, starts, longest, scale, causal=True, block=1):
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.register_fake("eightfold::attention_backward")
def _(dout, q, k, v, out, lse, starts, longest, scale, causal=True, block=1):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


@torch.library.register_fake("eightfold::paged_attention")
def _(
    q, k_pages, v_pages, k_scales, v_scales, pages, starts, lengths, longest, scale, causal=True, block=1, settled=False
):
    return q.new_empty(q.shape)


@torch.library.register_fake("eightfold::paged_attention_quantize")
def _(q, *args):
    rows, cols = q.shape[0], q.shape[1] * q.shape[2]
    return layouts.empty_codes(rows, cols, (1, 128), q.device), layouts.empty_scales(rows, cols, (1, 128), q.device)


@torch.library.register_fake("eightfold::paged_next_rows_")
def _(positions, tokens, active, pages, page_size):
    return *(torch.empty_like(positions) for _ in range(3)), torch.empty_like(active)


@torch.library.register_fake("eightfold::paged_store_")
def _(*args):
    return None
