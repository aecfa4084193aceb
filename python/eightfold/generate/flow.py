"""Solvers of a flow from noise (sigma 1) to data (sigma 0): Flow-DPM-Solver++(2M) and Euler.

A point is x = (1 - sigma) x0 + sigma * noise and the model gives the velocity noise - x0, so that it predicts
x0 = x - sigma * velocity. Every step of both solvers is then

    x_next = keep * x + now * x0 + before * x0_previous

with numbers that the schedule fixes before the first step: nothing here asks the device for a value.

DPM-Solver++(2M) from a to b (arXiv 2211.01095; for flows arXiv 2410.10629, algorithm 1): with h the step in
lambda = log((1 - sigma) / sigma) and h_p the one before, keep = sigma_b / sigma_a, now = g (1 + h / 2 h_p) and
before = -g h / 2 h_p. There g = -(1 - sigma_b) expm1(-h), which for a flow is 1 - keep. The first and the last step are
of first order: now = g and before = 0, which is Euler's step; the last one, to sigma 0, gives x0 itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TIMES = 1000  # a model's time at sigma 1


class FlowStep(NamedTuple):
    """The coefficients of one step."""

    sigma: float
    keep: float
    now: float
    before: float


@dataclass(frozen=True)
class FlowSchedule:
    """`sigmas`: where each step begins, and 0 at the end. `times`: what the model is given at each step, but for a
    config's `timestep_scale`. `steps`: the coefficients for `flow_step`."""

    sigmas: tuple[float, ...]
    times: tuple[float, ...]
    steps: tuple[FlowStep, ...]

    def tensors(self, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """(times [steps], coefficients [steps, 4]) in float32, for a graph that is replayed once a step."""
        return tuple(torch.tensor(values, dtype=torch.float32, device=device) for values in (self.times, self.steps))


def flow_dpm(steps: int, shift: float = 3.0) -> FlowSchedule:
    """Flow-DPM-Solver++(2M): one call of the model a step; times are cut to integers, as the model was trained.

    `shift` moves steps towards noise (SANA: 3; at 4096 px 6). ValueError naming the argument.
    """
    _check(steps, shift)
    uniform = 1.0 - np.linspace(1, 1 / TIMES, steps + 1)
    sigmas = shifted(uniform, shift)[:0:-1]  # descending, without the 0 at their start
    return _schedule(sigmas.tolist(), [int(time) for time in sigmas * TIMES], order=2)


def flow_euler(steps: int, shift: float = 3.0) -> FlowSchedule:
    """First-order steps, on the grid of diffusers' FlowMatchEulerDiscreteScheduler: its ends are shifted twice.

    Arguments and errors as of `flow_dpm`; times are not cut.
    """
    _check(steps, shift)
    smallest = float(shifted(np.float32(1 / TIMES), shift))
    sigmas = shifted(np.linspace(TIMES, TIMES * smallest, steps) / TIMES, shift).astype(np.float32)
    return _schedule(sigmas.tolist(), (sigmas * np.float32(TIMES)).tolist(), order=1)


def flow_step(
    x: Tensor, velocity: Tensor, previous: Tensor | None, step: Sequence[float] | Tensor
) -> tuple[Tensor, Tensor]:
    """(x after the step, the x0 that was predicted), both float32, of any shape.

    `previous`: the x0 of the step before; on the first step None, or anything finite. `step`: a `FlowStep`, or its
    four numbers as a tensor [4] on x's device.
    """
    sigma, keep, now, before = step
    x = x.float()
    predicted = x - sigma * velocity.float()
    result = keep * x + now * predicted
    return (result if previous is None else result + before * previous), predicted


def solve(schedule: FlowSchedule, velocity: Callable[[Tensor, float], Tensor], noise: Tensor) -> Tensor:
    """Data, float32, from `noise`; `velocity(x, time)` is called once a step."""
    x, previous = noise, None
    for time, step in zip(schedule.times, schedule.steps, strict=True):
        x, previous = flow_step(x, velocity(x, time), previous, step)
    return x


def _check(steps: int, shift: float) -> None:
    if not isinstance(steps, int) or not 1 <= steps < TIMES:
        raise ValueError(f"steps: expected 1 to {TIMES - 1}, got {steps!r}")
    if not 1e-3 <= shift <= 1e3:  # further out, sigmas round to 0 or 1
        raise ValueError(f"shift: expected 0.001 to 1000, got {shift!r}")


def shifted(sigmas, shift: float):
    return shift * sigmas / (1 + (shift - 1) * sigmas)


def _schedule(sigmas: list[float], times: list[float], order: int) -> FlowSchedule:
    ends, steps, h_before = [*sigmas[1:], 0.0], [], None
    for begin, end in zip(sigmas, ends, strict=True):
        keep, ahead = end / begin, 0.0
        if order == 2 and end > 0:
            h = _log_ratio(end) - _log_ratio(begin)
            ahead = 0.0 if h_before is None else h / (2 * h_before)
            h_before = h
        steps.append(FlowStep(begin, keep, (1 - keep) * (1 + ahead), -(1 - keep) * ahead))
    return FlowSchedule((*sigmas, 0.0), tuple(times), tuple(steps))


def _log_ratio(sigma: float) -> float:
    return math.log((1 - sigma) / sigma)
