"""Advantages of a group: how much better a completion is than the others sampled for the same prompt.

GRPO (arXiv 2402.03300, section 4.1.2) takes ``(reward - mean) / std`` over the group; Dr. GRPO (arXiv 2503.20783,
section 3.1) leaves the division out, which gives nearly solved and nearly hopeless prompts no extra weight. Of a group
whose rewards are all equal every advantage is 0; DAPO (arXiv 2503.14476, section 3.2) drops such groups, so that they
do not thin out the mean of the loss.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from eightfold.train.rl.options import require, require_finite


@dataclass(frozen=True)
class AdvantageOptions:
    """normalize_std: divide by the group's standard deviation (over n - 1) plus eps; without, Dr. GRPO.
    dynamic_sampling: drop groups whose rewards are all equal (DAPO)."""

    normalize_std: bool = True
    eps: float = 1e-6
    dynamic_sampling: bool = False

    def __post_init__(self):
        require_finite("eps", self.eps)
        require(self.eps >= 0, "eps", "0 or more", self.eps)


@dataclass(frozen=True)
class OverlongOptions:
    """Soft punishment of long completions (DAPO, equation 13): within the last ``buffer`` tokens before the limit the
    reward falls linearly from 0 to ``-penalty``."""

    buffer: int
    penalty: float = 1.0

    def __post_init__(self):
        require(self.buffer > 0, "buffer", "1 or more tokens", self.buffer)
        require_finite("penalty", self.penalty)
        require(self.penalty >= 0, "penalty", "0 or more", self.penalty)


@dataclass(frozen=True)
class Advantages:
    """values: float64 [samples]. kept: bool [samples], False for samples of a dropped group: their tokens are to be
    masked or left out of the batch. groups, equal, dropped: how many groups there are, how many have rewards that are
    all equal, and how many are dropped."""

    values: Tensor
    kept: Tensor
    groups: int
    equal: int
    dropped: int


def group_advantages(
    rewards: Tensor, groups: Tensor, options: AdvantageOptions | None = None, penalties: Tensor | None = None
) -> Advantages:
    """Advantages of ``rewards`` float [samples] within groups, of which ``groups`` int64 [samples] holds each
    sample's: any integers, in any order, groups of any size.

    ``penalties`` float [samples] (``overlong_penalties``) are added to the rewards, but whether a group's rewards are
    all equal is asked without them: DAPO's dynamic sampling looks at correctness alone. A sample alone in its group
    has nothing to be compared with: its advantage is 0.
    """
    options = options or AdvantageOptions()
    _check(rewards, "rewards", len(rewards))
    if groups.dtype != torch.int64 or groups.shape != rewards.shape:
        raise ValueError(f"groups: expected int64 {tuple(rewards.shape)}, got {groups.dtype} {tuple(groups.shape)}")
    scores = rewards.double()
    if penalties is not None:
        _check(penalties, "penalties", len(rewards))
        scores = scores + penalties.double()
    # The few thousand samples of a step: a loop over groups costs nothing and each sum runs in a fixed order.
    values = torch.zeros_like(scores)
    kept = torch.ones_like(scores, dtype=torch.bool)
    names = groups.unique().tolist()
    equal = 0
    for name in names:
        members = (groups == name).nonzero().squeeze(1)
        same = bool((rewards[members] == rewards[members[0]]).all())
        equal += same
        if same and options.dynamic_sampling:
            kept[members] = False
        else:
            values[members] = _of_group(scores[members], options)
    return Advantages(values, kept, len(names), equal, equal if options.dynamic_sampling else 0)


def _of_group(scores: Tensor, options: AdvantageOptions) -> Tensor:
    if bool((scores == scores[0]).all()):  # exactly 0, whatever the rounding of their mean
        return torch.zeros_like(scores)
    centred = scores - scores.mean()
    return centred / (scores.std() + options.eps) if options.normalize_std else centred


def overlong_penalties(lengths: Tensor, limit: int, options: OverlongOptions) -> Tensor:
    """What is added to the rewards, float64 [samples], for completions of ``lengths`` int64 [samples] tokens; ``limit``
    is the longest a completion can get (DAPO, equation 13)."""
    if options.buffer > limit:
        raise ValueError(f"buffer: expected at most the limit of {limit} tokens, got {options.buffer}")
    if lengths.dtype != torch.int64 or lengths.dim() != 1:
        raise ValueError(f"lengths: expected int64 [samples], got {lengths.dtype} {tuple(lengths.shape)}")
    start = limit - options.buffer
    return -options.penalty * ((lengths - start).double() / options.buffer).clamp(0, 1)


def _check(values: Tensor, name: str, count: int) -> None:
    if not values.is_floating_point() or values.shape != (count,):
        raise ValueError(f"{name}: expected floating point [{count}], got {values.dtype} {tuple(values.shape)}")
    if not bool(values.isfinite().all()):
        where = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"{name}: expected finite numbers, got {values[where].item()} at {where}")
