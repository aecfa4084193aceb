"""The training loop: one function, ``train(config)``, for one process or for many under torchrun."""

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

from eightfold.train import checkpoint, distributed
from eightfold.train.config import ModelConfig, OptimizerConfig, TrainConfig
from eightfold.train.data import Corpus, Sequences
from eightfold.train.distributed import World
from eightfold.train.interrupt import Interrupted, StopRequests
from eightfold.train.objectives import Objective, make_objective
from eightfold.train.report import RunLog, memory_bytes, plot_curves, read_log


@dataclass
class Result:
    """What a run measured. Losses are in nats per token."""

    losses: list[float] = field(default_factory=list)
    held_out: dict[int, float] = field(default_factory=dict)
    tokens: int = 0
    seconds: float = 0.0
    optimizer_bytes_per_parameter: float = 0.0
    memory_bytes: int = 0
    checkpoint: Path | None = None

    @property
    def tokens_per_second(self) -> float:
        """Over optimizer steps alone, without evaluations and checkpoints."""
        return self.tokens / self.seconds if self.seconds else 0.0


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """Rate of step 0..steps-1: linear warm-up, then a cosine down to ``min_lr_ratio * lr``, or constant."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = (step - config.warmup_steps) / max(1, steps - 1 - config.warmup_steps)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * cosine)


def make_optimizer(model: nn.Module, config: OptimizerConfig, precision: str) -> torch.optim.Optimizer:
    """The optimizer ``config.name`` over the parameters; weight decay on matrices only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    name = config.name
    if name == "auto":
        name = "adamw8" if precision == "fp8" else "adamw"
    if name in ("adamw8", "came8bit"):
        from eightfold.optim import AdamW, CAME8bit

        limit = config.max_grad_norm or math.inf  # also with no limit: the log wants the norm
        if name == "came8bit":
            return CAME8bit(groups, lr=config.lr, betas=config.came_betas, eps=config.came_eps, max_grad_norm=limit)
        return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, max_grad_norm=limit)
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=True)


def optimizer_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors in this process."""
    tensors = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in local)


def micro_batches(places: list[int], size: int, world: World) -> list[list[int]]:
    """This process's share of the places of one global batch, in parts of ``size`` sequences."""
    groups = [places[begin : begin + size] for begin in range(0, len(places), size)]
    return groups[world.rank :: world.size]


def evaluate(
    objective: Objective, model: nn.Module, sequences: Sequences, size: int, count: int, world: World
) -> float:
    """Mean loss on the first ``count`` sequences, the same for any number of processes (up to rounding)."""
    batch = objective.batch(sequences, list(range(count)), None)
    groups = [list(range(begin, min(begin + size, count))) for begin in range(0, count, size)]
    total = 0.0
    model.eval()
    with torch.no_grad():
        for begin in range(0, len(groups), world.size):
            # Every process makes the same number of passes, as sharded parameters ask for; a spare pass counts nothing.
            mine = begin + world.rank
            loss = batch.loss(model, groups[min(mine, len(groups) - 1)], world.device)
            total += loss.item() if mine < len(groups) else 0.0
    model.train()
    return world.sum([total])[0] / batch.targets


def train(config: TrainConfig, model: nn.Module | None = None, tokenizer: Any = None, name: str = "") -> Result:
    """Runs ``config``; a ``model`` (a Decoder) and its tokenizer may be given instead of loading ``config.model.path``.

    Raises ValueError or OSError with one line for what a user can mend, Interrupted after Ctrl-C or SIGTERM.
    """
    with distributed.start(config.device) as world, _determinism(config):
        torch.manual_seed(config.seed)
        if model is None:
            model, tokenizer = load_model(config.model, world.device)
        return _Run(config, model, tokenizer, world, name).run()


def load_model(config: ModelConfig, device: torch.device) -> tuple[nn.Module, Any]:
    """The Decoder that ``config`` names and its tokenizer."""
    from eightfold.models.loading import load_decoder, new_decoder

    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[config.parameters]
    make = new_decoder if config.init == "random" else load_decoder
    model, tokenizer = make(config.resolved(), config.precision, dtype, device)
    model.compute.fp8_head, model.compute.fp8_cache = config.fp8_head, config.fp8_cache
    return model, tokenizer


def sum_in_products(model: nn.Module, world: World) -> None:
    """Has a Decoder in FP8 add up the gradients of micro-batches where it makes them; sharded ones are not at hand."""
    model.compute.add_to_grad = model.precision == "fp8" and world.size == 1


@contextlib.contextmanager
def _determinism(config: TrainConfig) -> Iterator[None]:
    """torch's deterministic kernels, if asked for; its own setting comes back afterwards."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = torch.utils.deterministic.fill_uninitialized_memory
    if config.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what cuBLAS asks of a deterministic caller
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = filling


class _Run:
    """One training run: its parts, and the state that a checkpoint keeps."""

    def __init__(self, config: TrainConfig, model: nn.Module, tokenizer: Any, world: World, name: str) -> None:
        self.config, self.model, self.tokenizer, self.world = config, model, tokenizer, world
        self.micro = _micro_batch_size(config, world)
        self.objective = make_objective(config, model, tokenizer)
        self.corpus = Corpus.load(config.data, tokenizer, config.seed)
        self.cursor = self.corpus.start()
        distributed.shard(model, world)
        sum_in_products(model, world)
        if config.model.compile:
            for layer in model.model.layers:
                layer.compile(dynamic=False)
        self.parameters = sum(p.numel() for p in model.parameters())
        self.optimizer = make_optimizer(model, config.optimizer, config.model.precision)
        self.step = 0
        self.result = Result()
        if config.resume:
            self._resume(checkpoint.find(config.output, config.resume))
        elif checkpoint.complete(config.output):
            raise ValueError(
                f"{config.output}: already holds checkpoints; go on with --resume, or choose another --output"
            )
        self.log = RunLog(
            config.output, config.steps, self.step, tensorboard=config.tensorboard, quiet=not world.leads, name=name
        )

    def run(self) -> Result:
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
        mark, tokens = time.perf_counter(), 0
        while self.step < config.steps:
            loss, norm, rate = self._one_step()
            pending.append(loss)
            tokens += config.batch_size * config.data.sequence_length
            last = self.step == config.steps
            stopping = stop.agreed()
            evaluation = last or (config.eval_every and self.step % config.eval_every == 0)
            saving = (stopping or (last and config.checkpoint_at_end)) or (
                config.checkpoint_every and self.step % config.checkpoint_every == 0
            )
            if evaluation or saving or self.step % config.log_every == 0:
                self._report(pending, norm, rate, tokens, time.perf_counter() - mark)
                if evaluation and not (stopping and not last):
                    self._evaluate()
                if saving:
                    self._save()
                if saving or last:
                    self._plot()
                pending, tokens, mark = [], 0, time.perf_counter()
            if stopping and not last:
                raise Interrupted(f"interrupted after step {self.step}; go on with --resume {self.result.checkpoint}")

    def _one_step(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Forward, backward and update of one global batch: this process's share of its loss, gradient norm, rate."""
        config, world = self.config, self.world
        indices = self.cursor.take(config.batch_size)
        batch = self.objective.batch(self.corpus.train, indices, self.step)
        rate = learning_rate(config.optimizer, self.step, config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        share = torch.zeros((), device=world.device)
        for part in micro_batches(list(range(len(indices))), self.micro, world):
            loss = batch.loss(self.model, part, world.device) / batch.targets
            (loss * world.size).backward()  # FSDP averages gradients over the processes
            share += loss.detach()
        if hasattr(self.optimizer, "grad_norm"):  # eightfold's scales gradients as it reads them
            self.optimizer.step()
            norm = self.optimizer.grad_norm
        else:
            norm = nn.utils.clip_grad_norm_(self.model.parameters(), config.optimizer.max_grad_norm or math.inf)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return share, norm, rate

    def _report(self, pending: list[torch.Tensor], norm: torch.Tensor, rate: float, tokens: int, seconds: float):
        losses = self.world.sum(torch.stack(pending).tolist())
        self.result.losses += losses
        self.result.tokens += tokens
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
                "tokens_per_second": tokens / seconds,
                "memory_bytes": memory_bytes(self.world.device),
            }
        )

    def _evaluate(self) -> None:
        held_out = self.corpus.held_out
        if held_out:
            count = min(len(held_out), self.config.eval_sequences)
            loss = evaluate(self.objective, self.model, held_out, self.micro, count, self.world)
            self.result.held_out[self.step] = loss
            self.log.write({"step": self.step, "held_out_loss": loss})

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
            tokenizer=self.tokenizer,
            keep_last=self.config.keep_last,
        )

    def _plot(self) -> None:
        if self.world.leads:
            name = self.config.model.precision
            plot_curves(
                Path(self.config.output) / "loss.png",
                {name: read_log(self.log.path)},
                f"{Path(self.config.model.path).name}: loss",
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
        checkpoint.load(folder, self.model, self.optimizer, self.world)
        self.step = state["step"]


def _full_name(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"


def _micro_batch_size(config: TrainConfig, world: World) -> int:
    if config.batch_size % world.size:
        raise ValueError(f"batch_size={config.batch_size} cannot be shared by {world.size} processes")
    size = config.micro_batch_size or config.batch_size // world.size
    if config.batch_size % (size * world.size):
        raise ValueError(
            f"batch_size={config.batch_size} is not a multiple of micro_batch_size={size} x {world.size} processes"
        )
    return size
