"""What a step is watched by: sums that add up over micro-batches and processes, and the means they give.

Of the mismatch between rollout and training the mean hides the tail, so its maximum is kept beside it. With
``d = log p_train - log p_rollout`` of a sampled token: mean and max ``|d|``; the k3 estimate ``exp(d) - d - 1`` of
KL(rollout, train), never negative; and mean ``exp|d|``, the token multiplicative probability error, 1 where both
agree.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from eightfold.train.distributed import World
from eightfold.train.rl.advantages import Advantages

Number = float | Tensor  # a Python number, or a 0-d float64 tensor that stays on its device until it is read


LARGEST = {"largest": True}  # marks fields of which the sum keeps the larger one


@dataclass(frozen=True)
class _Sums:
    """Fields add up, those marked ``LARGEST`` keep the larger one."""

    def __add__(self, other):
        values = {}
        for each in dataclasses.fields(self):
            a, b = getattr(self, each.name), getattr(other, each.name)
            values[each.name] = _larger(a, b) if "largest" in each.metadata else a + b
        return type(self)(**values)

    def numbers(self):
        """The same with Python numbers; reads all tensors in one transfer."""
        values = [getattr(self, each.name) for each in dataclasses.fields(self)]
        tensors = [value for value in values if torch.is_tensor(value)]
        read = iter(torch.stack(tensors).tolist() if tensors else [])
        return type(self)(*(next(read) if torch.is_tensor(value) else float(value) for value in values))

    def over(self, world: World):
        """The sums over all processes, in each of them."""
        return functools.reduce(operator.add, world.gather(self.numbers()))


def _larger(a: Number, b: Number) -> Number:
    if torch.is_tensor(a) or torch.is_tensor(b):
        tensor = a if torch.is_tensor(a) else b
        return torch.maximum(
            torch.as_tensor(a, dtype=tensor.dtype, device=tensor.device), torch.as_tensor(b).to(tensor)
        )
    return max(a, b)


@dataclass(frozen=True)
class TokenMeters(_Sums):
    """Sums over the tokens that count in the loss. ``*_tokens`` say over how many a quantity was measured."""

    tokens: Number = 0.0
    clipped_low: Number = 0.0
    clipped_high: Number = 0.0
    entropy_tokens: Number = 0.0
    entropy: Number = 0.0
    reference_tokens: Number = 0.0
    reference_kl: Number = 0.0
    rollout_tokens: Number = 0.0
    delta: Number = 0.0
    delta_max: Number = field(default=0.0, metadata=LARGEST)
    rollout_kl: Number = 0.0
    probability_error: Number = 0.0
    corrected: Number = 0.0

    def means(self) -> dict[str, float]:
        """For a log: what was measured, as means over tokens."""
        sums = self.numbers()
        found: dict[str, float] = {}
        if sums.tokens:
            found["clip_low"] = sums.clipped_low / sums.tokens
            found["clip_high"] = sums.clipped_high / sums.tokens
            found["clip_fraction"] = (sums.clipped_low + sums.clipped_high) / sums.tokens
        if sums.entropy_tokens:
            found["entropy"] = sums.entropy / sums.entropy_tokens
        if sums.reference_tokens:
            found["reference_kl"] = sums.reference_kl / sums.reference_tokens
        if sums.rollout_tokens:
            found["delta_logp_mean"] = sums.delta / sums.rollout_tokens
            found["delta_logp_max"] = sums.delta_max
            found["rollout_kl"] = sums.rollout_kl / sums.rollout_tokens
            found["probability_error"] = sums.probability_error / sums.rollout_tokens
            found["correction_clipped"] = sums.corrected / sums.rollout_tokens
        return found


@dataclass(frozen=True)
class SampleMeters(_Sums):
    """Sums over the samples and groups of a step."""

    samples: float = 0.0
    reward: float = 0.0
    reward_square: float = 0.0
    length: float = 0.0
    length_max: float = field(default=0.0, metadata=LARGEST)
    truncated: float = 0.0
    verifier_failures: float = 0.0
    groups: float = 0.0
    groups_equal: float = 0.0
    groups_dropped: float = 0.0

    @classmethod
    def of(
        cls, rewards: Tensor, lengths: Tensor, truncated: Tensor, advantages: Advantages, verifier_failures: int = 0
    ) -> SampleMeters:
        """Of one step's samples: ``rewards`` float, ``lengths`` int64 (tokens of the completion) and ``truncated`` bool
        (ended by the length limit), all [samples], and the ``advantages`` made of them."""
        for name, values in (("lengths", lengths), ("truncated", truncated)):
            if values.shape != rewards.shape:
                raise ValueError(f"{name}: expected {tuple(rewards.shape)} like rewards, got {tuple(values.shape)}")
        rewards = rewards.double()
        return cls(
            samples=float(len(rewards)),
            reward=rewards.sum().item(),
            reward_square=rewards.square().sum().item(),
            length=float(lengths.sum()),
            length_max=float(lengths.max()) if len(lengths) else 0.0,
            truncated=float(truncated.sum()),
            verifier_failures=float(verifier_failures),
            groups=float(advantages.groups),
            groups_equal=float(advantages.equal),
            groups_dropped=float(advantages.dropped),
        )

    def means(self) -> dict[str, float]:
        """For a log; the standard deviation is that of all samples, over n."""
        if not self.samples:
            return {}
        mean = self.reward / self.samples
        return {
            "reward_mean": mean,
            "reward_std": max(0.0, self.reward_square / self.samples - mean * mean) ** 0.5,
            "length_mean": self.length / self.samples,
            "length_max": self.length_max,
            "truncation_rate": self.truncated / self.samples,
            "verifier_failures": self.verifier_failures,
            "groups_equal": self.groups_equal / self.groups,
            "groups_dropped": self.groups_dropped / self.groups,
        }
