"""The exponential moving mean of a model's weights, in fp32 or bf16."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from eightfold.train.image.config import EmaConfig

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_ONES = 0xFFFF  # the low half of a float32, which bfloat16 has not


class WeightMean:
    """`tensors` by the names of the model's parameters. After step n the decay is at most (1 + n) / (10 + n), so that
    the first weights are soon forgotten. In bf16 the mean is rounded stochastically, with bits that depend on `seed`
    and step alone: to nearest, a step smaller than half a unit in the last place would never move it."""

    def __init__(self, model: nn.Module, config: EmaConfig, seed: int):
        self.decay, self.seed, dtype = config.decay, seed, _DTYPES[config.dtype]
        self.tensors = {name: p.detach().to(dtype, copy=True) for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after `step` steps."""
        share = 1 - min(self.decay, (1 + step) / (10 + step))
        generator = None
        for name, parameter in model.named_parameters():
            mean = self.tensors[name]
            if mean.dtype == torch.float32:
                mean.lerp_(parameter.float(), share)
                continue
            if generator is None:
                generator = torch.Generator(parameter.device).manual_seed(self.seed * 2**32 + step)
            mean.copy_(stochastic_bf16(mean.float().lerp(parameter.float(), share), generator))

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        for name, mean in self.tensors.items():
            mean.copy_(tensors[name])


def stochastic_bf16(x: Tensor, generator: torch.Generator) -> Tensor:
    """bfloat16 of finite float32, up or down with probabilities such that the mean is x."""
    bits = torch.randint(0, _ONES + 1, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + bits) & ~_ONES).view(torch.float32).to(torch.bfloat16)
