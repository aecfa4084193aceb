"""The configuration of a training run on pictures: YAML plus overrides, as of `eightfold.train.config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from eightfold.models.sana_config import SanaConfig
from eightfold.train import sections
from eightfold.train.config import OptimizerConfig
from eightfold.train.sections import Section


class ImageModelConfig(Section):
    """Which transformer: a saved one, one of the released sizes with random weights, or one of sizes given here."""

    path: str | None = Field(None, description="folder of a saved model, or a run's, whose latest checkpoint it means")
    released: Literal["0.6B", "1.6B", "1.6B-1.5", "4.8B"] | None = None
    sizes: SanaConfig | None = Field(None, description="fields of SanaConfig; what is left out is SANA 1.6B's")
    precision: Literal["fp32", "bf16", "fp8"] = "bf16"
    parameters: Literal["fp32", "bf16"] = Field("fp32", description="dtype in which the parameters are kept")
    checkpoint_blocks: bool = Field(False, description="compute each block again in the backward, to save memory")

    @model_validator(mode="after")
    def _one_source(self) -> ImageModelConfig:
        given = [name for name in ("path", "released", "sizes") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"expected one of path, released and sizes, got {' and '.join(given) or 'none'}")
        return self


class ImageDataConfig(Section):
    """Which pictures, and at what sizes; see `eightfold.train.image.sources`."""

    path: str = Field(description="folder tree, .zip, .npz, .npy, or a folder of CIFAR batches")
    resolution: PositiveInt = Field(32, description="pixels of a side of a square picture")
    buckets: bool = Field(False, description="keep the shapes of pictures: sizes of about resolution^2 pixels")
    flip: bool = Field(True, description="mirror half of the pictures of a step, left to right")
    autoencoder: str | None = Field(
        None, description="folder or .safetensors of a DC-AE (models.load_dc_ae), whose latents stand for the pixels"
    )
    cache: str | None = Field(
        None, description="folder that keeps the latents of an autoencoder; without it each run makes them again"
    )
    held_out: float = Field(0.05, ge=0, lt=1, description="share of the pictures held out")


class CaptionConfig(Section):
    """What a picture's caption is: a learned embedding of its class, or an embedding from a file."""

    path: str | None = Field(None, description=".safetensors of text embeddings; see eightfold.train.image.captions")
    tokens: PositiveInt = Field(4, description="tokens of a class's learned embedding")
    choice: Literal["power", "softmax"] = Field(
        "power", description="of several captions: by score^(1/tau) as SANA's code, or by exp(score/tau) as its paper"
    )
    tau: PositiveFloat = 0.1
    least_score: float = Field(25.0, description="captions with less are left out, but for a picture's best")


class FlowConfig(Section):
    """The flow-matching objective; see `eightfold.train.image.flow`."""

    mean: float = Field(0.0, description="of the normal number whose sigmoid is the noise's share before the shift")
    std: PositiveFloat = 1.0
    shift: float = Field(3.0, ge=1e-3, le=1e3, description="moves times towards noise; 6 at 4096 pixels")
    drop_caption: float = Field(0.1, ge=0, le=1, description="share of captions replaced by the learned empty one")


class EmaConfig(Section):
    """The mean of the weights over the steps, which is what one samples from."""

    decay: float = Field(0.9999, ge=0, lt=1, description="0: no mean is kept")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="bf16 is rounded stochastically")


class ImageOptimizerConfig(OptimizerConfig):
    """That of text with SANA's settings."""

    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: PositiveFloat | None = 0.1
    schedule: Literal["cosine", "constant"] = "constant"
    warmup_steps: int = Field(2000, ge=0)


class ImageConfig(Section):
    """One run, in one process."""

    model: ImageModelConfig
    data: ImageDataConfig
    captions: CaptionConfig = Field(default_factory=CaptionConfig)
    flow: FlowConfig = Field(default_factory=FlowConfig)
    optimizer: ImageOptimizerConfig = Field(default_factory=ImageOptimizerConfig)
    ema: EmaConfig = Field(default_factory=EmaConfig)
    output: str = Field("image_run", description="folder for logs, the curve and checkpoints")
    steps: PositiveInt = 1000
    batch_size: PositiveInt = Field(32, description="pictures a step")
    micro_batch_size: PositiveInt | None = Field(None, description="pictures a forward pass")
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = Field(True, description="deterministic kernels of torch, so that a resume repeats every bit")
    eval_every: int = Field(100, ge=0, description="steps between evaluations; 0: first and last only")
    eval_images: PositiveInt = Field(256, description="held-out pictures of one evaluation, at most")
    checkpoint_every: int = Field(500, ge=0, description="steps between checkpoints; 0: none between")
    checkpoint_at_end: bool = True
    keep_last: PositiveInt = Field(2, description="checkpoints kept")
    log_every: PositiveInt = 1
    tensorboard: bool = True
    resume: str | None = Field(None, description="'latest' in the output folder, or a checkpoint folder")

    @model_validator(mode="after")
    def _whole_micro_batches(self) -> ImageConfig:
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size: expected a multiple of micro_batch_size={self.micro_batch_size}, got {self.batch_size}"
            )
        return self


# Command-line flags that stand for a key.
SHORTHANDS = {
    "model": "model.path",
    "data": "data.path",
    "output": "output",
    "precision": "model.precision",
    "steps": "steps",
    "resume": "resume",
}


def load_image_config(path: str | Path | None = None, overrides: list[str] | None = None) -> ImageConfig:
    """An ImageConfig from a YAML file and ``key.sub=value`` overrides; errors as ``sections.load``'s."""
    return sections.load(ImageConfig, path, overrides)


def parse_image_config(values: dict[str, Any], source: str = "configuration") -> ImageConfig:
    """An ImageConfig from nested ``values``; errors as ``sections.load``'s."""
    return sections.parse(ImageConfig, values, source)
