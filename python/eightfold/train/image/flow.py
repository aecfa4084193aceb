"""The flow-matching objective of SANA as released (arXiv 2410.10629).

With n normal(mean, std), sigma = floor(1000 sigmoid(n)) / 1000 is moved to s = shift sigma / (1 + (shift - 1) sigma).
The model sees x = (1 - s) x0 + s noise at the time floor(1000 s), and is to
give the velocity noise - x0: the loss is the mean square of the difference, the same for all times.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eightfold.generate.flow import TIMES, shifted
from eightfold.train.image.config import FlowConfig


@dataclass(frozen=True)
class Noised:
    """Latents at random times of the flow, float32 [B, C, H, W] each, the model's times [B] float32 (to be multiplied
    by a config's `timestep_scale`), and whose captions are to be left out, bool [B]."""

    points: Tensor
    velocities: Tensor
    times: Tensor
    dropped: Tensor

    def part(self, places: slice, device: torch.device | str) -> Noised:
        return Noised(*(each[places].to(device) for each in (self.points, self.velocities, self.times, self.dropped)))


def noised(latents: Tensor, options: FlowConfig, generator: np.random.Generator, training: bool = True) -> Noised:
    """Draws times, noise and (in training) which captions to drop for `latents` [B, C, H, W] on the CPU."""
    count = len(latents)
    normal = options.mean + options.std * generator.standard_normal(count)
    sigma = np.floor(TIMES / (1 + np.exp(-normal))) / TIMES
    share = shifted(sigma, options.shift)
    noise = torch.from_numpy(generator.standard_normal(tuple(latents.shape), dtype=np.float32))
    dropped = generator.random(count) < (options.drop_caption if training else 0.0)
    weight = torch.from_numpy(share.astype(np.float32))[:, None, None, None]
    clean = latents.float()
    times = torch.from_numpy(np.floor(TIMES * share).astype(np.float32))
    return Noised((1 - weight) * clean + weight * noise, noise - clean, times, torch.from_numpy(dropped))


def flow_loss(velocities: Tensor, wanted: Tensor) -> Tensor:
    """The sum over pictures of the mean square of the difference, a float32 scalar; both [B, C, H, W]."""
    return (velocities.float() - wanted).square().mean(dim=(1, 2, 3)).sum()
