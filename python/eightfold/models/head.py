"""The language-model head: fp32 logits from low-precision operands, a loss that never holds all logits, and
log-probabilities of tokens whose bits depend on their own row alone.

A head's weight may come with its (128, 128) codes and scales (`Codes`): then the logits are an FP8 product of the rows
and those codes, and the gradients are FP8 products as a linear layer's are (`nn._products`).
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable

from eightfold.nn._accumulation import kept, sums_so_far
from eightfold.nn._products import weight_gradient
from eightfold.ops.layouts import round_up
from eightfold.ops.loss import IGNORED_LABEL as IGNORE

ops = torch.ops.eightfold
Codes = tuple[torch.Tensor, torch.Tensor]

# Chunks cost memory; each adds a read and a write of the weight's fp32 gradient, a tenth of its products' time at 3,000
# tokens.
_CHUNK_LOGITS, _LEAST_TOKENS = 1 << 26, 1024


def _operand(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x rounded to `dtype`, in the form in which this device multiplies it into fp32: widened on the CPU."""
    return x.to(dtype) if x.device.type == "cuda" else x.to(dtype).float()


def _matmul(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """fp32 a [M, K] @ b [K, N] of two operands."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _fp8_logits(hidden: torch.Tensor, codes: Codes) -> torch.Tensor:
    return ops.fp8_gemm(*ops.quantize(hidden.contiguous(), [1, 128]), *codes, 128, None, torch.float32)


def _add_product(total: torch.Tensor | None, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """a @ b of two operands in fp32, or None: added to `total`, if there is one, rounded to its dtype. cuBLAS rounds a
    product before it adds it to bf16, as torch's own sums of gradients do."""
    if total is None:
        return _matmul(a, b)
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.dtype == torch.float32:
        total.add_(a @ b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    return None


class _Gradients:
    """Makes a head's gradients from those of logits, chunk by chunk: products of operands of `dtype`, or of codes in
    FP8. The weight's is added to `total`, a tensor of either dtype, if given. `tokens`: of all chunks.

    Without a total the weight's is added up in fp32: each chunk reads and writes 4 bytes an element. With one, chunks'
    operands wait for each other, as long as they take no more memory than such a sum, and are one product."""

    def __init__(self, weight, codes: Codes | None, dtype: torch.dtype, need, tokens: int, total=None):
        self._dtype, (self._need_hidden, self._need_weight) = dtype, need
        self._operand: tuple[torch.Tensor, ...] = ()
        if self._need_hidden and codes is None:
            self._operand = (_operand(weight, dtype),)
        elif self._need_hidden:
            self._operand = ops.transpose_codes(codes[0]), codes[1].t().contiguous()
        self._fp8, self._total, self._sum = codes is not None, total, None
        held = torch.float8_e4m3fn if self._fp8 else dtype
        self._room = 0 if total is None else min(tokens, 4 * weight.shape[1] // held.itemsize)  # for tokens that wait
        self._logits: torch.Tensor | None = None  # their gradients: column codes, or rows of `dtype`
        self._waiting: list[tuple[torch.Tensor, torch.Tensor | None]] = []  # hidden; scales of column codes

    def of_chunk(self, error: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor | None:
        """Of the gradient [rows, V] of the logits of `hidden` [rows, H]: that of `hidden`, fp32, if it is needed."""
        error = error.to(self._dtype).contiguous()
        if not self._fp8:
            if self._need_weight:
                self._wait(error, None, hidden)
            return _matmul(_operand(error, self._dtype), *self._operand) if self._need_hidden else None
        codes, scales, *columns = ops.quantize_both(error)
        if self._need_weight:
            self._wait(*columns, hidden)
        return ops.fp8_gemm(codes, scales, *self._operand, 128, None, torch.float32) if self._need_hidden else None

    def of_weight(self) -> torch.Tensor | None:
        """Of all chunks, fp32; None where it has been added to `total`, or there was no chunk."""
        self._multiply()
        return self._sum

    def _tokens(self) -> int:
        return sum(len(hidden) for hidden, _ in self._waiting)

    def _wait(self, logits: torch.Tensor, scales: torch.Tensor | None, hidden: torch.Tensor) -> None:
        begin, count = self._tokens(), len(hidden)
        if begin + count > self._room or (self._fp8 and begin % 128):  # a group of columns begins with a chunk
            self._multiply()
            begin = 0
        self._waiting.append((hidden, scales))
        if count >= self._room:  # alone
            self._logits = logits
            return
        if begin == 0:  # column codes of a vocabulary's entry lie beside each other
            room, width = round_up(self._room, 16), logits.shape[1]
            shape = (width, room) if self._fp8 else (room, width)
            made = torch.empty(shape, dtype=logits.dtype, device=logits.device)
            self._logits = made.t() if self._fp8 else made
        raw = torch.uint8 if self._fp8 else logits.dtype
        self._logits.view(raw)[begin : begin + count] = logits.view(raw)

    def _multiply(self) -> None:
        if not self._waiting:
            return
        tokens, (hidden, scales) = self._tokens(), zip(*self._waiting, strict=True)
        logits, inputs = self._logits[:tokens], torch.cat(hidden).to(self._dtype)
        total = self._sum if self._total is None else self._total
        if self._fp8:
            columns = logits, torch.cat(scales)
            made = weight_gradient(columns, ops.quantize(inputs, [128, 1]), torch.float32, total)
        else:
            made = _add_product(total, _operand(logits, self._dtype).t(), _operand(inputs, self._dtype))
        self._sum = self._sum if made is None else made
        self._waiting, self._logits = [], None


class _Logits(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, codes):
        ctx.save_for_backward(hidden, weight)
        ctx.codes = codes
        if codes is not None:
            return _fp8_logits(hidden, codes)
        return _matmul(_operand(hidden, hidden.dtype), _operand(weight, hidden.dtype).t())

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight = ctx.saved_tensors
        need = ctx.needs_input_grad[:2]
        gradients = _Gradients(weight, ctx.codes, hidden.dtype, need, len(hidden))
        d_hidden, d_weight = gradients.of_chunk(grad, hidden), gradients.of_weight()
        return d_hidden.to(hidden.dtype) if need[0] else None, d_weight.to(weight.dtype) if need[1] else None, None


def logits(hidden: torch.Tensor, weight: torch.Tensor, codes: Codes | None = None) -> torch.Tensor:
    """fp32 logits [..., V] of hidden [..., H] and weight [V, H]; the product is taken in the dtype of hidden, or in FP8
    of `codes`."""
    flat = _Logits.apply(hidden.reshape(-1, hidden.shape[-1]), weight, codes)
    return flat.view(*hidden.shape[:-1], -1)


class _TokenLoss(torch.autograd.Function):
    """Sum of -log softmax(hidden W^T)[label], each times its weight. The gradients are made chunk by chunk in the
    forward pass, while the chunk's logits are at hand: three products with W, not four, and only the gradients outlive
    a chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, weights, chunk, codes, add_to_grad):
        need_hidden, need_weight = need = ctx.needs_input_grad[:2]
        gradients, training = _Gradients(weight, codes, hidden.dtype, need, len(hidden)), any(need)
        w = _operand(weight, hidden.dtype) if codes is None else None
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        for begin in range(0, hidden.shape[0], chunk):
            part = slice(begin, begin + chunk)
            h = hidden[part]
            found = _matmul(_operand(h, h.dtype), w.t()) if codes is None else _fp8_logits(h, codes)
            losses, error = ops.cross_entropy(found, labels[part], training, h.dtype)
            total += losses.sum() if weights is None else (losses * weights[part]).sum()
            if not training:
                continue
            if need_weight and weights is not None:  # a row of the product's narrow operand, not of its wide one
                h = (h.float() * weights[part, None]).to(h.dtype)
            found_hidden = gradients.of_chunk(error, h)
            if need_hidden:
                d_hidden[part] = found_hidden if weights is None else found_hidden * weights[part, None]
        d_weight = gradients.of_weight()
        if need_weight and d_weight is None:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype, ctx.used = weight.dtype, False
        ctx.kept = kept(add_to_grad, weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        if ctx.used:
            raise RuntimeError("loss: its backward can run once only; call loss again instead of retain_graph=True")
        ctx.used = True  # the gradients are scaled in place
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden.mul_(grad)
        (total,) = sums_so_far(ctx)
        if total is not None:
            total.addcmul_(d_weight, grad)  # in fp32, rounded once
            d_weight = None
        elif d_weight is not None:
            d_weight = d_weight.mul_(grad).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None, None, None


def token_loss(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    chunk_tokens: int | None = None,
    weights: torch.Tensor | None = None,
    codes: Codes | None = None,
    add_to_grad: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed negative log likelihood (fp32 scalar) of labels [N] given hidden [N, H] and head weight [V, H], each times
    its own of `weights` (fp32 [N]) if given, and the number of labels that count (int64 scalar; -100 does not). Logits
    exist for `chunk_tokens` tokens at a time. `add_to_grad`: as in `nn.functional`."""
    if chunk_tokens is None:
        chunk_tokens = max(_LEAST_TOKENS, _CHUNK_LOGITS // weight.shape[0])
    labels = labels.to(torch.int64).contiguous()
    counted = (labels != IGNORE).sum()
    return _TokenLoss.apply(hidden, weight, labels, weights, chunk_tokens, codes, add_to_grad), counted


def row_logits(hidden: torch.Tensor, head: torch.Tensor | Codes) -> torch.Tensor:
    """fp32 logits [rows, V] of hidden [rows, H] and a head's weight [V, H] of one dtype, or its codes; a row depends on
    that row alone."""
    return _fp8_logits(hidden, head) if isinstance(head, tuple) else ops.gemm(hidden, head, torch.float32)


def row_log_probs(logits: torch.Tensor, tokens: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """log softmax(logits / temperature)[token], fp32 [rows], of logits [rows, V], tokens int64 and temperatures fp32
    [rows] (0, which draws the most likely token, counts as 1); 0 where the token is -100."""
    return -ops.cross_entropy(logits, tokens, False, logits.dtype, temperatures)[0]


class _TokenLogProbs(torch.autograd.Function):
    """Chunks of logits are made in the forward pass and again in the backward: none outlives its chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, tokens, temperatures, chunk, codes, add_to_grad):
        out = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        head = weight.to(hidden.dtype) if codes is None else codes
        for begin in range(0, hidden.shape[0], chunk):
            part = slice(begin, begin + chunk)
            out[part] = row_log_probs(row_logits(hidden[part], head), tokens[part], temperatures[part])
        ctx.save_for_backward(hidden, weight, tokens, temperatures)
        ctx.chunk, ctx.codes, ctx.kept = chunk, codes, kept(add_to_grad, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        hidden, weight, tokens, temperatures = ctx.saved_tensors
        dtype, (need_hidden, need_weight) = hidden.dtype, ctx.needs_input_grad[:2]
        head = weight.to(dtype) if ctx.codes is None else ctx.codes
        d_hidden = torch.empty_like(hidden) if need_hidden else None
        (total,) = sums_so_far(ctx)
        need = need_hidden, need_weight
        gradients = _Gradients(head if ctx.codes is None else weight, ctx.codes, dtype, need, len(hidden), total)
        for begin in range(0, hidden.shape[0], ctx.chunk):
            part = slice(begin, begin + ctx.chunk)
            found = row_logits(hidden[part], head)
            error = ops.cross_entropy(found, tokens[part], True, dtype, temperatures[part], -grad[part])[1]
            found_hidden = gradients.of_chunk(error, hidden[part])
            if need_hidden:
                d_hidden[part] = found_hidden
        d_weight = gradients.of_weight()
        if total is None and need_weight:
            d_weight = torch.zeros_like(weight) if d_weight is None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None, None


def token_log_probs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    tokens: torch.Tensor,
    temperatures: torch.Tensor,
    chunk_tokens: int | None = None,
    codes: Codes | None = None,
    add_to_grad: bool = False,
) -> torch.Tensor:
    """`row_log_probs` of all rows, fp32 [rows], differentiable in hidden [rows, H] and head weight [V, H]. Logits exist
    for `chunk_tokens` rows at a time, in either pass; the result's bits do not depend on it. `add_to_grad`: as in
    `nn.functional`."""
    if chunk_tokens is None:
        chunk_tokens = max(_LEAST_TOKENS, _CHUNK_LOGITS // weight.shape[0])
    return _TokenLogProbs.apply(hidden, weight, tokens, temperatures, chunk_tokens, codes, add_to_grad)
