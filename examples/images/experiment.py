"""What compare.py runs: trainings by eightfold's own loop, pictures by its sampler, and five parts that measure them.

Everything has a folder or a file below the output folder: what is there and whole is not made again, and a training
that was cut off goes on from its checkpoint.
"""

from __future__ import annotations

import random
import statistics
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import yaml
from classifier import Classifier, frechet_distance, load_classifier, look_at, save_classifier, train_classifier
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from eightfold.generate.image import ImageSampler
from eightfold.generate.scaling import candidate_seeds, tournament
from eightfold.train import checkpoint
from eightfold.train.image.config import ImageConfig, load_image_config
from eightfold.train.image.data import ImageData, load_images
from eightfold.train.image.growth import grow, with_blocks
from eightfold.train.image.loop import model_folder, train_image
from eightfold.train.image.model import ImageModel, load_image_model, save_image_model
from eightfold.train.image.prune import most_important, sampled_importance
from eightfold.train.image.sources import open_pictures
from eightfold.train.report import read_log
from eightfold.train.sections import Section

CANDIDATES = (1, 4, 16)  # of best-of-N
LOSS = "mean_held_out_loss"  # what is compared: of the mean of the weights, which is what one samples from


class Growth(Section):
    first_steps: PositiveInt = Field(description="of half of the depth; the grown model gets the rest of train.steps")


class Pruning(Section):
    steps: PositiveInt = Field(100, description="of tuning")
    samples: PositiveInt = Field(32, description="pictures made to measure the importance of blocks")
    random: PositiveInt = Field(3, description="random choices of blocks")
    lr: PositiveFloat = Field(description="of tuning: warm-up over a tenth of the steps, then a cosine")


class Sampling(Section):
    pictures: PositiveInt = Field(description="of all classes together, in whole groups of 16 of each class")
    steps: PositiveInt = 20
    guidance: float = 1.5
    batch: PositiveInt = 256


class ClassifierConfig(Section):
    width: PositiveInt = 32
    epochs: PositiveInt = 15
    batch_size: PositiveInt = 256
    lr: PositiveFloat = 5e-3


class Settings(Section):
    """The YAML file."""

    train: ImageConfig
    modes: dict[str, list[str]]
    growth: Growth
    pruning: Pruning
    sampling: Sampling
    classifier: ClassifierConfig


class Experiment:
    """ValueError where the folder holds one of other settings, or these do not go together."""

    def __init__(self, settings: Settings, output: Path):
        self.settings, self.output = settings, output
        train = settings.train
        if train.model.sizes is None or train.model.sizes.num_layers < 4 or train.captions.path is not None:
            raise ValueError("train: expected model.sizes with 4 layers or more, and classes as captions")
        if train.data.autoencoder is not None or train.data.buckets or not settings.modes:
            raise ValueError("train.data: expected square pictures without an autoencoder; modes: expected one or more")
        if not train.ema.decay:
            raise ValueError("train.ema.decay: expected above 0, as losses and pictures are those of the mean, got 0")
        if not settings.growth.first_steps < train.steps:
            raise ValueError(f"growth.first_steps: expected less than train.steps={train.steps}")
        self.layers, self.base = train.model.sizes.num_layers, next(iter(settings.modes))
        self.device = torch.device(
            ("cuda" if torch.cuda.is_available() else "cpu") if train.device == "auto" else train.device
        )
        output.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(settings.model_dump(mode="json"), sort_keys=False)  # the first mode is the base
        file = output / "settings.yaml"
        if file.exists() and file.read_text() != text:
            raise ValueError(f"{output}: holds an experiment of other settings; choose another --output")
        file.write_text(text)
        self._train = output / "train.yaml"
        self._train.write_text(yaml.safe_dump(train.model_dump(mode="json")))

    # Trainings

    def trained(self, name: str, overrides: list[str], model: Path | None = None) -> Path:
        """The folder of a run that has ended; `model`: begins with its weights."""
        folder = self.output / "runs" / name
        start = [] if model is None else ["model.sizes=null", f"model.path={model}"]
        config = load_image_config(self._train, [*overrides, *start, f"output={folder}"])
        done = checkpoint.complete(folder)
        if checkpoint.folder_of(folder, config.steps) not in done:
            config.resume = "latest" if done else None
            if self.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            train_image(config, name=name)
        return folder

    def mode(self, name: str) -> Path:
        return self.trained(name, self.settings.modes[name])

    def model(self, run: Path, precision: str | None = None) -> ImageModel:
        """What to sample from of a run, in its own precision."""
        if precision is None:
            precision = load_image_config(self._train, self.settings.modes[run.name]).model.precision
        return load_image_model(model_folder(run), precision, device=self.device).eval()

    # Pictures and classifiers

    @cached_property
    def data(self) -> ImageData:
        """Divided as every training divides it."""
        train = self.settings.train
        data = load_images(open_pictures(train.data.path), train.data, train.seed, 3, train.model.sizes.patch_size)
        if len(data.classes) < 2 or not data.held_out or len(data.held_out[0].labels) < 4:
            raise ValueError(f"{train.data.path}: expected 2 classes or more, and 4 pictures or more held out")
        return data

    @cached_property
    def classifiers(self) -> tuple[Classifier, Classifier]:
        """Two that differ in their seeds."""
        return self._classifier(0), self._classifier(1)

    def _classifier(self, seed: int) -> Classifier:
        file, options = self.output / "classifiers" / f"{seed}.safetensors", self.settings.classifier
        classes, bucket = len(self.data.classes), self.data.train[0]
        if not file.exists():
            print(f"classifier {seed}: {options.epochs} epochs of {len(bucket.labels)} pictures", flush=True)
            pictures, labels = bucket.data[:, 0].to(self.device), torch.tensor(bucket.labels, device=self.device)
            model = train_classifier(
                pictures, labels, classes, seed, options.width, options.epochs, options.batch_size, options.lr
            )
            save_classifier(model, file)
        return load_classifier(file, classes, options.width, self.device)

    @property
    def per_class(self) -> int:
        """Pictures made of each class."""
        group, classes = max(CANDIDATES), len(self.data.classes)
        return group * max(1, self.settings.sampling.pictures // (group * classes))

    def pictures(self, mode: str) -> Tensor:
        """uint8 [classes * per_class, 3, H, W], class by class; the n-th begins with the same noise in every mode."""
        file, options, train = self.output / "pictures" / f"{mode}.npy", self.settings.sampling, self.settings.train
        if not file.exists():
            model, count = self.model(self.mode(mode)), len(self.data.classes) * self.per_class
            print(f"{mode}: {count} pictures", flush=True)
            made = ImageSampler(model.sana).sample(
                model.captions.classes.detach(),
                negative=model.captions.null.detach()[None],
                height=train.data.resolution,
                width=train.data.resolution,
                steps=options.steps,
                guidance=options.guidance,
                shift=train.flow.shift,
                seeds=range(count),
                batch=options.batch,
            )
            file.parent.mkdir(exist_ok=True)
            np.save(file.with_suffix(".part.npy"), made.numpy())
            file.with_suffix(".part.npy").rename(file)
        return torch.from_numpy(np.load(file)).permute(0, 3, 1, 2)

    # Parts: each gives what summary.json says of it

    def precision(self) -> dict:
        """The same seed, data, times and noise in every mode: held-out loss at equal steps."""
        found = {}
        for name in self.settings.modes:
            records = read_log(self.mode(name) / "log.jsonl")
            curve, steps = curve_of(records), [record for record in records if "loss" in record]
            found[name] = {
                "loss": curve[max(curve)],
                "images_per_second": statistics.median(each["images_per_second"] for each in steps),
                "memory_gb": max(each["memory_bytes"] for each in steps) / 1e9,
                "curve": curve,
            }
        for each in found.values():
            each["loss_against_first"] = each["loss"] / found[self.base]["loss"] - 1
        return found

    def frechet(self) -> dict:
        """Of pictures of each mode against one half of the held-out ones; the floor is that of the other half."""
        judge = self.classifiers[0]
        held_out = self.data.held_out[0]
        labels = torch.tensor(held_out.labels)
        probabilities, real = look_at(judge, held_out.data[:, 0])
        half = len(real) // 2
        found = {
            "features": real.shape[1],
            "real": half,
            "generated": len(self.data.classes) * self.per_class,
            "judge_accuracy": _accuracy(probabilities, labels),
            "control_accuracy": _accuracy(look_at(self.classifiers[1], held_out.data[:, 0])[0], labels),
            "floor": frechet_distance(real[half : 2 * half], real[:half]),
            "modes": {},
        }
        for name in self.settings.modes:
            distance = frechet_distance(look_at(judge, self.pictures(name))[1], real[:half])
            first = found["modes"].get(self.base, {"distance": distance})["distance"]
            found["modes"][name] = {"distance": distance, "against_first": distance / first - 1}
        return found

    def growth(self) -> dict:
        """Half of the depth, grown and trained on, against the whole depth from scratch at equal total steps. The grown
        model reads the pictures in the order, and with the noise, that the half of it began with."""
        mode, first, total = self.settings.modes[self.base], self.settings.growth.first_steps, self.settings.train.steps
        scratch = curve_of(read_log(self.mode(self.base) / "log.jsonl"))
        half = self.trained("half", [*mode, f"model.sizes.num_layers={self.layers // 2}", f"steps={first}"])
        model = self.output / "models" / "grown"
        if not model.is_dir():
            small = load_image_model(model_folder(half), "fp32")
            save_image_model(ImageModel(grow(small.sana, self.layers), small.captions), model)
        after = curve_of(read_log(self.trained("grown", [*mode, f"steps={total - first}"], model) / "log.jsonl"))
        grown = {step + first: loss for step, loss in after.items()}
        reached = reaches(grown, scratch[max(scratch)])
        return {
            "layers": [self.layers // 2, self.layers],
            "scratch_loss": scratch[max(scratch)],
            "grown_loss": grown[max(grown)],
            "reached_at_step": reached,
            "share_of_steps": None if reached is None else reached / total,
            "share_of_steps_after_growth": None if reached is None else (reached - first) / total,
            "scratch_curve": scratch,
            "half_curve": curve_of(read_log(half / "log.jsonl")),
            "curve": grown,
        }

    def pruning(self) -> dict:
        """Half of the blocks, chosen in three ways, and a short tuning: how much of the loss's rise it takes back."""
        options, mode = self.settings.pruning, self.settings.modes[self.base]
        records = read_log(self.mode(self.base) / "log.jsonl")
        whole = curve_of(records)[self.settings.train.steps]
        model = self.model(self.mode(self.base))
        side, shift = self.settings.train.data.resolution, self.settings.train.flow.shift
        importance = sampled_importance(model, side, options.samples, shift=shift)
        tuning = [f"steps={options.steps}", f"eval_every={max(1, options.steps // 5)}", "checkpoint_every=0"]
        tuning += [f"optimizer.lr={options.lr}", f"optimizer.warmup_steps={options.steps // 10}"]
        tuning += ["optimizer.schedule=cosine", "ema.decay=0.9"]
        found = {"whole_loss": whole, "importance": importance, "choices": {}}
        for name, kept in choices(importance, self.layers // 2, options.random).items():
            folder = self.output / "models" / f"pruned-{name}"
            if not folder.is_dir():
                save_image_model(ImageModel(with_blocks(model.sana, kept), model.captions), folder)
            curve = curve_of(read_log(self.trained(f"pruned-{name}", [*mode, *tuning], folder) / "log.jsonl"))
            before, after = curve[0], curve[options.steps]
            found["choices"][name] = {
                "blocks": kept,
                "pruned_loss": before,
                "tuned_loss": after,
                "recovered": recovered(whole, before, after),
                "curve": curve,
            }
        return found

    def best_of(self) -> dict:
        """Knock-outs among the first mode's pictures, judged by one classifier and looked at by another."""
        pictures, count = self.pictures(self.base), len(self.data.classes) * self.per_class
        labels = torch.arange(len(self.data.classes)).repeat_interleave(self.per_class)
        judged, control = (look_at(model, pictures)[0] for model in self.classifiers)
        found = {}
        for candidates in CANDIDATES:
            winners = [
                winner_among(candidate_seeds(prompt, candidates), judged, labels)
                for prompt in range(count // candidates)
            ]
            chosen = labels[winners]
            found[str(candidates)] = {
                "prompts": len(winners),
                "judge_score": judged[winners, chosen].mean().item(),
                "judge_accuracy": _accuracy(judged[winners], chosen),
                "control_accuracy": _accuracy(control[winners], chosen),
                "winners": winners[:: max(1, len(winners) // len(self.data.classes))],
            }
        return found


def curve_of(records: list[dict]) -> dict[int, float]:
    return {record["step"]: record[LOSS] for record in records if LOSS in record}


def reaches(curve: dict[int, float], loss: float) -> float | None:
    """The first step at which a curve is at `loss` or below, between two points of it on their line; None: never."""
    before = None
    for step, value in sorted(curve.items()):
        if value <= loss:
            if before is None:
                return float(step)
            return before[0] + (step - before[0]) * (before[1] - loss) / (before[1] - value)
        before = step, value
    return None


def recovered(whole: float, pruned: float, tuned: float) -> float | None:
    """The share of the loss's rise that tuning took back; None where the loss has not risen."""
    return (pruned - tuned) / (pruned - whole) if pruned > whole else None


def choices(importance: list[float], layers: int, draws: int) -> dict[str, list[int]]:
    """Which `layers` blocks stay: the most important ones, the first ones, and random ones."""
    found = {"importance": most_important(importance, layers), "last": list(range(layers))}
    for seed in range(draws):
        found[f"random-{seed}"] = sorted(random.Random(seed).sample(range(len(importance)), layers))
    return found


def winner_among(candidates: range, probabilities: Tensor, labels: Tensor) -> int:
    """The picture, of those of one class, that a classifier's probabilities [N, classes] let win."""

    def judge(picture: int, _: str) -> tuple[bool, float]:
        wanted = probabilities[picture, labels[picture]].item()
        yes = probabilities[picture].argmax().item() == labels[picture].item()
        return yes, wanted if yes else 1 - wanted

    return candidates[tournament(candidates, "", judge).winner]


def _accuracy(probabilities: Tensor, labels: Tensor) -> float:
    return (probabilities.argmax(-1) == labels).double().mean().item()
