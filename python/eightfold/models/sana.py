"""The linear diffusion transformer of SANA and SANA-1.5 (arXiv 2410.10629, 2501.18427), channels last throughout.

Pointwise convolutions are linears, queries, keys and values of the linear attention one of them, and keys and values of
the text another; `models.sana_keys` has the names of diffusers and NVlabs.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from eightfold.models.decoder import RMSNorm
from eightfold.models.precision import Precision
from eightfold.models.sana_compute import Pending, SanaCompute, modulated_norm, sana_compute
from eightfold.models.sana_config import SanaConfig

__all__ = ["Sana", "SanaConfig", "TextStates", "TimeStates"]

_FREQUENCIES = 256  # features of the sinusoid of a time
_NORM_EPS = 1e-5  # of the norms of the text, and of queries and keys in the linear attention
_FINAL_EPS = 1e-6
_MASKED = -10000.0  # added to the logits of padded text: finite, so that text that is all padding gives no NaN


class TimeStates(NamedTuple):
    """What the blocks and the last layer read of the time (and of the guidance), both float32."""

    embedding: Tensor  # [B, width]
    modulation: Tensor  # [B, 6, width]


class TextStates(NamedTuple):
    """What the blocks read of the text: made once a prompt, read in every step."""

    layers: list[tuple[Tensor, Tensor]]  # keys and values of each block, [B, heads, T, dim]
    bias: Tensor | None  # [B, 1, 1, T], added to the logits


class TwoLinears(nn.Module):
    def __init__(self, features: int, width: int):
        super().__init__()
        self.linear_1 = nn.Linear(features, width)
        self.linear_2 = nn.Linear(width, width)


class TimeEmbedding(nn.Module):
    def __init__(self, config: SanaConfig):
        super().__init__()
        self.timestep_embedder = TwoLinears(_FREQUENCIES, config.width)
        self.guidance_embedder = TwoLinears(_FREQUENCIES, config.width) if config.guidance_embeds else None
        self.linear = nn.Linear(config.width, 6 * config.width)


class LinearAttention(nn.Module):
    def __init__(self, config: SanaConfig):
        super().__init__()
        self.heads, self.eps = config.num_attention_heads, config.attention_eps
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.norm_q = RMSNorm(config.width, _NORM_EPS) if config.qk_norm else None
        self.norm_k = RMSNorm(config.width, _NORM_EPS) if config.qk_norm else None
        self.to_out = nn.Linear(config.width, config.width)


class TextAttention(nn.Module):
    def __init__(self, config: SanaConfig):
        super().__init__()
        self.heads = config.num_cross_attention_heads
        self.to_q = nn.Linear(config.width, config.width)
        self.kv = nn.Linear(config.width, 2 * config.width)
        self.norm_q = RMSNorm(config.width, config.cross_norm_eps) if config.qk_norm else None
        self.norm_k = RMSNorm(config.width, config.cross_norm_eps) if config.qk_norm else None
        self.to_out = nn.Linear(config.width, config.width)


class GLUMBConv(nn.Module):
    def __init__(self, config: SanaConfig):
        super().__init__()
        both = 2 * config.ffn_width
        self.conv_inverted = nn.Linear(config.width, both)
        self.conv_depth = nn.Conv2d(both, both, 3, padding=1, groups=both)
        self.conv_point = nn.Linear(config.ffn_width, config.width, bias=False)


class SanaBlock(nn.Module):
    def __init__(self, config: SanaConfig, compute: SanaCompute):
        super().__init__()
        self.compute, self.eps = compute, config.norm_eps
        self.attn1 = LinearAttention(config)
        self.attn2 = TextAttention(config)
        self.ff = GLUMBConv(config)
        self.scale_shift_table = nn.Parameter(torch.empty(6, config.width))

    def text_state(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, heads, T, dim] of the embedded text [B, T, width]."""
        attn, plain = self.attn2, self.compute.plain
        keys, values = plain.linear(text, attn.kv).chunk(2, dim=-1)
        keys = keys if attn.norm_k is None else plain.norm(keys, attn.norm_k)
        return tuple(x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (keys, values))

    def forward(self, stream, pending, modulation, text, bias, size):
        """Takes and returns (stream, pending): the stream [B, N, width] and the branch to be added to it."""
        compute, attn, cross, ff = self.compute, self.attn1, self.attn2, self.ff
        table = self.scale_shift_table.float() + modulation
        shift_attn, scale_attn, gate_attn, shift_ff, scale_ff, gate_ff = table.unbind(dim=1)

        stream, qkv = compute.add_norm_linear(stream, pending, shift_attn, scale_attn, self.eps, attn.qkv)
        norms = attn.norm_q, attn.norm_k
        branch = compute.linear_attention_linear(qkv, attn.heads, norms, attn.eps, attn.to_out)
        pending = Pending(branch, gate_attn)

        stream, q = compute.add_linear(stream, pending, cross.to_q)  # no norm and no gate around this one
        mixed = compute.text_attention(q, *text, bias, cross.norm_q)
        pending = Pending(compute.tokens.attention_output(mixed, cross.to_out), None)

        stream, up = compute.add_norm_linear(stream, pending, shift_ff, scale_ff, self.eps, ff.conv_inverted)
        return stream, Pending(compute.glu_linear(up, size, ff.conv_depth, ff.conv_point), gate_ff)


class Sana(nn.Module):
    """The velocity of a flow from noise to pictures, given the time and a text.

    `precision`: "fp32", "bf16" or "fp8" (`models.sana_compute`). Parameters keep the dtype they are given
    (fp32 when built here). `checkpoint_blocks=True` recomputes each block in the backward instead of saving its
    activations. Classifier-free guidance is a batch of two: the velocities of a picture with the empty and with the
    real text.
    """

    def __init__(self, config: SanaConfig, precision: Precision = "bf16", checkpoint_blocks: bool = False):
        super().__init__()
        self.config, self.precision, self.checkpoint_blocks = config, precision, checkpoint_blocks
        self.compute = sana_compute(precision)
        if precision == "fp8" and (config.width % 16 or config.ffn_width % 16):
            sizes = f"{config.width} and {config.ffn_width}"
            raise ValueError(f"precision: 'fp8' takes a width and an FFN width that are multiples of 16, got {sizes}")
        width, area = config.width, config.patch_size**2
        self.patch_embed = nn.Linear(config.in_channels * area, width)
        self.time_embed = TimeEmbedding(config)
        self.caption_projection = TwoLinears(config.caption_channels, width)
        self.caption_norm = RMSNorm(width, _NORM_EPS)
        self.transformer_blocks = nn.ModuleList(SanaBlock(config, self.compute) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(torch.empty(2, width))
        self.proj_out = nn.Linear(width, config.out_channels * area)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As NVlabs trains it: Xavier for linears, normal(0, 0.02) for the embeddings of time, guidance and text (the
        guidance's begins at 0), normal(0, 1 / width) for tables, 0.01 for the text's norm; biases of linears 0."""
        ff = [m for block in self.transformer_blocks for m in (block.ff.conv_inverted, block.ff.conv_point)]
        for module in self.modules():
            if isinstance(module, nn.Conv2d) or module in ff:
                module.reset_parameters()  # torch's own, as of the convolutions that they are
            elif isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)
        for embedding in (self.time_embed, self.caption_projection):
            for module in embedding.modules():
                if isinstance(module, nn.Linear):
                    nn.init.normal_(module.weight, std=0.02)
        if self.time_embed.guidance_embedder is not None:
            nn.init.zeros_(self.time_embed.guidance_embedder.linear_2.weight)
        nn.init.constant_(self.caption_norm.weight, 0.01)
        for table in (self.scale_shift_table, *(block.scale_shift_table for block in self.transformer_blocks)):
            nn.init.normal_(table, std=self.config.width**-0.5)

    @property
    def device(self) -> torch.device:
        return self.patch_embed.weight.device

    def forward(
        self,
        latents: Tensor,
        timestep: Tensor,
        text: Tensor,
        text_mask: Tensor | None = None,
        guidance: Tensor | None = None,
    ) -> Tensor:
        """The velocity, fp32 [B, out_channels, H, W], of noisy latents [B, in_channels, H, W] at timestep [B] (the
        noise's share times 1000 and times `config.timestep_scale`), given text embeddings [B, T, caption_channels].

        `text_mask` [B, T]: 1 for text, 0 for padding. `guidance` [B], only with `config.guidance_embeds`: the guidance
        scale times `config.guidance_embeds_scale`. Raises ValueError naming the argument.
        """
        return self.velocity(latents, self.time_states(timestep, guidance), self.text_states(text, text_mask))

    def time_states(self, timestep: Tensor, guidance: Tensor | None = None) -> TimeStates:
        """What `velocity` reads of timestep and guidance; see `forward`."""
        embed = self.time_embed
        if (guidance is None) == self.config.guidance_embeds:
            wanted = "a tensor [B]" if guidance is None else "None"
            raise ValueError(f"guidance: expected {wanted}, as guidance_embeds is {self.config.guidance_embeds}")
        for name, value in (("timestep", timestep), ("guidance", guidance)):
            if value is not None and (value.dim() != 1 or value.shape != timestep.shape):
                raise ValueError(f"{name}: expected [B], got {tuple(value.shape)}")
        state = self._embedded(timestep, embed.timestep_embedder)
        if guidance is not None:
            state = state + self._embedded(guidance, embed.guidance_embedder)
        modulation = self.compute.plain.linear(F.silu(state), embed.linear)
        return TimeStates(state.float(), modulation.float().unflatten(-1, (6, -1)))

    def text_states(self, text: Tensor, text_mask: Tensor | None = None) -> TextStates:
        """What `velocity` reads of the text; see `forward`."""
        if text.dim() != 3 or text.shape[-1] != self.config.caption_channels:
            raise ValueError(f"text: expected [B, T, {self.config.caption_channels}], got {tuple(text.shape)}")
        if text_mask is not None and text_mask.shape != text.shape[:2]:
            raise ValueError(f"text_mask: expected {tuple(text.shape[:2])} as of text, got {tuple(text_mask.shape)}")
        plain, layers = self.compute.plain, self.caption_projection
        hidden = F.gelu(plain.linear(text.to(self.compute.dtype), layers.linear_1), approximate="tanh")
        hidden = plain.norm(plain.linear(hidden, layers.linear_2), self.caption_norm)
        bias = None
        if text_mask is not None:
            bias = ((1 - text_mask.to(self.compute.dtype)) * _MASKED)[:, None, None]
        return TextStates([block.text_state(hidden) for block in self.transformer_blocks], bias)

    def velocity(self, latents: Tensor, time: TimeStates, text: TextStates) -> Tensor:
        """`forward` with time and text embedded before."""
        size = self._check(latents, time, text)
        stream, pending = self.compute.plain.linear(self._patches(latents, size), self.patch_embed), None
        if self.config.interpolation_scale is not None:
            stream = self._add_positions(stream, size)
        for block, state in zip(self.transformer_blocks, text.layers, strict=True):
            inputs = time.modulation, state, text.bias, size
            if self.checkpoint_blocks and torch.is_grad_enabled():
                # Added here, so that one tensor per block is kept instead of two.
                stream = self.compute.add(stream, pending)
                stream, pending = checkpoint(block, stream, None, *inputs, use_reentrant=False)
            else:
                stream, pending = block(stream, pending, *inputs)
        shift, scale = (self.scale_shift_table.float() + time.embedding[:, None]).unbind(dim=1)
        _, normed = modulated_norm(stream, pending, shift, scale, _FINAL_EPS)
        return self._picture(self.compute.plain.linear(normed, self.proj_out).float(), size)

    def _embedded(self, values: Tensor, layers: TwoLinears) -> Tensor:
        half = _FREQUENCIES // 2
        exponents = torch.arange(half, dtype=torch.float32, device=values.device) / half
        angles = values.float()[:, None] * torch.exp(-math.log(10000) * exponents)
        waves = torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.compute.dtype)
        plain = self.compute.plain
        return plain.linear(F.silu(plain.linear(waves, layers.linear_1)), layers.linear_2)

    def _patches(self, latents: Tensor, size: tuple[int, int]) -> Tensor:
        p = self.config.patch_size
        cells = latents.to(self.compute.dtype).reshape(len(latents), -1, size[0], p, size[1], p)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(len(latents), size[0] * size[1], -1)

    def _picture(self, tokens: Tensor, size: tuple[int, int]) -> Tensor:
        p = self.config.patch_size
        cells = tokens.reshape(len(tokens), *size, p, p, -1).permute(0, 5, 1, 3, 2, 4)
        return cells.reshape(len(tokens), -1, size[0] * p, size[1] * p)

    def _add_positions(self, stream: Tensor, size: tuple[int, int]) -> Tensor:
        """Adds sines and cosines of the column to the first half of the features, of the row to the second."""
        quarter, base = self.config.width // 4, self.config.sample_size // self.config.patch_size
        frequency = 10000 ** -(torch.arange(quarter, dtype=torch.float64, device=stream.device) / quarter)
        waves = []
        for count in size:
            steps = torch.arange(count, dtype=torch.float64, device=stream.device) * base / count
            angles = (steps / self.config.interpolation_scale)[:, None] * frequency
            waves.append(torch.cat([angles.sin(), angles.cos()], dim=-1).float())
        columns, rows = stream.float().unflatten(1, size).chunk(2, dim=-1)
        positioned = torch.cat([columns + waves[1], rows + waves[0][:, None]], dim=-1)
        return positioned.flatten(1, 2).to(stream.dtype)

    def _check(self, latents: Tensor, time: TimeStates, text: TextStates) -> tuple[int, int]:
        """Rows and columns of patches; ValueError naming what does not fit."""
        channels, p = self.config.in_channels, self.config.patch_size
        if latents.dim() != 4 or latents.shape[1] != channels or not latents.is_floating_point():
            got = f"{latents.dtype} {tuple(latents.shape)}"
            raise ValueError(f"latents: expected floating point [B, {channels}, H, W], got {got}")
        if latents.numel() == 0 or latents.shape[2] % p or latents.shape[3] % p:
            raise ValueError(f"latents: expected H and W multiples of {p}, not empty, got {tuple(latents.shape)}")
        if latents.device != self.device:
            raise ValueError(f"latents: expected on {self.device} like the parameters, got {latents.device}")
        for name, batch in (("timestep", len(time.embedding)), ("text", len(text.layers[0][0]))):
            if batch != len(latents):
                raise ValueError(f"{name}: expected the batch of latents, {len(latents)}, got {batch}")
        return latents.shape[2] // p, latents.shape[3] // p
