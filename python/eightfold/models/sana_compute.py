"""How a SANA transformer computes: products, and the fused ops between them.

Each op takes its torch composition's place where its kernel takes the dtype and the sizes. Tokens are [batch, tokens,
width], pictures of features [batch, height, width, channels]; what is computed inside an operation is float32, and its
result is rounded once to the dtype of what came in, or cast to FP8 from that.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from eightfold import ops, reference
from eightfold.models.pixel_ops import (
    CUDA_CHANNELS,
    attention_kernel_takes,
    depthwise_glu,
    depthwise_parameters,
    glu_kernel_takes,
)
from eightfold.models.precision import KeptWeights, Precision, strategy
from eightfold.nn import functional as fused

_CUDA_MOST_WIDTH = 8192  # of modulated norms


def _rounded(op, like: Tensor, *inputs: Tensor) -> Tensor:
    """op of inputs, rounded to the dtype of `like`, in the same pass but where it is compiled: what comes out of a
    function by `out`, or by a `to` that does nothing, has gradients of zero there with torch 2.11."""
    if not torch.compiler.is_compiling():
        return op(*inputs, out=torch.empty_like(like))
    made = op(*inputs)
    return made if made.dtype == like.dtype else made.to(like.dtype)


class _GatedResidual(torch.autograd.Function):
    """x + gate * branch in one pass; saves branch and gate, where torch's composition saves a float32 copy."""

    @staticmethod
    def forward(ctx, x, branch, gate):
        ctx.save_for_backward(branch, gate)
        return _rounded(torch.addcmul, x, x, gate[:, None], branch)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        branch, gate = ctx.saved_tensors
        dbranch = _rounded(torch.mul, branch, dy, gate[:, None])
        return dy, dbranch, (dy.float() * branch).sum(dim=1)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * branch; x and branch [B, N, width], gate [B, width] in float32, or None for 1."""
    return x + branch if gate is None else _GatedResidual.apply(x, branch, gate)


def modulated_norm(
    stream: Tensor, pending: Pending | None, shift: Tensor, scale: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(s, LayerNorm(s) * (1 + scale) + shift), s being the stream [B, N, width] with the pending branch; shift and
    scale [B, width] in float32."""
    if not norm_kernel_takes(stream):
        if pending is None:
            return stream, reference.layer_norm_modulate(stream, scale, shift, eps, False)[0]
        return reference.gated_residual_layer_norm_modulate(stream, *pending, scale, shift, eps, False)[:2]
    if pending is None:
        return stream, ops.layer_norm_modulate(stream, scale, shift, eps)
    return ops.gated_residual_layer_norm_modulate(stream, *pending, scale, shift, eps)


def norm_kernel_takes(stream: Tensor) -> bool:
    """Whether `ops.layer_norm_modulate` takes a stream [..., width]."""
    width = stream.shape[-1]
    return stream.device.type == "cpu" or (width % CUDA_CHANNELS == 0 and width <= _CUDA_MOST_WIDTH)


def text_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of q [B, N, heads, dim] to keys and values [B, heads, T, dim]; bias [B, 1, 1, T] is added to
    the logits -> [B, N, heads, dim]."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=bias).transpose(1, 2)


class Pending(NamedTuple):
    """A branch that has not been added to the stream yet, because the add belongs to the next operation's kernel."""

    branch: Tensor  # [B, N, width]
    gate: Tensor | None  # float32 [B, width]


class SanaCompute:
    """Chains products and operations in "fp32" (the definition) or "bf16".

    `plain` takes the products that stay bf16 in "fp8": the time's embedding (a row a picture, and every block is scaled
    by what comes out), the text's embedding, keys and values (once a prompt, not once a step), and the first and last
    layers (32 channels on one side: little to win, and what the last one rounds is the velocity itself).
    """

    def __init__(self, precision: Precision):
        self.tokens = strategy(precision)
        self.plain = strategy("bf16") if precision == "fp8" else self.tokens
        self.dtype = self.tokens.dtype

    @contextmanager
    def constant_weights(self, kept: KeptWeights | None = None):
        """`models.precision.FP32.constant_weights` of both."""
        kept = KeptWeights(self.dtype) if kept is None else kept
        with self.plain.constant_weights(kept), self.tokens.constant_weights(kept):
            yield

    def add(self, stream: Tensor, pending: Pending | None) -> Tensor:
        return stream if pending is None else gated_residual(stream, *pending)

    def add_linear(self, stream: Tensor, pending: Pending, layer: nn.Linear) -> tuple[Tensor, Tensor]:
        """(stream with the pending branch, the layer's output on it)."""
        stream = self.add(stream, pending)
        return stream, self.tokens.linear(stream, layer)

    def add_norm_linear(
        self, stream: Tensor, pending: Pending | None, shift: Tensor, scale: Tensor, eps: float, layer: nn.Linear
    ) -> tuple[Tensor, Tensor]:
        """(stream with the pending branch, the layer's output on its modulated norm)."""
        stream, normed = modulated_norm(stream, pending, shift, scale, eps)
        return stream, self.tokens.linear(normed, layer)

    def linear_attention_linear(
        self, qkv: Tensor, heads: int, norms: Sequence[nn.Module | None], eps: float, layer: nn.Linear
    ) -> Tensor:
        """The layer's output on the linear attention of queries, keys and values beside each other [B, N, 3 * width];
        `norms` of the first two."""
        if norms[0] is None and attention_kernel_takes(parts := qkv.unflatten(-1, (3, heads, -1))):
            mixed = ops.linear_attention_packed(parts, eps=eps)
        else:
            parts = self._heads(qkv, heads, norms)
            mixed = (
                ops.linear_attention(*parts, eps=eps)
                if attention_kernel_takes(parts[0])
                else reference.linear_attention(*parts, eps=eps)[0]
            )
        return self.tokens.linear(mixed.flatten(2), layer)

    def _heads(self, qkv: Tensor, heads: int, norms: Sequence[nn.Module | None]) -> list[Tensor]:
        """Queries, keys and values [B, N, heads, dim]."""
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = (x if norm is None else self.tokens.norm(x, norm) for x, norm in zip((q, k), norms, strict=True))
        return [x.unflatten(-1, (heads, -1)) for x in (q, k, v)]

    def text_attention(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, norm) -> Tensor:
        """[B, N, width] of queries [B, N, width]."""
        q = q if norm is None else self.tokens.norm(q, norm)
        return text_attention(q.unflatten(-1, (keys.shape[1], -1)), keys, values, bias).flatten(2)

    def glu_linear(self, x: Tensor, size: tuple[int, int], depthwise: nn.Conv2d, layer: nn.Linear) -> Tensor:
        """The layer's output on `depthwise_glu` of x [B, H * W, 2h], a picture of `size` (H, W)."""
        return self.tokens.linear(depthwise_glu(x.unflatten(1, size), depthwise).flatten(1, 2), layer)


class FP8SanaCompute(SanaCompute):
    """In "fp8": products of image tokens inside the blocks, whose inputs leave the op before them as codes.

    A modulated norm gives codes always; attention and the GLU only without gradients. With them, their output is cast
    along the tokens too, for the weight gradient, and making it again for that would read more than writing it does.
    """

    def __init__(self):
        super().__init__("fp8")

    def add_norm_linear(self, stream, pending, shift, scale, eps, layer):
        branch = (None, None) if pending is None else pending
        parameters, options = (layer.weight, layer.bias), self.tokens.options(layer)
        total, out = fused.fp8_modulate_linear(stream, scale, shift, eps, *parameters, *branch, **options)
        return stream if total is None else total, out

    def linear_attention_linear(self, qkv, heads, norms, eps, layer):
        parts = None if torch.is_grad_enabled() else self._heads(qkv, heads, norms)
        if parts is None or not attention_kernel_takes(parts[0]):
            return super().linear_attention_linear(qkv, heads, norms, eps, layer)
        return self._linear_of_codes(ops.linear_attention_quantize(*parts, eps=eps), layer, qkv)

    def glu_linear(self, x, size, depthwise, layer):
        if torch.is_grad_enabled() or not glu_kernel_takes(x):
            return super().glu_linear(x, size, depthwise, layer)
        rows = ops.depthwise_glu_quantize(x.unflatten(1, size), *depthwise_parameters(depthwise))
        return self._linear_of_codes(rows, layer, x)

    def _linear_of_codes(self, rows: ops.QuantizedTensor, layer: nn.Linear, like: Tensor) -> Tensor:
        return self.tokens.linear_of_codes(rows, layer).view(*like.shape[:2], -1)


def sana_compute(precision: Precision) -> SanaCompute:
    return FP8SanaCompute() if precision == "fp8" else SanaCompute(precision)
