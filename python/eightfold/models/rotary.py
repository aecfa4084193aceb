"""Rotary position embedding: frequencies (default, linear, llama3 scaling) and the rotation, fp32, rounded once."""

from __future__ import annotations

import math

import torch

from eightfold.models.config import DecoderConfig


def inverse_frequencies(config: DecoderConfig) -> torch.Tensor:
    """Angular speed of each rotated pair, fp32 [head_dim / 2], on the CPU."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu") / config.head_dim
    frequency = 1.0 / config.rope_theta**exponent
    scaling = config.rope_scaling
    if scaling is None or scaling["rope_type"] == "default":
        return frequency
    factor = scaling["factor"]
    if scaling["rope_type"] == "linear":
        return frequency / factor
    # llama3: wavelengths beyond the old context are stretched by `factor`, short ones kept, those between interpolated.
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * frequency / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return frequency * (keep + (1 - keep) / factor)


def rotary_tables(frequency: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, fp32 [B, T, 1, head_dim / 2], of positions [B, T]."""
    angle = positions[..., None, None].float() * frequency
    return angle.cos(), angle.sin()


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(x, cos, sin):
        first, second = x.float().chunk(2, dim=-1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _, cos, sin = inputs
        ctx.save_for_backward(cos, sin)

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        return _Rotate.apply(grad, cos, -sin), None, None


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotates x [B, T, heads, head_dim] (halves paired as in Hugging Face models); saves only the tables."""
    return _Rotate.apply(x, cos, sin)
