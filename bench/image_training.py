"""A training step of SANA: flow matching at random times (eightfold.train.image), bf16 parameters, random weights.

Ours is in FP8 with optim.CAME8bit, which also bounds the gradients' norm; the peer is diffusers' transformer in bf16,
its blocks under torch.compile, with torch's fused AdamW, which bounds nothing. One after the other, as a card may not
hold both. Checked first: the velocity, and the gradient of the first block's q, k and v, against the peer's (without
diffusers, against ours in bf16).
"""

import statistics
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from eightfold.models.precision import Precision
from eightfold.models.sana import SanaConfig
from eightfold.train.image.config import FlowConfig, ImageOptimizerConfig
from eightfold.train.image.flow import Noised, flow_loss, noised
from eightfold.train.loop import make_optimizer

from .common import Bench, relative_error
from .image import Sizes, free, random_sana, random_texts
from .image_peers import DiffusersSana, left_out
from .step import ModelRun, built_run, host_seconds, profile, wall_seconds

PEER = "diffusers bf16 compiled + fused AdamW"
ROUNDS = 5
TOLERANCES = {"velocity": 0.08, "gradient": 0.25}


@dataclass
class Data:
    noised: Noised
    text: Tensor
    mask: Tensor


@dataclass
class Training:
    model: nn.Module
    optimizer: torch.optim.Optimizer
    qkv_gradient: Callable[[], Tensor]
    data: Data

    def step(self) -> Tensor:
        """The loss."""
        loss = self._backward()[0]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def outcome(self) -> dict[str, Tensor]:
        """What a step computes before it changes the weights."""
        velocity = self._backward()[1].detach()
        gradient = self.qkv_gradient().clone()
        self.optimizer.zero_grad(set_to_none=True)
        return {"velocity": velocity, "gradient": gradient}

    def _backward(self) -> tuple[Tensor, Tensor]:
        given = self.data.noised
        velocity = self.model(given.points, given.times, self.data.text, self.data.mask)
        loss = flow_loss(velocity, given.velocities) / len(velocity)
        loss.backward()
        return loss, velocity


def run(bench: Bench, sizes: Sizes) -> None:
    free(bench.device)
    config, device = sizes.transformer, bench.device
    data = _data(sizes, device)
    ours = _ours(config, device, data).outcome()
    runs = {}

    def checked_peer() -> Callable[[], Tensor]:
        peer = _theirs(config, device, data)
        _check(ours, peer.outcome())
        return peer.step

    try:
        free(device)
        runs[PEER] = _measured(built_run(checked_peer, device), device, sizes)
    except Exception as reason:  # what is no peer here is left out, visibly
        left_out(PEER, reason)
    if not runs:
        free(device)
        _check(ours, _ours(config, device, data, "bf16").outcome())
    free(device)
    built = built_run(lambda: _ours(config, device, data).step, device)
    runs = {"ours": _measured(built, device, sizes), **runs}
    name = f"training {sizes.name}, batch {sizes.training_batch}"
    bench.note("step", name=name, runs=runs)
    if PEER in runs:
        ratios = [runs[PEER][key] / runs["ours"][key] for key in ("ms", "peak_bytes")]
        print(f"  peer / ours: time {ratios[0]:.3f}, peak memory {ratios[1]:.3f}")
    profile(bench, name, built.step, runs["ours"]["ms"])


def _data(sizes: Sizes, device: torch.device) -> Data:
    torch.manual_seed(1)
    config, batch = sizes.transformer, sizes.training_batch
    latents = torch.randn(batch, config.in_channels, sizes.side, sizes.side)
    drawn = noised(latents, FlowConfig(), np.random.default_rng(0)).part(slice(None), device)
    return Data(drawn, *random_texts(config, batch, sizes.text, device))


def _ours(config: SanaConfig, device: torch.device, data: Data, precision: Precision = "fp8") -> Training:
    model = random_sana(config, device, precision)
    model.compute.tokens.add_to_grad = precision == "fp8"  # as the training loop has it
    optimizer = make_optimizer(model, ImageOptimizerConfig(name="came8bit"), precision)
    return Training(model, optimizer, lambda: model.transformer_blocks[0].attn1.qkv.weight.grad, data)


def _theirs(config: SanaConfig, device: torch.device, data: Data) -> Training:
    peer = DiffusersSana(random_sana(config, device)).train()
    peer.compile_blocks()
    optimizer = make_optimizer(peer, ImageOptimizerConfig(name="adamw"), "bf16")
    return Training(peer, optimizer, peer.qkv_gradient, data)


def _check(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, tolerance in TOLERANCES.items():
        error = relative_error(ours[name], theirs[name])
        print(f"  {name}: error {error:.1e}")
        if not error <= tolerance:  # NaN fails too
            raise SystemExit(f"image-training: {name}: error {error:.3g} is over {tolerance:.3g}; not timed")


def _measured(built: ModelRun, device: torch.device, sizes: Sizes) -> dict[str, float]:
    seconds = statistics.median(wall_seconds(built.step, device) for _ in range(ROUNDS))
    return {
        "ms": 1e3 * seconds,
        "host_ms": 1e3 * host_seconds(built.step, device),
        "images_per_second": sizes.training_batch / seconds,
        "peak_bytes": built.peak,
        "state_bytes": built.state,
    }
