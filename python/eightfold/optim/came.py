"""CAME with its first moment in 8 bits (arXiv 2307.02047; SANA-1.5, arXiv 2501.18427): 1 byte a parameter."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from eightfold.ops.layouts import ceil_div
from eightfold.ops.optim import CAME_BLOCK, came8bit_
from eightfold.optim import sharding
from eightfold.optim.base import KernelOptimizer, copy_back, dense_grad

STATES = ("exp_avg", "exp_avg_scales", "v_rows", "v_cols", "u_rows", "u_cols", "step")


@dataclass
class Batch:
    """Parameters of one group on one device, their states, and where each starts in the stream of random bits."""

    params: list[Tensor]
    states: list[dict[str, Tensor]]
    offsets: list[int]


class CAME8bit(KernelOptimizer):
    """CAME: an Adafactor whose step is damped where the update keeps disagreeing with its running mean.

    Matrices (two dimensions, and convolutions of 1 x 1) have factored second moments, a mean for each row and column,
    and as many for the confidence. Those of more than ``quantize_above`` elements keep their first moment in a byte an
    element with a scale and a minimum for every 2,048 consecutive elements; all other first moments are float32.
    Vectors and larger convolutions have a whole second moment and no confidence. There is no bias correction; the
    clipping bounds the first steps as all others.

    bfloat16 parameters are rounded stochastically, with bits that depend on ``seed``, the step and the element only.
    With ``lr`` a float32 tensor on the parameters' device, ``step`` can be captured in a CUDA graph. A NaN or Inf in a
    gradient makes that parameter and its state NaN.

    Args:
        params: parameters (float32 or bfloat16) or groups of them.
        lr: learning rate, a float or a tensor of one element.
        betas: decay of the first moment, of the second moment and of the confidence.
        eps: added to the squared gradient and to the squared distance of update and first moment.
        weight_decay: decoupled decay, ``p *= 1 - lr * weight_decay``.
        clip_threshold: root mean square that an update may have.
        max_grad_norm: gradients are scaled so that their global norm is at most this. They are scaled as they are
            read: ``.grad`` is not rewritten. ``grad_norm`` holds the norm of the last step.
        quantize_above: matrices of more elements than this have an 8-bit first moment.
        seed: of the random bits.

    Raises:
        ValueError: an option out of range, a parameter of another dtype or sharded (a DTensor), a state dict whose
            tensors do not fit the parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-4,
        betas: tuple[float, float, float] = (0.9, 0.999, 0.9999),
        eps: tuple[float, float] = (1e-30, 1e-16),
        weight_decay: float = 0.0,
        *,
        clip_threshold: float = 1.0,
        max_grad_norm: float | None = None,
        quantize_above: int = 16384,
        seed: int = 0,
    ):
        for option, value, count in (("betas", betas, 3), ("eps", eps, 2)):
            if len(value) != count:
                raise ValueError(f"CAME8bit: {option} must be {count} numbers, got {value}")
        for i, value in enumerate(eps):
            if not value >= 1e-36:
                raise ValueError(f"CAME8bit: eps[{i}] must be at least 1e-36, got {value}")
        if not clip_threshold >= 1e-36:
            raise ValueError(f"CAME8bit: clip_threshold must be at least 1e-36, got {clip_threshold}")
        if not quantize_above >= 0:
            raise ValueError(f"CAME8bit: quantize_above must not be negative, got {quantize_above}")
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "clip_threshold": clip_threshold,
            "quantize_above": quantize_above,
            "seed": seed,
        }
        super().__init__(params, defaults, max_grad_norm)

    def _forget(self) -> None:
        super()._forget()
        self._offsets: dict[Tensor, int] = {}

    def _check_param(self, param: Tensor, name: str) -> None:
        super()._check_param(param, name)
        if isinstance(param, DTensor):
            raise ValueError(
                f"CAME8bit: {name}, shape {tuple(param.shape)}, is a DTensor of placements {param.placements}; its "
                "means need whole rows and columns, so sharded parameters are not supported: use AdamW"
            )

    def _offset_of(self, param: Tensor) -> int:
        if not self._offsets:
            first = 0
            for p in chain.from_iterable(group["params"] for group in self.param_groups):
                self._offsets[p] = first
                first += sharding.stream_size(p)
        return self._offsets[param]

    def _state_of(self, param: Tensor, group: dict[str, Any]) -> dict[str, Tensor]:
        state = self.state[param]
        if state:
            return state

        def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=param.device)

        matrix = is_matrix(param)
        rows, cols = param.shape[:2] if matrix else (0, 0)
        quantized = matrix and param.numel() > group["quantize_above"]
        state["step"] = zeros()
        state["exp_avg"] = zeros(*param.shape, dtype=torch.uint8 if quantized else torch.float32)
        state["exp_avg_scales"] = zeros(ceil_div(param.numel(), CAME_BLOCK) if quantized else 0, 2)
        state["v_rows"], state["v_cols"] = (zeros(rows), zeros(cols)) if matrix else (zeros(*param.shape), zeros(0))
        state["u_rows"], state["u_cols"] = zeros(rows), zeros(cols)
        return state

    def _make_batch(self, params: list[Tensor], group: dict[str, Any]) -> Batch:
        params = [p for p in params if p.numel()]
        return Batch(params, [self.state[p] for p in params], list(map(self._offset_of, params)))

    def _step(self, batch: Batch, group: dict[str, Any], lr: Tensor, scale: Tensor | None) -> None:
        dense = [p.contiguous() for p in batch.params]
        *parts, steps = ([state[name] for state in batch.states] for name in STATES)
        came8bit_(
            dense,
            [dense_grad(p) for p in batch.params],
            *parts,
            batch.offsets,
            steps,
            lr,
            scale,
            **dict(zip(("beta1", "beta2", "beta3"), group["betas"], strict=True)),
            **dict(zip(("eps1", "eps2"), group["eps"], strict=True)),
            clip_threshold=group["clip_threshold"],
            weight_decay=group["weight_decay"],
            seed=group["seed"],
        )
        copy_back(batch.params, dense)
        torch.autograd.graph.increment_version(batch.params)


def is_matrix(param: Tensor) -> bool:
    """Two dimensions, or the weight of a convolution of 1 x 1."""
    return param.ndim == 2 or (param.ndim == 4 and param.shape[2:] == (1, 1))
