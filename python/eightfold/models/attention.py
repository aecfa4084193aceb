"""How the layers of a decoder attend: over whole sequences, packed documents or a KV cache on torch's fused kernels
(`Whole`), or by `ops.attention`, whose rows have the same bits in training (`Packed`) and over pages (`Paged`)."""

from __future__ import annotations

from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

from eightfold.ops import (
    QuantizedTensor,
    attention,
    paged_attention,
    paged_attention_quantize,
    paged_store_,
    rope_cache_write,
)

# On Hopper cuDNN's kernels take half the time of torch's own, forward and backward; but it plans anew for every shape,
# which generation, where the shapes grow, cannot afford.
_TRAINING = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def document_segments(document_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Positions and segment numbers, both int64 [B, T], of packed documents; a run of equal ids is one."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    start = torch.where(begins, index, 0).cummax(dim=1).values
    return index - start, begins.cumsum(dim=1)


def attention_bias(
    tokens: int,
    past: int,
    documents: tuple[torch.Tensor, torch.Tensor] | None,
    block: int,
    dtype: torch.dtype,
    device: torch.device,
) -> torch.Tensor | None:
    """Additive mask [B or 1, 1, tokens, past + tokens], 0 or -inf; None where the kernels' own masks will do: a causal
    one for `block` 1, none for 0. `block`: DecoderConfig.attention_block; `documents`: `document_segments`, of which
    each is a sequence of its own."""
    if documents is None and (block == 0 or tokens == 1 or (block == 1 and past == 0)):
        return None
    index = torch.arange(past + tokens, device=device)[None] if documents is None else documents[0]
    visible = torch.ones(1, tokens, past + tokens, dtype=torch.bool, device=device)
    if block > 0:
        visible = index[:, None, :] // block <= index[:, past:, None] // block
    if documents is not None:
        visible = visible & (documents[1][:, :, None] == documents[1][:, None, :])
    return _as_bias(visible, dtype)


def block_diffusion_bias(
    index: torch.Tensor, segments: torch.Tensor | None, block: int, dtype: torch.dtype
) -> torch.Tensor:
    """Additive mask [B, 1, 2 T, 2 T] of noisy tokens and, behind them, the same T tokens clean (block diffusion: arXiv
    2503.09573, section 3.2). A noisy token sees its own block's noisy tokens and the clean ones of the blocks before; a
    clean token the clean ones of its own block and those before.

    index [B, T]: place of each token in its document, whose blocks of `block` tokens count from its beginning; segments
    [B, T]: its document, None where each row is one.
    """
    numbers = index // block
    query, key = numbers[:, :, None], numbers[:, None, :]
    same, before = query == key, query > key
    if segments is not None:
        one = segments[:, :, None] == segments[:, None, :]
        same, before = same & one, before & one
    noisy = torch.cat([same, before], dim=2)
    clean = torch.cat([torch.zeros_like(same), same | before], dim=2)
    return _as_bias(torch.cat([noisy, clean], dim=1), dtype)


def _as_bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    bias = torch.zeros(visible.shape, dtype=dtype, device=visible.device)
    return bias.masked_fill_(~visible, float("-inf"))[:, None]


class _CpuAttention(torch.autograd.Function):
    """torch's fused CPU kernel run in fp32 on values kept in their own dtype: without bf16 units its bf16 backward is
    four times slower. Saves q, k, v and the output once, in the dtype of q."""

    @staticmethod
    def forward(q, k, v, bias, causal):
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q.float(), k.float(), v.float(), 0.0, causal, attn_mask=bias
        )
        return out.to(q.dtype), lse

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, bias, ctx.causal = inputs
        out, lse = output
        ctx.mark_non_differentiable(lse)
        ctx.save_for_backward(q, k, v, bias, out, lse)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad, _):
        q, k, v, bias, out, lse = ctx.saved_tensors
        grads = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad.float(), q.float(), k.float(), v.float(), out.float(), lse, 0.0, ctx.causal, attn_mask=bias
        )
        return *(g.to(q.dtype) for g in grads), None, None


def whole_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor | None, causal: bool = True
) -> torch.Tensor:
    """softmax(q k^T / sqrt(D)) v.

    q [B, T, heads, D]; k, v [B, S, kv_heads, D], S >= T, the queries being the last T of the S tokens. `bias` comes
    from `attention_bias`; without one all is seen or, where T > 1, `causal` masks. Returns [B, T, heads * D] in the
    dtype of q.
    """
    batch, tokens, heads, dim = q.shape
    causal = causal and bias is None and tokens > 1
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if q.device.type == "cpu":
        out, _ = _CpuAttention.apply(q, k, v, bias, causal)
    else:
        grouped = k.shape[1] != heads
        if grouped and bias is not None:
            # The kernel that takes a bias knows no grouped heads; without the copy torch would store all the scores.
            k, v = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (k, v))
            grouped = False
        with sdpa_kernel(_TRAINING, set_priority=True) if bias is None and q.requires_grad else nullcontext():
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, enable_gqa=grouped)
    return out.transpose(1, 2).reshape(batch, tokens, heads * dim)


class KVCache:
    """Keys and values of all layers, preallocated: [layers, batch, max_tokens, kv_heads, head_dim]; `length` are in."""

    def __init__(self, config, batch: int, max_tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        shape = (config.num_hidden_layers, batch, max_tokens, config.num_key_value_heads, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def batch(self) -> int:
        return self.keys.shape[1]

    @property
    def max_tokens(self) -> int:
        return self.keys.shape[2]

    def append(self, layer: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores k, v [B, T, kv_heads, head_dim] after the `length` tokens and returns views of all of them. `length`
        itself moves when every layer has stored its part."""
        end = self.length + k.shape[1]
        self.keys[layer, :, self.length : end] = k
        self.values[layer, :, self.length : end] = v
        return self.keys[layer, :, :end], self.values[layer, :, :end]

    def truncate(self, length: int) -> None:
        """Forgets all tokens from `length` on."""
        if not 0 <= length <= self.length:
            raise ValueError(f"length: expected 0 to {self.length}, got {length}")
        self.length = length


class Whole:
    """Attends a batch of sequences of one length: by `attention_bias`, after what `cache` holds; without a bias, all or
    (`causal`) what is before."""

    def __init__(self, bias: torch.Tensor | None, cache: KVCache | None, causal: bool = True):
        self.bias, self.cache, self.causal = bias, cache, causal

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [B, T, heads, D], k and v [B, T, kv_heads, D] of a layer -> [B, T, heads * D]."""
        if self.cache is not None:
            k, v = self.cache.append(layer, k, v)
        return whole_attention(q, k, v, self.bias, self.causal)


class Packed:
    """Attends sequences that lie one behind the other in a batch of one: rows starts[s] to starts[s + 1] are one.

    starts int32 [sequences + 1] on the device; longest: no sequence is longer; block: DecoderConfig.attention_block.
    """

    def __init__(self, starts: torch.Tensor, longest: int, block: int = 1):
        self.starts, self.longest, self.block = starts, longest, block

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [1, tokens, heads, D], k and v [1, tokens, kv_heads, D] -> [1, tokens, heads * D]."""
        mask = {"causal": self.block > 0, "block": max(self.block, 1)}
        q, k, v = (heads.squeeze(0) for heads in (q, k, v))  # whose gradients are views, as [0]'s are not
        return attention(q, k, v, starts=self.starts, longest=self.longest, **mask).flatten(1)[None]


class PagedCache:
    """Keys and values of all layers in pages of `page_size` tokens: [layers, pages, kv_heads, page_size, head_dim]; in
    float8_e4m3fn with a scale for each row of a head."""

    def __init__(self, config, pages: int, page_size: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        shape = (config.num_hidden_layers, pages, config.num_key_value_heads, page_size, config.head_dim)
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.key_scales = self.value_scales = None
        if dtype == torch.float8_e4m3fn:
            self.key_scales, self.value_scales = (torch.zeros(shape[:-1], device=device) for _ in range(2))

    @property
    def pages(self) -> int:
        return self.keys.shape[1]

    @property
    def page_size(self) -> int:
        return self.keys.shape[3]

    def copy_page(self, source: int, target: int) -> None:
        """Page `source` of every layer into page `target`."""
        for part in (self.keys, self.values, self.key_scales, self.value_scales):
            if part is not None:
                part[:, target] = part[:, source]

    def layer(self, index: int) -> dict[str, torch.Tensor]:
        """The arguments by which the ops over pages know a layer's part."""
        part = {"k_pages": self.keys[index], "v_pages": self.values[index]}
        if self.key_scales is not None:
            part |= {"k_scales": self.key_scales[index], "v_scales": self.value_scales[index]}
        return part


class Paged:
    """Stores the keys and values of new rows in pages and attends the rows over all of their sequences' pages.

    pages int32 [sequences, most_pages]; starts int32 [sequences + 1]; lengths int32 [sequences], keys with the new
    ones; slots int64 [tokens], page * page_size + place of each new row; longest: no sequence has more new rows;
    settled: as of `ops.paged_attention`.
    """

    gives_codes = True  # whether it can give its result quantised

    def __init__(
        self,
        cache: PagedCache,
        pages: torch.Tensor,
        starts: torch.Tensor,
        lengths: torch.Tensor,
        slots: torch.Tensor,
        longest: int,
        settled: bool = False,
    ):
        self.cache, self.pages, self.starts, self.lengths = cache, pages, starts, lengths
        self.slots, self.longest, self.settled = slots, longest, settled

    def __call__(self, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q [1, tokens, heads, D], k and v [1, tokens, kv_heads, D] -> [1, tokens, heads * D]."""
        pages = self.cache.layer(layer)
        paged_store_(k[0], v[0], slots=self.slots, **pages)
        return self._attend(q[0], pages)

    def of_projections(
        self, layer: int, q, k, v, tables, norms=(None, None), codes: bool = False
    ) -> torch.Tensor | QuantizedTensor:
        """The same of q, k and v that are not rotated yet, nor q and k normalised by the weights of `norms`: one kernel
        does that and stores, with the bits of the ops apart. With `codes`, where D is 128, row codes [tokens,
        heads * D] of the result."""
        pages = self.cache.layer(layer)
        cos, sin = (table[0, :, 0] for table in tables)
        weights = {}
        if norms[0] is not None:
            weights = {"q_weight": norms[0].weight, "k_weight": norms[1].weight, "eps": norms[0].eps}
        turned = rope_cache_write(q[0], k[0], v[0], cos, sin, slots=self.slots, **pages, **weights)
        if codes:
            return paged_attention_quantize(turned, **pages, **self._where())
        return self._attend(turned, pages)

    def _attend(self, q: torch.Tensor, pages: dict[str, torch.Tensor]) -> torch.Tensor:
        return paged_attention(q, **pages, **self._where()).flatten(1)[None]

    def _where(self) -> dict:
        where = {"pages": self.pages, "starts": self.starts, "lengths": self.lengths, "longest": self.longest}
        return where | {"settled": self.settled} | self._mask()

    def _mask(self) -> dict[str, bool | int]:
        return {}
