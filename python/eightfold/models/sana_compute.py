"""How a SANA transformer computes: its operations in plain torch, and the strategy that chains them with the products.

Every operation between two products stands here once, under the shapes that a fused kernel takes, so that one can take
its place. Tokens are [batch, tokens, width], pictures of features [batch, height, width, channels]; what is computed
inside an operation is float32, and its result is rounded once to the dtype of what came in.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eightfold import ops
from eightfold.models.precision import KeptWeights, Precision, strategy

_KERNEL_DIMS = (32, 64, 128)


def linear_attention(q: Tensor, k: Tensor, v: Tensor, *, eps: float = 1e-15, key_mask: Tensor | None = None) -> Tensor:
    """relu(q) S / (relu(q) z + eps) with S = sum of relu(k)^T v and z = sum of relu(k) over all tokens; not causal.

    q, k, v [B, N, heads, dim] -> [B, N, heads, dim]; `key_mask` [B, N]: 0 leaves a token's key and value out. No scale
    anywhere; a query without a positive element gives 0. (arXiv 2410.10629, equation 1.) By `ops.linear_attention`
    where it takes such heads.
    """
    dtype = q.dtype
    if q.shape[-1] in _KERNEL_DIMS and (dtype == torch.bfloat16 or q.device.type == "cpu"):
        return ops.linear_attention(q, k, v, eps=eps, key_mask=key_mask)
    q, k, v = q.float().relu(), k.float().relu(), v.float()
    if key_mask is not None:
        k = k * key_mask[:, :, None, None]
    state, total = torch.einsum("bnhd,bnhe->bhde", k, v), k.sum(dim=1)
    numerator = torch.einsum("bnhd,bhde->bnhe", q, state)
    denominator = torch.einsum("bnhd,bhd->bnh", q, total) + eps
    return (numerator / denominator[..., None]).to(dtype)


def depthwise_glu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """a * silu(g), where [a, g] = depthwise 3x3 convolution of silu(x), zero padded: x [B, H, W, 2h] -> [B, H, W, h];
    weight [2h, 1, 3, 3], bias [2h]."""
    wide = F.silu(x.float()).permute(0, 3, 1, 2)  # a view: channels stay last in memory
    value, gate = F.conv2d(wide, weight.float(), bias.float(), padding=1, groups=weight.shape[0]).chunk(2, dim=1)
    return (value * F.silu(gate)).permute(0, 2, 3, 1).to(x.dtype).contiguous()


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor, eps: float) -> Tensor:
    """LayerNorm(x) * (1 + scale) + shift; x [B, N, width], shift and scale [B, width] in float32."""
    normed = F.layer_norm(x.float(), x.shape[-1:], eps=eps)
    return (normed * (1 + scale[:, None]) + shift[:, None]).to(x.dtype)


def gated_residual(x: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
    """x + gate * branch; x and branch [B, N, width], gate [B, width] in float32, or None for 1."""
    if gate is None:
        return x + branch
    return torch.addcmul(x.float(), gate[:, None], branch.float()).to(x.dtype)


def text_attention(q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
    """Softmax attention of q [B, N, heads, dim] to keys and values [B, heads, T, dim]; bias [B, 1, 1, T] is added to
    the logits -> [B, N, heads, dim]."""
    return F.scaled_dot_product_attention(q.transpose(1, 2), keys, values, attn_mask=bias).transpose(1, 2)


class Pending(NamedTuple):
    """A branch that has not been added to the stream yet, because the add belongs to the next operation's kernel."""

    branch: Tensor  # [B, N, width]
    gate: Tensor | None  # float32 [B, width]


class SanaCompute:
    """Chains products and operations in "fp32" (the definition), "bf16", or "fp8".

    In "fp8" the products of image tokens inside the blocks are FP8. Those of `plain` stay bf16: the time's embedding
    (a row a picture, and every block is scaled by what comes out), the text's embedding, keys and values (once a
    prompt, not once a step), and the first and last layers (32 channels on one side: little to win, and what the last
    one rounds is the velocity itself).
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
        stream = self.add(stream, pending)
        return stream, self.tokens.linear(modulated_norm(stream, shift, scale, eps), layer)

    def linear_attention(self, qkv: Tensor, heads: int, norms: Sequence[nn.Module | None], eps: float) -> Tensor:
        """[B, N, width] of queries, keys and values beside each other [B, N, 3 * width]; `norms` of the first two."""
        q, k, v = qkv.chunk(3, dim=-1)
        q, k = (x if norm is None else self.tokens.norm(x, norm) for x, norm in zip((q, k), norms, strict=True))
        return linear_attention(*(x.unflatten(-1, (heads, -1)) for x in (q, k, v)), eps=eps).flatten(2)

    def text_attention(self, q: Tensor, keys: Tensor, values: Tensor, bias: Tensor | None, norm) -> Tensor:
        """[B, N, width] of queries [B, N, width]."""
        q = q if norm is None else self.tokens.norm(q, norm)
        return text_attention(q.unflatten(-1, (keys.shape[1], -1)), keys, values, bias).flatten(2)

    def glu_linear(self, x: Tensor, size: tuple[int, int], depthwise: nn.Conv2d, layer: nn.Linear) -> Tensor:
        """The layer's output on `depthwise_glu` of x [B, H * W, 2h], a picture of `size` (H, W)."""
        gated = depthwise_glu(x.unflatten(1, size), depthwise.weight, depthwise.bias)
        return self.tokens.linear(gated.flatten(1, 2), layer)
