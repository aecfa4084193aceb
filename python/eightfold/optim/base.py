"""What optimizers over multi-tensor kernels share: batches kept between steps, rates on the device, checkpoints."""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from eightfold.optim import sharding
from eightfold.optim.sharding import local

GRADIENT_LAYOUT = attrgetter("grad.layout")


class KernelOptimizer(torch.optim.Optimizer):
    """Updates the parameters of a group and a device together; a subclass says what their states are and how.

    Every state has a ``step``, a float32 tensor of one element on the parameter's device, counted here.
    """

    def __init__(self, params: Iterable[Any], defaults: dict[str, Any], max_grad_norm: float | None):
        lr, weight_decay = defaults["lr"], defaults["weight_decay"]
        if isinstance(lr, Tensor) and lr.numel() != 1:
            raise ValueError(f"{self.name}: lr must have one element, got shape {tuple(lr.shape)}")
        if not isinstance(lr, Tensor) and not 0 <= lr < math.inf:
            raise ValueError(f"{self.name}: lr must be finite and not negative, got {lr}")
        for i, beta in enumerate(defaults["betas"]):
            if not 0 <= beta < 1:
                raise ValueError(f"{self.name}: betas[{i}] must be at least 0 and below 1, got {beta}")
        if not weight_decay >= 0:
            raise ValueError(f"{self.name}: weight_decay must not be negative, got {weight_decay}")
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise ValueError(f"{self.name}: max_grad_norm must be positive or None, got {max_grad_norm}")
        self.max_grad_norm = max_grad_norm
        self.grad_norm: Tensor | None = None
        self._forget()
        super().__init__(params, defaults)

    @property
    def name(self) -> str:
        """As messages call the optimizer."""
        return type(self).__name__

    def _forget(self) -> None:
        """Drops what was worked out from parameters and groups."""
        self._batches: dict[int, tuple[Any, list[tuple[torch.device, list[dict[str, Any]], Any]]]] = {}
        self._lrs: dict[tuple[int, torch.device], tuple[float, Tensor]] = {}

    def _check_param(self, param: Tensor, name: str) -> None:
        """Raises ValueError for a parameter that cannot be optimized."""
        if param.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(
                f"{self.name}: {name}, shape {tuple(param.shape)}, must be float32 or bfloat16, got {param.dtype}"
            )

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        """The parameter's state, made if there is none."""
        raise NotImplementedError

    def _make_batch(self, params: list[Tensor], group: dict[str, Any]) -> Any:
        """What ``_step`` wants to know of parameters of one group on one device. They have states."""
        raise NotImplementedError

    def _step(self, batch: Any, group: dict[str, Any], lr: Tensor, scale: Tensor | None) -> None:
        """Updates a batch; gradients are to be multiplied by ``scale``."""
        raise NotImplementedError

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        self._forget()
        index = len(self.param_groups) - 1
        for i, param in enumerate(self.param_groups[-1]["params"]):
            self._check_param(param, f"parameter {i} of group {index}")

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "max_grad_norm": self.max_grad_norm, "grad_norm": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._forget()

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
            for device, states, batch in self._batches_of(index, group):
                lr = self._lr_on(device, index)
                torch._foreach_add_([state["step"] for state in states], 1.0)
                self._step(batch, group, lr, None if scale is None else scale.to(device))
        return loss

    def _batches_of(self, index: int, group: dict[str, Any]) -> list[tuple[torch.device, list[dict[str, Any]], Any]]:
        """The group's parameters that have gradients, by device; those of the last step where nothing has changed."""
        params = [p for p in group["params"] if p.grad is not None]
        if set(map(GRADIENT_LAYOUT, params)) - {torch.strided}:
            bad = next(p for p in params if p.grad.layout != torch.strided)
            raise RuntimeError(
                f"{self.name}: a gradient of shape {tuple(bad.shape)} has layout {bad.grad.layout}; only dense "
                "gradients are supported"
            )
        key, batches = self._batches.get(index, (None, []))
        if key is None or key != self._key(params):
            split: dict[torch.device, list[Tensor]] = defaultdict(list)
            for param in params:
                split[param.device].append(param)
            batches = [
                (device, [self._state_of(p, group) for p in some], self._make_batch(some, group))
                for device, some in split.items()
            ]
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
                self.state[param] = self._fitted(loaded, self._state_of(param, group), param, name)

    def _fitted(
        self, loaded: dict[str, Any], expected: dict[str, Tensor], param: Tensor, name: str
    ) -> dict[str, Tensor]:
        """Copies of ``loaded`` on the parameter's device, checked against the state a fresh parameter would have."""
        if loaded.keys() != expected.keys():
            raise ValueError(
                f"{self.name}: the loaded state of {name} must have {sorted(expected)}, got {sorted(loaded)}"
            )
        for key, want in expected.items():
            got = loaded[key] = torch.as_tensor(loaded[key])
            if got.shape != want.shape or got.dtype != want.dtype or type(got) is not type(want):
                raise ValueError(
                    f"{self.name}: the loaded {key} of {name} must be a {type(want).__name__} of shape "
                    f"{tuple(want.shape)} and {want.dtype}, got a {type(got).__name__} of shape {tuple(got.shape)} and "
                    f"{got.dtype}"
                )
        return {key: value.detach().to(device=param.device, copy=True) for key, value in loaded.items()}


class _AsIs:
    """Hides a tensor from torch.optim.Optimizer.load_state_dict, which casts every tensor it sees."""

    def __init__(self, tensor: Tensor):
        self.tensor = tensor


def dense_grad(param: Tensor) -> Tensor:
    """The local gradient, contiguous, float32 or bfloat16."""
    grad = param.grad
    if isinstance(grad, DTensor):
        grad = grad.to_local()
    if not grad.is_contiguous():
        grad = grad.contiguous()
    return grad if grad.dtype in (torch.float32, torch.bfloat16) else grad.float()


def copy_back(targets: list[Tensor], dense: list[Tensor]) -> None:
    """Into parameters that are not contiguous and were updated as copies."""
    for target, updated in zip(targets, dense, strict=True):
        if updated is not target:
            target.copy_(updated)
