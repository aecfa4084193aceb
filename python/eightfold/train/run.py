"""What a run on text and a run on pictures share: when steps are logged, evaluated and saved, and how a run ends."""

import contextlib
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eightfold.train import checkpoint
from eightfold.train.config import OptimizerConfig
from eightfold.train.distributed import World
from eightfold.train.interrupt import Interrupted, StopRequests
from eightfold.train.order import Cursor
from eightfold.train.report import RunLog, memory_bytes


@dataclass
class RunResult:
    """What a run measured; a unit is a token or a picture."""

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    units: int = 0
    seconds: float = 0.0
    optimizer_bytes_per_parameter: float = 0.0
    memory_bytes: int = 0
    checkpoint: Path | None = None

    @property
    def units_per_second(self) -> float:
        """Over optimizer steps alone, without evaluations and checkpoints."""
        return self.units / self.seconds if self.seconds else 0.0


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors in this process."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


@contextlib.contextmanager
def determinism(wanted: bool) -> Iterator[None]:
    """torch's deterministic kernels, if asked for; its own setting comes back afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks of a deterministic caller
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of step 0..steps-1: linear warm-up, then a cosine down to ``min_lr_ratio * lr``, or constant."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


class Run:
    """One training run: its parts, and the state that a checkpoint keeps. A subclass sets the attributes below, calls
    `_start`, and says what a step, an evaluation and the files of a model are."""

    unit: str
    units_of_step: int
    config: Any
    model: nn.Module
    world: World
    optimizer: torch.optim.Optimizer
    cursor: Cursor
    result: RunResult

    def _start(self, name: str) -> None:
        """Goes on from a checkpoint if asked to, and opens the log."""
        config, self.step = self.config, 0
        if config.resume:
            self._resume(checkpoint.find(config.output, config.resume))
        elif checkpoint.complete(config.output):
            raise ValueError(
                f"{config.output}: already holds checkpoints; go on with --resume, or choose another --output"
            )
        self.log = RunLog(
            config.output,
            config.steps,
            self.step,
            tensorboard=config.tensorboard,
            quiet=not self.world.leads,
            name=name,
        )

    def _one_step(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Forward, backward and update of one global batch: this process's share of its loss, gradient norm, rate."""
        raise NotImplementedError

    def _evaluate(self) -> None:
        raise NotImplementedError

    def _plot(self) -> None:
        raise NotImplementedError

    def _writing(self) -> dict[str, Any]:
        """How `checkpoint.save` is to write the model."""
        raise NotImplementedError

    def _reading(self) -> dict[str, Any]:
        """How `checkpoint.load` is to read it."""
        return {}

    def run(self) -> Any:
        try:
            with StopRequests(self.world) as stop:
                self._steps(stop)
        finally:
            self.log.close()
        self.result.memory_bytes = memory_bytes(self.world.device)
        local = sum((p.to_local() if hasattr(p, "to_local") else p).numel() for p in self.model.parameters())
        self.result.optimizer_bytes_per_parameter = optimizer_bytes(self.optimizer) / max(1, local)
        return self.result

    def _steps(self, stop: StopRequests) -> None:
        config = self.config
        self.model.train()
        if self.step == 0:
            self._evaluate()
        pending: list[torch.Tensor] = []
        mark, units = time.perf_counter(), 0
        while self.step < config.steps:
            loss, norm, rate = self._one_step()
            pending.append(loss)
            units += self.units_of_step
            last = self.step == config.steps
            stopping = stop.agreed()
            evaluation = last or (config.eval_every and self.step % config.eval_every == 0)
            saving = (stopping or (last and config.checkpoint_at_end)) or (
                config.checkpoint_every and self.step % config.checkpoint_every == 0
            )
            if evaluation or saving or self.step % config.log_every == 0:
                self._report(pending, norm, rate, units, time.perf_counter() - mark)
                if evaluation and not (stopping and not last):
                    self._evaluate()
                if saving:
                    self._save()
                if saving or last:
                    self._plot()
                pending, units, mark = [], 0, time.perf_counter()
            if stopping and not last:
                raise Interrupted(f"interrupted after step {self.step}; go on with --resume {self.result.checkpoint}")

    def _update(self) -> tuple[torch.Tensor, float]:
        """The optimizer's step on the gradients that are there: gradient norm, learning rate."""
        config = self.config.optimizer
        rate = learning_rate(config, self.step, self.config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if hasattr(self.optimizer, "grad_norm"):  # eightfold's scales gradients as it reads them
            self.optimizer.step()
            norm = self.optimizer.grad_norm
        else:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.max_grad_norm or math.inf)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return norm, rate

    def _report(self, pending: list[torch.Tensor], norm: torch.Tensor, rate: float, units: int, seconds: float):
        losses = self.world.sum(torch.stack(pending).tolist())
        self.result.losses += losses
        self.result.units += units
        self.result.seconds += seconds
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        for loss in losses:
            if not math.isfinite(loss):
                raise ValueError(
                    f"step {self.step}: the loss is {loss}: the run diverged; lower optimizer.lr or warm up longer"
                )
        self.log.write(
            {
                "step": self.step,
                "loss": sum(losses) / len(losses),
                "lr": rate,
                "grad_norm": norm.item(),
                f"{self.unit}_per_second": units / seconds,
                "memory_bytes": memory_bytes(self.world.device),
            }
        )

    def _save(self) -> None:
        state = {
            "data": self.cursor.state_dict(),
            "optimizer": _full_name(self.optimizer),
            "config": self.config.model_dump(),
        }
        self.result.checkpoint = checkpoint.save(
            self.config.output,
            self.step,
            self.model,
            self.optimizer,
            state,
            self.world,
            keep_last=self.config.keep_last,
            **self._writing(),
        )

    def _resume(self, folder: Path) -> None:
        state = checkpoint.read_state(folder)
        ours = _full_name(self.optimizer)
        if ours != state["optimizer"]:
            raise ValueError(f"{folder}: its optimizer is {state['optimizer']}, the run's is {ours} (optimizer.name)")
        if state["step"] >= self.config.steps:
            raise ValueError(f"{folder}: is at step {state['step']}; raise --steps ({self.config.steps}) to go on")
        try:
            self.cursor.load_state_dict(state["data"])
        except ValueError as error:
            raise ValueError(f"{folder}: {error}") from None
        checkpoint.load(folder, self.model, self.optimizer, self.world, **self._reading())
        self.step = state["step"]


def _full_name(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
