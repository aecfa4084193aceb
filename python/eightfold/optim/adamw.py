"""AdamW with 8-bit states (COAT, arXiv 2410.19313, section 4): 2.08 bytes a parameter instead of 8."""

import math
from collections.abc import Iterable
from itertools import chain
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from eightfold.ops.layouts import CODES
from eightfold.ops.optim import adamw_dre_
from eightfold.optim import sharding
from eightfold.optim.base import KernelOptimizer, copy_back, dense_grad
from eightfold.optim.batch import STATES_8_BIT, Batch
from eightfold.optim.sharding import local

EMPTY_EXPONENT = 255  # k = 16, what a group of zeros has


class AdamW(KernelOptimizer):
    """torch.optim.AdamW with both moments in E4M3 and dynamic range expansion.

    Parameters with at least two dimensions and rows (``numel / size(0)``) of at least 64 elements have 8-bit states;
    norm weights, biases and tiny matrices keep float32 moments (and a float32 master where they are bfloat16). The
    global shape alone decides, groups of 128 never cross rows, and random bits depend on the global index of an
    element: states, parameters and checkpoints do not depend on how parameters are sharded. DTensor parameters (FSDP2)
    may be Shard(0) or Replicate on each mesh dimension; their states are DTensors of the same placements.

    bfloat16 parameters are rounded stochastically, with bits that depend on ``seed``, the step and the element only,
    or to nearest from a float32 master with ``master_weights=True``.

    With ``lr`` a float32 tensor on the parameters' device, ``step`` can be captured in a CUDA graph.

    Args:
        params: parameters (float32 or bfloat16) or groups of them.
        lr: learning rate, a float or a tensor of one element.
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, ``p *= 1 - lr * weight_decay``.
        max_grad_norm: gradients are scaled so that their global norm is at most this. They are scaled as they are
            read: ``.grad`` is not rewritten. ``grad_norm`` holds the norm of the last step.
        stochastic_states: round the stored moments stochastically. Helps at beta2 = 0.999, costs accuracy at 0.95.
        master_weights: keep a float32 copy of bfloat16 parameters (4 bytes more a parameter).
        seed: of the random bits.

    Raises:
        ValueError: an option out of range, a parameter of another dtype, placements that split rows, a state dict whose
            tensors do not fit the parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        max_grad_norm: float | None = None,
        stochastic_states: bool = False,
        master_weights: bool = False,
        seed: int = 0,
    ):
        if not eps >= 0:
            raise ValueError(f"AdamW: eps must not be negative, got {eps}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_states": stochastic_states,
            "master_weights": master_weights,
            "seed": seed,
        }
        super().__init__(params, defaults, max_grad_norm)

    def _forget(self) -> None:
        super()._forget()
        self._rows: dict[Tensor, sharding.Rows] = {}

    def _check_param(self, param: Tensor, name: str) -> None:
        super()._check_param(param, name)
        if sharding.takes_8_bit_states(param):
            sharding.rows_of(param, 0, name)

    def _rows_of(self, param: Tensor) -> sharding.Rows:
        if not self._rows:
            first = 0
            for p in chain.from_iterable(group["params"] for group in self.param_groups):
                if sharding.takes_8_bit_states(p):
                    self._rows[p] = sharding.rows_of(p, first, "a parameter")
                first += sharding.stream_size(p)
        return self._rows[param]

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[param]
        if state:
            return state
        here = local(param.detach())
        state["step"] = torch.zeros((), dtype=torch.float32, device=here.device)
        if sharding.takes_8_bit_states(param):
            groups = self._rows_of(param).groups
            for moment in "mv":
                codes = torch.zeros(here.shape, dtype=CODES, device=here.device)
                maxima = torch.zeros((here.shape[0], groups), dtype=torch.float32, device=here.device)
                exponents = torch.full_like(maxima, EMPTY_EXPONENT, dtype=torch.uint8)
                state[f"{moment}_codes"] = sharding.state_like(param, codes)
                state[f"{moment}_maxima"] = sharding.state_like(param, maxima, groups)
                state[f"{moment}_exponents"] = sharding.state_like(param, exponents, groups)
            needs_master = param.dtype == torch.bfloat16 and group["master_weights"]
        else:
            for name in ("exp_avg", "exp_avg_sq"):
                zeros = torch.zeros(here.shape, dtype=torch.float32, device=here.device)
                state[name] = sharding.state_like(param, zeros)
            needs_master = param.dtype == torch.bfloat16
        if needs_master:
            state["master"] = sharding.state_like(param, here.float().contiguous())
        return state

    def _make_batch(self, params: list[Tensor], group: dict[str, Any]) -> Batch:
        plain, eight_bit = ([p for p in params if sharding.takes_8_bit_states(p) is want] for want in (False, True))
        states = [self.state[p] for p in eight_bit]
        return Batch(eight_bit, plain, states, list(map(self._rows_of, eight_bit)))

    def _step(self, batch: Batch, group: dict[str, Any], lr: Tensor, scale: Tensor | None) -> None:
        if batch.eight_bit:  # first: its kernel is long, and hides the host's work for the others
            self._step_8_bit(batch, group, lr, scale)
        if batch.plain:
            self._step_32_bit(batch.plain, group, lr, scale)

    def _step_8_bit(self, batch: Batch, group: dict[str, Any], lr: Tensor, scale: Tensor | None) -> None:
        params, states = batch.eight_bit, batch.states
        targets, nothing = params, lr.new_empty(0)
        masters = [s.get("master", nothing) for s in states]
        parts: list[Any] = list(zip(*map(itemgetter(*STATES_8_BIT), states), strict=True))
        if batch.sharded:
            targets, masters, *parts = ([local(t) for t in tensors] for tensors in (params, masters, *parts))
        dense = [t.contiguous() for t in targets]
        adamw_dre_(
            dense,
            [dense_grad(p) for p in params],
            masters,
            *map(list, parts),
            [r.length for r in batch.rows],
            [r.offset for r in batch.rows],
            [s["step"] for s in states],
            lr,
            scale,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            stochastic_states=group["stochastic_states"],
            seed=group["seed"],
        )
        copy_back(targets, dense)
        torch.autograd.graph.increment_version(params)

    def _step_32_bit(self, params: list[Tensor], group: dict[str, Any], lr: Tensor, scale: Tensor | None) -> None:
        # One IEEE operation at a time: fused forms (lerp, addcmul) round vector bodies and tails differently, and then
        # values would depend on the sharding.
        params = [p for p in params if local(p).numel()]
        if not params:
            return
        states = [self.state[p] for p in params]
        targets = [local(p.detach()) for p in params]
        values = [local(s["master"]) if "master" in s else t for s, t in zip(states, targets, strict=True)]
        m, v = ([local(s[name]) for s in states] for name in ("exp_avg", "exp_avg_sq"))
        steps = [s["step"] for s in states]
        grads = [dense_grad(p).float() for p in params]
        if scale is not None:
            grads = torch._foreach_mul(grads, scale)
        for moment, factor, beta in zip((m, v), (None, grads), group["betas"], strict=True):
            fresh = torch._foreach_mul(grads, 1 - beta)
            if factor is not None:
                torch._foreach_mul_(fresh, factor)
            torch._foreach_mul_(moment, beta)
            torch._foreach_add_(moment, fresh)
        correction1, correction2 = (_bias_corrections(steps, beta) for beta in group["betas"])
        denominators = torch._foreach_div(torch._foreach_sqrt(v), torch._foreach_sqrt(correction2))
        torch._foreach_add_(denominators, group["eps"])
        updates = torch._foreach_div(torch._foreach_div(m, denominators), correction1)
        torch._foreach_mul_(updates, lr)
        torch._foreach_mul_(values, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(values, updates)
        for target, value in zip(targets, values, strict=True):
            if target is not value:
                target.copy_(value)
        torch.autograd.graph.increment_version(params)


def _bias_corrections(steps: list[Tensor], beta: float) -> list[Tensor]:
    """1 - beta^step as -expm1(step log(beta)), which does not cancel."""
    if beta == 0:
        return [torch.ones_like(step) for step in steps]
    return torch._foreach_neg(torch._foreach_expm1(torch._foreach_mul(steps, math.log(beta))))
