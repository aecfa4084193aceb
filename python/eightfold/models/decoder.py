"""Llama, Qwen2, Qwen3, LLaDA and Dream decoders in one file. Parameter names are Hugging Face's of all but LLaDA, so
state dicts interchange."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from eightfold.models.attention import (
    KVCache,
    Packed,
    Paged,
    Whole,
    attention_bias,
    block_diffusion_bias,
    document_segments,
)
from eightfold.models.config import DecoderConfig
from eightfold.models.head import token_log_probs, token_loss
from eightfold.models.precision import Precision, Save, strategy
from eightfold.models.rotary import inverse_frequencies
from eightfold.ops import kv_round, rotary_tables

__all__ = ["Decoder", "DecoderConfig", "KVCache"]


class RMSNorm(nn.Module):
    """Weight and epsilon of a norm; the decoder's precision strategy computes it."""

    def __init__(self, features: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(features))
        self.eps = eps


class Attention(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        c = config
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, c.num_attention_heads * c.head_dim, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, c.num_key_value_heads * c.head_dim, bias=c.qkv_bias)
        self.o_proj = nn.Linear(c.num_attention_heads * c.head_dim, c.hidden_size, bias=c.output_bias)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None


class MLP(nn.Module):
    def __init__(self, config: DecoderConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)


class DecoderLayer(nn.Module):
    """Takes and returns (stream, branch): the residual stream and the branch output not yet added to it, because the
    add belongs to the next norm's kernel."""

    def __init__(self, config: DecoderConfig, index: int, compute):
        super().__init__()
        self.index, self.compute = index, compute
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, stream, branch, tables, attend):
        attn = self.self_attn
        projections, norm = (attn.q_proj, attn.k_proj, attn.v_proj), self.input_layernorm
        if isinstance(attend, Paged):
            stream, qkv = self.compute.norm_linears(branch, norm, projections, stream)
            mixed = self._paged(attend, [x.unflatten(-1, (-1, attn.head_dim)) for x in qkv], tables)
            mixed = self.compute.attention_output(mixed, attn.o_proj)
            return self.compute.norm_mlp(mixed, self.post_attention_layernorm, self.mlp, stream)
        if attn.q_norm is None:
            stream, (q, k, v) = self.compute.norm_qkv(branch, norm, projections, tables, attn.head_dim, stream)
        else:
            stream, qkv = self.compute.norm_linears(branch, norm, projections, stream)
            q, k, v = (x.unflatten(-1, (-1, attn.head_dim)) for x in qkv)
            norm_rotary = self.compute.norm_rotary
            q, k = norm_rotary(q, attn.q_norm, tables), norm_rotary(k, attn.k_norm, tables)
        if self.compute.fp8_cache:
            k, v = (kv_round(x.flatten(0, 1)).view(x.shape) for x in (k, v))
        mixed = self.compute.attention_output(attend(self.index, q, k, v), attn.o_proj)
        return self.compute.norm_mlp(mixed, self.post_attention_layernorm, self.mlp, stream)

    def _paged(self, attend, qkv, tables):
        (q, k, v), norms = qkv, (self.self_attn.q_norm, self.self_attn.k_norm)
        if norms[0] is not None and not self.compute.kernels_on(q.device):
            q, k, norms = self.compute.norm(q, norms[0]), self.compute.norm(k, norms[1]), (None, None)
        codes = attend.gives_codes and self.compute.takes_codes(self.self_attn.head_dim)
        return attend.of_projections(self.index, q, k, v, tables, norms, codes)


class Trunk(nn.Module):
    """Embedding, layers and final norm: what Hugging Face calls `model`."""

    def __init__(self, config: DecoderConfig, compute):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, i, compute) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Decoder(nn.Module):
    """A language model: causal, or a diffusion model that sees its whole sequence or whole blocks
    (`config.attention_block`).

    `precision` says how linears, norms and SwiGLU compute and what they save for the backward: "fp32", "bf16", or "fp8"
    (FP8 products; inputs of linears, norms and SwiGLU saved in FP8). Parameters keep the dtype they are given (fp32
    when built here); embedding lookup, attention and head compute in bf16 for "bf16" and "fp8".
    `checkpoint_layers=True` recomputes each layer in the backward instead of saving its activations. `save="input"`
    keeps a byte less for each element of the stream in "fp8", at some precision of the gradients of q, k and v's
    weights (`nn.functional.fp8_norm_linears`). `fp8_head=True` takes the head's products in FP8 too, forward and
    backward; `fp8_cache=True` rounds keys and values as a cache in FP8 gives them back, with gradients as if it did
    not.
    """

    def __init__(
        self,
        config: DecoderConfig,
        precision: Precision = "bf16",
        checkpoint_layers: bool = False,
        save: Save = "columns",
        fp8_head: bool = False,
        fp8_cache: bool = False,
    ):
        super().__init__()
        self.config, self.precision, self.checkpoint_layers = config, precision, checkpoint_layers
        self.compute = strategy(precision, save, fp8_head, fp8_cache)
        self.model = Trunk(config, self.compute)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        # Not a buffer: model.to(dtype) must not round it.
        self._frequency = inverse_frequencies(config)
        self.reset_parameters()
        self.tie_weights()

    def reset_parameters(self) -> None:
        """Normal(0, initializer_range) weights, zero biases, unit norms."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)
            if isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def tie_weights(self) -> None:
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    def new_cache(self, batch: int, max_tokens: int) -> KVCache:
        """An empty KV cache for `batch` sequences of up to `max_tokens` tokens, in the compute dtype."""
        return KVCache(self.config, batch, max_tokens, self.compute.dtype, self.device)

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> torch.Tensor:
        """fp32 logits [B, T, V] (T = 1 with `last_only`) of token ids, int [B, T].

        `positions` [B, T] default to 0..T-1 after what the cache holds. With `document_ids` [B, T] a token attends only
        to its own run of equal ids, and positions restart with each run. With `cache` the tokens follow the cached ones
        and are appended; those see no later ones, whatever `config.attention_block`. Raises ValueError naming the
        argument.
        """
        hidden = self.hidden(ids, positions, document_ids, cache)
        return self.compute.head(hidden[:, -1:] if last_only else hidden, self.lm_head)

    def loss(
        self,
        ids: torch.Tensor,
        labels: torch.Tensor,
        document_ids: torch.Tensor | None = None,
        reduction: Literal["mean", "sum"] = "mean",
        chunk_tokens: int | None = None,
    ) -> torch.Tensor:
        """Negative log likelihood of next tokens, fp32 scalar in nats: labels[b, t] is the token that follows ids[b, t]
        (already shifted), -100 where none counts. Mean over the labels that count (0 if none does), or their sum.

        The logits exist for `chunk_tokens` tokens at a time (default: 2^26 logits, at least 1,024 tokens) and are never
        kept. The backward can run once.
        """
        if labels.shape != ids.shape:
            raise ValueError(f"labels: expected the shape of ids {tuple(ids.shape)}, got {tuple(labels.shape)}")
        if reduction not in ("mean", "sum"):
            raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
        hidden = self.hidden(ids, document_ids=document_ids).flatten(0, 1)
        codes = self._head_codes()
        options = {"codes": codes, "add_to_grad": self.compute.add_to_grad}
        total, count = token_loss(hidden, self.lm_head.weight, labels.flatten(), chunk_tokens, **options)
        return total / count.clamp(min=1) if reduction == "mean" else total

    def denoising_loss(
        self,
        ids: torch.Tensor,
        rows: torch.Tensor,
        labels: torch.Tensor,
        weights: torch.Tensor,
        document_ids: torch.Tensor | None = None,
        clean: torch.Tensor | None = None,
        chunk_tokens: int | None = None,
    ) -> torch.Tensor:
        """Sum over i of weights[i] times the negative log likelihood of labels[i] in row rows[i] of ids [B, T], of
        which some are masked: fp32 scalar in nats. rows and labels int64 [N], weights fp32 [N]; rows count through
        ids.flatten(). Logits are never kept, and none are made of other rows. The backward can run once.

        With `clean`, the tokens [B, T] before they were masked, ids attend to them as block diffusion does
        (`models.attention.block_diffusion_bias`; blocks of `config.attention_block`), and rows count through
        [ids, clean] [B, 2 T], flattened.
        """
        if not rows.shape == labels.shape == weights.shape:
            shapes = [tuple(x.shape) for x in (rows, labels, weights)]
            raise ValueError(f"rows, labels, weights: expected one shape [N], got {shapes}")
        if clean is None:
            hidden = self.hidden(ids, document_ids=document_ids)
        else:
            hidden = self._block_diffusion_hidden(ids, document_ids, clean)
        chosen, codes = hidden.flatten(0, 1)[rows], self._head_codes()
        options = weights, codes, self.compute.add_to_grad
        return token_loss(chosen, self.lm_head.weight, labels, chunk_tokens, *options)[0]

    def _block_diffusion_hidden(self, ids, document_ids, clean) -> torch.Tensor:
        self._check(ids, None, document_ids, None)
        if clean.shape != ids.shape or clean.dtype != ids.dtype:
            raise ValueError(f"clean: expected {ids.dtype} {tuple(ids.shape)}, got {clean.dtype} {tuple(clean.shape)}")
        if self.config.attention_block < 1:
            raise ValueError("clean: expected a model of blocks, got attention_block 0")
        index, segments = torch.arange(ids.shape[1], device=ids.device)[None], None
        if document_ids is not None:
            index, segments = document_segments(document_ids)
        bias = block_diffusion_bias(index, segments, self.config.attention_block, self._bias_dtype)
        return self._layers(torch.cat([ids, clean], dim=1), torch.cat([index, index], dim=1), Whole(bias, None))

    def token_log_probs(
        self,
        ids: torch.Tensor,
        starts: torch.Tensor,
        longest: int,
        rows: torch.Tensor,
        labels: torch.Tensor,
        temperatures: torch.Tensor,
        chunk_tokens: int | None = None,
    ) -> torch.Tensor:
        """Natural log-probability, fp32 [N], of labels[i] after token rows[i] (both int64 [N]) of sequences packed as
        in `packed_hidden`, at temperatures[i] (fp32 [N]). Differentiable; logits are never kept.

        In precision "fp8" these are the bits that `generate.rollout` gives for the same tokens.
        """
        if not rows.shape == labels.shape == temperatures.shape:
            shapes = [tuple(x.shape) for x in (rows, labels, temperatures)]
            raise ValueError(f"rows, labels, temperatures: expected one shape [N], got {shapes}")
        hidden = self.packed_hidden(ids, starts, longest)[rows]
        options = chunk_tokens, self._head_codes(), self.compute.add_to_grad
        return token_log_probs(hidden, self.lm_head.weight, labels, temperatures, *options)

    def _head_codes(self):
        return self.compute.head_codes(self.lm_head)

    def in_precision(self, precision: Precision) -> Decoder:
        """A decoder of the same parameters (not copies) that computes in another precision."""
        options, mine = {}, self.compute
        if precision == self.precision == "fp8":
            options = {"save": mine.save, "fp8_head": mine.fp8_head, "fp8_cache": mine.fp8_cache}
        with torch.device("meta"):
            other = Decoder(self.config, precision, self.checkpoint_layers, **options)
        for name, parameter in self.named_parameters():
            module, _, leaf = name.rpartition(".")
            setattr(other.get_submodule(module), leaf, parameter)
        other.tie_weights()
        other._frequency = self._frequency
        return other.train(self.training)

    def hidden(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor | None = None,
        document_ids: torch.Tensor | None = None,
        cache: KVCache | None = None,
    ) -> torch.Tensor:
        """What the head reads: the final norm's output [B, T, hidden_size], in the compute dtype. See `forward`."""
        self._check(ids, positions, document_ids, cache)
        tokens, past = ids.shape[1], 0 if cache is None else cache.length
        documents = None if document_ids is None else document_segments(document_ids)
        if positions is None and documents is not None:
            positions = documents[0]
        if positions is None:
            positions = torch.arange(past, past + tokens, device=ids.device)[None]
        block = self.config.attention_block
        bias = attention_bias(tokens, past, documents, block, self._bias_dtype, ids.device)
        hidden = self._layers(ids, positions, Whole(bias, cache, causal=block > 0))
        if cache is not None:
            cache.length += tokens
        return hidden

    def packed_hidden(self, ids: torch.Tensor, starts: torch.Tensor, longest: int) -> torch.Tensor:
        """`hidden` [tokens, hidden_size] of sequences one behind the other: ids [tokens], those of sequence s from
        starts[s] to starts[s + 1] (int32 [sequences + 1] on the same device), none longer than `longest`.

        A token's bits depend on the tokens it sees alone: they are the same in any packing and in `rows_hidden`.
        """
        index = torch.arange(ids.shape[0], device=ids.device)
        sequence = torch.searchsorted(starts, index, right=True, out_int32=True) - 1
        attend = Packed(starts, longest, self.config.attention_block)
        return self.rows_hidden(ids, index - starts[sequence], attend)

    def rows_hidden(self, ids: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
        """`hidden` [tokens, hidden_size] of ids [tokens] at positions [tokens], whose queries find their keys by
        `attend` (`models.attention.Packed`, `Paged`)."""
        if ids.numel() == 0:
            return torch.zeros(0, self.config.hidden_size, dtype=self.compute.dtype, device=ids.device)
        return self._layers(ids[None], positions[None], attend).squeeze(0)

    @property
    def _bias_dtype(self) -> torch.dtype:
        return torch.float32 if self.device.type == "cpu" else self.compute.dtype

    def _layers(self, ids: torch.Tensor, positions: torch.Tensor, attend) -> torch.Tensor:
        if self._frequency.device != ids.device:
            self._frequency = self._frequency.to(ids.device)
        tables = rotary_tables(self._frequency, positions)
        stream, branch = None, self.compute.embedding(ids, self.model.embed_tokens)
        for layer in self.model.layers:
            if self.checkpoint_layers and torch.is_grad_enabled():
                # Added here, so that one tensor per layer is kept instead of two.
                branch = branch if stream is None else stream + branch
                stream, branch = checkpoint(layer, None, branch, tables, attend, use_reentrant=False)
            else:
                stream, branch = layer(stream, branch, tables, attend)
        return self.compute.add_norm(branch, self.model.norm, stream)[1]

    def _check(self, ids, positions, document_ids, cache) -> None:
        if ids.dim() != 2 or ids.dtype not in (torch.int32, torch.int64) or ids.numel() == 0:
            raise ValueError(f"ids: expected int32 or int64 [B, T], not empty, got {ids.dtype} {tuple(ids.shape)}")
        if ids.device != self.device:
            raise ValueError(f"ids: expected on {self.device} like the parameters, got {ids.device}")
        for name, value in (("positions", positions), ("document_ids", document_ids)):
            if value is not None and value.shape != ids.shape:
                raise ValueError(f"{name}: expected the shape of ids {tuple(ids.shape)}, got {tuple(value.shape)}")
        if cache is None:
            return
        if document_ids is not None:
            raise ValueError("document_ids: packed documents and a cache cannot be combined, got both")
        if torch.is_grad_enabled() and any(p.requires_grad for p in self.parameters()):
            raise ValueError("cache: expected torch.no_grad() or inference_mode(): a cache keeps no gradient")
        if cache.batch != ids.shape[0] or cache.length + ids.shape[1] > cache.max_tokens:
            raise ValueError(
                f"cache: expected room for {ids.shape[0]} x {cache.length + ids.shape[1]} tokens, "
                f"got {cache.batch} x {cache.max_tokens}"
            )
