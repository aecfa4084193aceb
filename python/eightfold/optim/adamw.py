"""AdamW with 8-bit states (COAT, arXiv 2410.19313, section 4): 2.08 bytes a parameter instead of 8."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import chain
from operator import attrgetter, itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from eightfold.ops.layouts import CODES
from eightfold.ops.optim import adamw_dre_
from eightfold.optim import sharding
from eightfold.optim.batch import STATES_8_BIT, Batch
from eightfold.optim.sharding import local

GRADIENT_LAYOUT = attrgetter("grad.layout")
EMPTY_EXPONENT = 255  # k = 16, what a group of zeros has


class AdamW(torch.optim.Optimizer):
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
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"AdamW: lr must have one element, got shape {tuple(lr.shape)}")
        if not isinstance(lr, Tensor) and not 0 <= lr < math.inf:
            raise ValueError(f"AdamW: lr must be finite and not negative, got {lr}")
        for i, beta in enumerate(betas):
            if not 0 <= beta < 1:
                raise ValueError(f"AdamW: betas[{i}] must be at least 0 and below 1, got {beta}")
        if not eps >= 0:
            raise ValueError(f"AdamW: eps must not be negative, got {eps}")
        if not weight_decay >= 0:
            raise ValueError(f"AdamW: weight_decay must not be negative, got {weight_decay}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"AdamW: max_grad_norm must be positive or None, got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self._rows: dict[Tensor, sharding.Rows] = {}
        self._batches: dict[int, tuple[Any, list[Batch]]] = {}
        self._lrs: dict[tuple[int, torch.device], tuple[float, Tensor]] = {}
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "stochastic_states": stochastic_states,
            "master_weights": master_weights,
            "seed": seed,
        }
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._rows, self._batches = {}, {}
        index = len(self.param_groups) - 1
        for i, param in enumerate(self.param_groups[-1]["params"]):
            if param.dtype not in (torch.float32, torch.bfloat16):
                raise ValueError(
                    f"AdamW: parameter {i} of group {index}, shape {tuple(param.shape)}, must be float32 or bfloat16, "
                    f"got {param.dtype}"
                )
            if sharding.takes_8_bit_states(param):
                sharding.rows_of(param, 0, f"parameter {i} of group {index}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm, "grad_norm": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._rows, self._batches, self._lrs = {}, {}, {}

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

    def state_bytes(self) -> int:
        """Bytes of all states in this process (moments, their metadata, masters, step counts)."""
        return sum(local(t).nbytes for state in self.state.values() for t in state.values() if isinstance(t, Tensor))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every parameter that has a gradient. Returns the closure's value, if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        scale = self._clip_scale()
        for index, group in enumerate(self.param_groups):
            for batch in self._batches_of(index, group):
                lr = self._lr_on(batch.device, index)
                device_scale = None if scale is None else scale.to(batch.device)
                torch._foreach_add_([state["step"] for state in batch.states], 1.0)
                if batch.eight_bit:  # first: its kernel is long, and hides the host's work for the others
                    self._step_8_bit(batch, group, lr, device_scale)
                if batch.plain:
                    self._step_32_bit(batch.plain, group, lr, device_scale)
        return loss

    def _batches_of(self, index: int, group: dict[str, Any]) -> list[Batch]:
        """The group's parameters that have gradients, by device; those of the last step where nothing has changed."""
        params = [p for p in group["params"] if p.grad is not None]
        if set(map(GRADIENT_LAYOUT, params)) - {torch.strided}:
            bad = next(p for p in params if p.grad.layout != torch.strided)
            raise RuntimeError(
                f"AdamW: a gradient of shape {tuple(bad.shape)} has layout {bad.grad.layout}; only dense gradients are "
                "supported"
            )
        key, batches = self._batches.get(index, (None, []))
        if key is None or key != self._key(params):
            split: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
            for param in params:
                split[param.device][sharding.takes_8_bit_states(param)].append(param)
            batches = []
            for device, (plain, eight_bit) in split.items():
                states, rows = [self._state_of(p, group) for p in eight_bit + plain], map(self._rows_of, eight_bit)
                batches.append(Batch(device, eight_bit, plain, states, list(rows)))
            self._batches[index] = self._key(params), batches
        return batches

    def _key(self, params: list[Tensor]) -> tuple[list, list, list]:
        # Batches hold on to their parameters and states, so that these ids are not given to others meanwhile.
        return list(map(id, params)), [p.device for p in params], list(map(id, self.state.values()))

    def _clip_scale(self) -> Tensor | None:
        """What gradients are multiplied by, a float32 tensor; None without clipping."""
        if self.max_grad_norm is None:
            return None
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        if not grads:
            return None
        self.grad_norm = sharding.total_norm(grads)
        return (self.max_grad_norm / (self.grad_norm + 1e-6)).clamp(max=1.0)

    def _lr_on(self, device: torch.device, index: int) -> Tensor:
        lr = self.param_groups[index]["lr"]
        if isinstance(lr, Tensor):
            return lr.detach().to(device=device, dtype=torch.float32)
        value, tensor = self._lrs.get((index, device), (None, None))
        if tensor is None:
            tensor = torch.full((), lr, dtype=torch.float32, device=device)
        elif value != lr:
            tensor.fill_(lr)
        self._lrs[index, device] = (lr, tensor)
        return tensor

    def _step_8_bit(self, batch: Batch, group: dict[str, Any], lr: Tensor, scale: Tensor | None) -> None:
        params, states = batch.eight_bit, batch.states[: len(batch.eight_bit)]
        targets, nothing = params, lr.new_empty(0)
        masters = [s.get("master", nothing) for s in states]
        parts: list[Any] = list(zip(*map(itemgetter(*STATES_8_BIT), states), strict=True))
        if batch.sharded:
            targets, masters, *parts = ([local(t) for t in tensors] for tensors in (params, masters, *parts))
        dense = [t.contiguous() for t in targets]
        adamw_dre_(
            dense,
            [_dense_grad(p) for p in params],
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
        for target, updated in zip(targets, dense, strict=True):
            if updated is not target:  # a parameter that is not contiguous was updated as a copy
                target.copy_(updated)
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
        grads = [_dense_grad(p).float() for p in params]
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

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes over the exact bytes of a state dict (torch's own method would cast them to the parameters' dtype)."""
        hidden = {
            key: {name: _AsIs(v) if isinstance(v, Tensor) else v for name, v in entry.items()}
            for key, entry in state_dict["state"].items()
        }
        super().load_state_dict({**state_dict, "state": hidden})
        for index, group in enumerate(self.param_groups):
            for i, param in enumerate(group["params"]):
                if param not in self.state:
                    continue
                loaded = {k: v.tensor if isinstance(v, _AsIs) else v for k, v in self.state.pop(param).items()}
                name = f"parameter {i} of group {index}, shape {tuple(param.shape)}"
                self.state[param] = _fitted(loaded, self._state_of(param, group), param, name)


class _AsIs:
    """Hides a tensor from torch.optim.Optimizer.load_state_dict, which casts every tensor it sees."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def _fitted(loaded: dict[str, Any], expected: dict[str, Tensor], param: Tensor, name: str) -> dict[str, Tensor]:
    """Copies of ``loaded`` on the parameter's device, checked against the state a fresh parameter would have."""
    if loaded.keys() != expected.keys():
        raise ValueError(f"AdamW: the loaded state of {name} must have {sorted(expected)}, got {sorted(loaded)}")
    for key, want in expected.items():
        got = loaded[key] = torch.as_tensor(loaded[key])
        if got.shape != want.shape or got.dtype != want.dtype or type(got) is not type(want):
            raise ValueError(
                f"AdamW: the loaded {key} of {name} must be a {type(want).__name__} of shape {tuple(want.shape)} and "
                f"{want.dtype}, got a {type(got).__name__} of shape {tuple(got.shape)} and {got.dtype}"
            )
    return {key: value.detach().to(device=param.device, copy=True) for key, value in loaded.items()}


def _dense_grad(param: Tensor) -> Tensor:
    grad = param.grad
    if isinstance(grad, DTensor):
        grad = grad.to_local()
    if not grad.is_contiguous():
        grad = grad.contiguous()
    return grad if grad.dtype in (torch.float32, torch.bfloat16) else grad.float()


def _bias_corrections(steps: list[Tensor], beta: float) -> list[Tensor]:
    """1 - beta^step as -expm1(step log(beta)), which does not cancel."""
    if beta == 0:
        return [torch.ones_like(step) for step in steps]
    return torch._foreach_neg(torch._foreach_expm1(torch._foreach_mul(steps, math.log(beta))))
