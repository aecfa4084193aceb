"""Angles of the rotary position embedding: frequencies (default, linear, llama3 scaling), fp32."""

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
