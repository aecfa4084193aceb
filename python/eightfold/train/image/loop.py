"""Training of a SANA-like flow transformer on pictures: one function, ``train_image(config)``, in one process."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eightfold.models.sana import Sana
from eightfold.models.sana_config import SanaConfig
from eightfold.models.sana_loading import load_sana
from eightfold.train import checkpoint, distributed
from eightfold.train.distributed import World
from eightfold.train.image.autoencoder import load_encoder
from eightfold.train.image.captions import Captions, TextFile, choose
from eightfold.train.image.config import ImageConfig, ImageModelConfig
from eightfold.train.image.data import Batch, Encoder, ImageData, load_images
from eightfold.train.image.ema import WeightMean
from eightfold.train.image.flow import flow_loss, noised
from eightfold.train.image.model import ImageModel, read_captions, read_image_model, write_image_model
from eightfold.train.image.sources import open_pictures
from eightfold.train.loop import make_optimizer
from eightfold.train.order import step_generator
from eightfold.train.report import plot_curves, read_log
from eightfold.train.run import Run, RunResult, determinism

MEAN = "ema"  # folder of a checkpoint with the mean of the weights
_TRAINING, _EVALUATION = 0x51A0, 0x51A1  # what random numbers are for
_SHOWN = 5  # skipped pictures that are named


@dataclass
class ImageResult(RunResult):
    """What a run measured. Losses are mean squares of the velocity's error; `mean_held_out`: those of the mean of the
    weights. `skipped`: pictures that were not used, and why."""

    mean_held_out: dict[int, float] = field(default_factory=dict)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def images_per_second(self) -> float:
        """Over optimizer steps alone, without evaluations and checkpoints."""
        return self.units_per_second

    @property
    def model(self) -> Path | None:
        """The folder to sample from: the mean of the weights, or the weights where there is none."""
        if self.checkpoint is None or not (self.checkpoint / MEAN).is_dir():
            return self.checkpoint
        return self.checkpoint / MEAN


def train_image(
    config: ImageConfig, model: Sana | None = None, encoder: Encoder | None = None, name: str = ""
) -> ImageResult:
    """Runs ``config``; a ``model`` may be given instead of the one that ``config.model`` names, and an autoencoder's
    ``encoder`` instead of that of ``config.data.autoencoder``. Without either, latents are pixels.

    Raises ValueError or OSError with one line for what a user can mend, Interrupted after Ctrl-C or SIGTERM.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("pictures are trained on in one process: start it without torchrun")
    with distributed.start(config.device) as world, determinism(config.deterministic):
        torch.manual_seed(config.seed)
        return _ImageRun(config, model, encoder, world, name).run()


class _ImageRun(Run):
    unit = "images"

    def __init__(self, config: ImageConfig, sana: Sana | None, encoder: Encoder | None, world: World, name: str):
        self.config, self.world, self.units_of_step = config, world, config.batch_size
        folder = None if config.model.path is None else model_folder(config.model.path)
        made = sana is None and folder is None
        sana = make_sana(config.model, folder) if sana is None else sana
        sizes = sana.config
        if sizes.in_channels != sizes.out_channels or sizes.guidance_embeds:
            raise ValueError("model: expected as many out_channels as in_channels, and guidance_embeds false")
        self.text = None if config.captions.path is None else TextFile(config.captions.path, config.captions)
        if made and self.text is None:  # 0.01 is for the large hidden states of text encoders
            torch.nn.init.ones_(sana.caption_norm.weight)
        if self.text is not None and self.text.channels != sizes.caption_channels:
            raise ValueError(
                f"{self.text.path}: embeddings: expected {sizes.caption_channels} channels as the model's "
                f"caption_channels, got {self.text.channels}"
            )
        if config.data.autoencoder is not None:
            if encoder is not None:
                raise ValueError(f"encoder: expected None, as data.autoencoder is {config.data.autoencoder}")
            encoder = load_encoder(config.data.autoencoder, sizes.in_channels, world.device)
        self.data: ImageData = load_images(
            open_pictures(config.data.path),
            config.data,
            config.seed,
            sizes.in_channels,
            sizes.patch_size,
            encoder,
            None if self.text is None else self.text.label_of,
            world.device,
        )
        self.model = ImageModel(sana, self._captions(folder, sizes)).to(world.device)
        self.model.to({"fp32": torch.float32, "bf16": torch.bfloat16}[config.model.parameters])
        sana.compute.tokens.add_to_grad = sana.precision == "fp8"
        self.micro = config.micro_batch_size or config.batch_size
        self.optimizer = make_optimizer(self.model, config.optimizer, sana.precision)
        self.mean = WeightMean(self.model, config.ema, config.seed) if config.ema.decay else None
        self.cursor = self.data.cursor(config.batch_size)
        self.result = ImageResult(skipped=self.data.skipped)
        self._start(name)
        self._say_skipped()

    def run(self) -> ImageResult:
        try:
            return super().run()
        finally:
            self._say_skipped()

    def _captions(self, folder: Path | None, sizes: SanaConfig) -> Captions:
        """Those of the folder where they are of the same captions, else new ones."""
        names = () if self.text is not None else self.data.classes
        tokens = self.config.captions.tokens if self.text is None else self.text.tokens
        captions = Captions(sizes.caption_channels, tokens, names)
        saved = None if folder is None else read_captions(folder)
        if saved is not None and saved.names == captions.names and saved.null.shape == captions.null.shape:
            return saved
        return captions

    def _one_step(self) -> tuple[Tensor, Tensor, float]:
        """Forward, backward and update of one batch: its loss, gradient norm, rate."""
        generator = step_generator(self.config.seed, _TRAINING, self.step)
        batch = self.data.take(self.cursor, self.config.batch_size, generator)
        total = torch.zeros((), device=self.world.device)
        for loss in self._losses(batch, generator, training=True):
            loss = loss / self.config.batch_size
            loss.backward()
            total += loss.detach()
        update = self._update()
        if self.mean is not None:
            self.mean.update(self.model, self.step)
        return total, *update

    def _losses(self, batch: Batch, generator: np.random.Generator, training: bool) -> Iterator[Tensor]:
        """The summed loss of each micro-batch."""
        whole = noised(batch.latents, self.config.flow, generator, training)
        captions = choose(batch.labels, self.text, generator)
        for begin in range(0, len(batch.labels), self.micro):
            places = slice(begin, begin + self.micro)
            part = whole.part(places, self.world.device)
            text = self.model.captions.embed(captions.part(places, self.world.device), part.dropped)
            yield flow_loss(self.model(part.points, part.times, *text), part.velocities)

    @torch.no_grad()
    def held_out_loss(self) -> float | None:
        """On the same pictures, times and noise each time; None without held-out pictures."""
        generator, total, count = step_generator(self.config.seed, _EVALUATION, 0), 0.0, 0
        for batch in self.data.evaluation(self.config.eval_images, self.micro):
            total += sum(loss.item() for loss in self._losses(batch, generator, training=False))
            count += len(batch.labels)
        return total / count if count else None

    def _evaluate(self) -> None:
        loss = self.held_out_loss()
        if loss is None:
            return
        self.result.held_out[self.step] = loss
        record = {"step": self.step, "held_out_loss": loss}
        if self.mean is not None:
            with _in_place_of(self.model, self.mean.tensors):
                self.result.mean_held_out[self.step] = record["mean_held_out_loss"] = self.held_out_loss()
        self.log.write(record)

    def _writing(self) -> dict[str, Any]:
        return {"write": self._write}

    def _write(self, model: ImageModel, folder: Path) -> None:
        write_image_model(model, folder)
        if self.mean is not None:
            (folder / MEAN).mkdir()
            write_image_model(model, folder / MEAN, self.mean.tensors)

    def _reading(self) -> dict[str, Any]:
        return {"read": self._read}

    def _read(self, model: ImageModel, folder: Path) -> dict[str, Tensor]:
        if self.mean is not None:
            if not (folder / MEAN).is_dir():
                raise ValueError(f"{folder}: it has no mean of the weights: set ema.decay to 0 to go on without")
            self.mean.load(read_image_model(model, folder / MEAN))
        return read_image_model(model, folder)

    def _plot(self) -> None:
        records = {self.config.model.precision: read_log(self.log.path)}
        title = f"{Path(self.config.data.path).name}: flow-matching loss"
        plot_curves(Path(self.config.output) / "loss.png", records, title, unit="mean square of the velocity's error")

    def _say_skipped(self) -> None:
        skipped = self.data.skipped
        if skipped:
            more = f"; and {len(skipped) - _SHOWN} more" if len(skipped) > _SHOWN else ""
            named = "; ".join(f"{name}: {reason}" for name, reason in skipped[:_SHOWN])
            count = f"{len(skipped)} picture{'s were' if len(skipped) > 1 else ' was'} skipped"
            self.log.say(f"{count}: {named}{more}")


def model_folder(path: str | Path) -> Path:
    """`path`, or of a run's folder what its latest checkpoint has to sample from and to go on with."""
    found = checkpoint.complete(path)
    if not found:
        return Path(path)
    return found[-1] / MEAN if (found[-1] / MEAN).is_dir() else found[-1]


def make_sana(config: ImageModelConfig, folder: Path | None) -> Sana:
    """The transformer that ``config`` names; random weights come from torch's generator."""
    if folder is not None:
        model = load_sana(folder, config.precision)
    else:
        sizes = config.sizes if config.sizes is not None else SanaConfig.named(config.released)
        model = Sana(sizes, config.precision)
    model.checkpoint_blocks = config.checkpoint_blocks
    return model


@contextlib.contextmanager
def _in_place_of(model: torch.nn.Module, tensors: dict[str, Tensor]) -> Iterator[None]:
    """While the context lasts, the model's parameters have other values."""
    own = {name: parameter.data for name, parameter in model.named_parameters()}
    try:
        for name, parameter in model.named_parameters():
            parameter.data = tensors[name].to(parameter.dtype)
        yield
    finally:
        for name, parameter in model.named_parameters():
            parameter.data = own[name]
