"""The training loop: one function, ``train(config)``, for one process or for many under torchrun."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eightfold.train import distributed
from eightfold.train.config import ModelConfig, OptimizerConfig, TrainConfig
from eightfold.train.data import Corpus, Sequences
from eightfold.train.distributed import World
from eightfold.train.objectives import Objective, make_objective
from eightfold.train.report import plot_curves, read_log
from eightfold.train.run import Run, RunResult, determinism


@dataclass
class Result(RunResult):
    """What a run measured. Losses are in nats per token."""

    @property
    def tokens(self) -> int:
        return self.units

    @property
    def tokens_per_second(self) -> float:
        """Over optimizer steps alone, without evaluations and checkpoints."""
        return self.units_per_second


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
    with distributed.start(config.device) as world, determinism(config.deterministic):
        torch.manual_seed(config.seed)
        if model is None:
            model, tokenizer = load_model(config.model, world.device)
        return _TextRun(config, model, tokenizer, world, name).run()


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


class _TextRun(Run):
    unit = "tokens"

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
        self.units_of_step = config.batch_size * config.data.sequence_length
        self.result = Result()
        self._start(name)

    def _one_step(self) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Forward, backward and update of one global batch: this process's share of its loss, gradient norm, rate."""
        config, world = self.config, self.world
        indices = self.cursor.take(config.batch_size)
        batch = self.objective.batch(self.corpus.train, indices, self.step)
        share = torch.zeros((), device=world.device)
        for part in micro_batches(list(range(len(indices))), self.micro, world):
            loss = batch.loss(self.model, part, world.device) / batch.targets
            (loss * world.size).backward()  # FSDP averages gradients over the processes
            share += loss.detach()
        return share, *self._update()

    def _evaluate(self) -> None:
        held_out = self.corpus.held_out
        if held_out:
            count = min(len(held_out), self.config.eval_sequences)
            loss = evaluate(self.objective, self.model, held_out, self.micro, count, self.world)
            self.result.held_out[self.step] = loss
            self.log.write({"step": self.step, "held_out_loss": loss})

    def _writing(self) -> dict[str, Any]:
        return {"tokenizer": self.tokenizer}

    def _plot(self) -> None:
        if self.world.leads:
            name = self.config.model.precision
            plot_curves(
                Path(self.config.output) / "loss.png",
                {name: read_log(self.log.path)},
                f"{Path(self.config.model.path).name}: loss",
            )


def _micro_batch_size(config: TrainConfig, world: World) -> int:
    if config.batch_size % world.size:
        raise ValueError(f"batch_size={config.batch_size} cannot be shared by {world.size} processes")
    size = config.micro_batch_size or config.batch_size // world.size
    if config.batch_size % (size * world.size):
        raise ValueError(
            f"batch_size={config.batch_size} is not a multiple of micro_batch_size={size} x {world.size} processes"
        )
    return size
