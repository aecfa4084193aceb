"""The configuration of a reinforcement learning run, read as ``train.config`` reads its own."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from eightfold.train import sections
from eightfold.train.config import ModelConfig, OptimizerConfig
from eightfold.train.rl.advantages import AdvantageOptions, OverlongOptions
from eightfold.train.rl.objective import ObjectiveOptions
from eightfold.train.rl.remote import EngineOptions
from eightfold.train.rl.rewards import RewardOptions
from eightfold.train.rl.tasks import PromptOptions, TaskOptions
from eightfold.train.sections import Section


class RolloutConfig(Section):
    """How completions are drawn. Log-probabilities are those at ``temperature`` before top_k and top_p."""

    precision: Literal["same", "fp8"] = Field("same", description="same: what training computes in; fp8: FP8 products")
    temperature: PositiveFloat = 1.0
    top_k: int = Field(0, ge=0, description="0: all")
    top_p: float = Field(1.0, gt=0, le=1)
    stop: list[str] = Field([], description="strings that end a completion, beside the model's end token")
    cache_tokens: PositiveInt = Field(65536, description="keys and values that the cache holds, of all sequences")
    page_size: PositiveInt = Field(64, multiple_of=16, description="tokens of a page")
    sequences: PositiveInt = Field(256, description="completions under way at once, at most")
    keep_cache: bool = Field(True, description="false: training has the cache's memory, CUDA graphs are captured anew")
    engine: EngineOptions | None = Field(None, description="another engine that does the rollout, over HTTP")

    @model_validator(mode="after")
    def _engine_agrees(self) -> "RolloutConfig":
        if self.engine is not None and self.precision != "same":
            raise ValueError(f"precision={self.precision}: with an engine its own precision counts; leave it out")
        if self.engine is not None and self.temperature != 1 and not self.engine.log_probs_at_temperature:
            raise ValueError(
                f"temperature={self.temperature:g}: expected 1 unless engine.log_probs_at_temperature says that the "
                "engine's log-probabilities are those at the temperature"
            )
        return self


class RlConfig(Section):
    """One run. The sections that are frozen dataclasses are described where they are defined."""

    model: ModelConfig
    task: TaskOptions
    prompt: PromptOptions = Field(default_factory=PromptOptions)
    reward: RewardOptions = Field(default_factory=RewardOptions)
    advantage: AdvantageOptions = Field(default_factory=AdvantageOptions)
    overlong: OverlongOptions | None = Field(None, description="soft punishment of long completions")
    objective: ObjectiveOptions = Field(default_factory=ObjectiveOptions)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    prompts_per_step: PositiveInt = Field(8, description="prompts a step, over all processes")
    samples_per_prompt: PositiveInt = Field(8, description="completions of one prompt: a group")
    max_new_tokens: PositiveInt = Field(256, description="longest completion")
    rollout: RolloutConfig = Field(default_factory=RolloutConfig)
    updates_per_step: PositiveInt = Field(
        1, description="optimizer steps on the completions of a step, each on a share"
    )
    micro_batch_tokens: PositiveInt = Field(16384, description="tokens of a forward and backward pass, about")
    output: str = Field("run", description="folder for logs, pictures and checkpoints")
    steps: PositiveInt = 100
    seed: int = Field(0, ge=0, lt=1 << 32)
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_every: int = Field(0, ge=0, description="steps between checkpoints; 0: none between")
    checkpoint_at_end: bool = True
    keep_last: PositiveInt = Field(2, description="checkpoints kept")
    tensorboard: bool = Field(True, description="write TensorBoard logs where the package is installed")
    resume: str | None = Field(None, description="'latest' in the output folder, or a checkpoint folder")

    @model_validator(mode="before")
    @classmethod
    def _corrects_an_engine(cls, values: Any) -> Any:
        """With another engine, truncated importance sampling unless something else is asked for."""
        rollout = values.get("rollout") if isinstance(values, dict) else None
        engine = rollout.get("engine") if isinstance(rollout, dict) else getattr(rollout, "engine", None)
        objective = values.get("objective", {}) if engine is not None else None
        if not isinstance(objective, dict) or not isinstance(correction := objective.get("correction", {}), dict):
            return values
        return {**values, "objective": {**objective, "correction": {"kind": "truncate", **correction}}}

    @model_validator(mode="after")
    def _agrees(self) -> "RlConfig":
        if self.rollout.engine is not None and self.objective.correction.kind == "none":
            raise ValueError(
                "objective.correction.kind: expected truncate or mask, as rollout.engine's probabilities are not the "
                "trainer's, got 'none'"
            )
        if self.overlong is not None and self.overlong.buffer > self.max_new_tokens:
            raise ValueError(
                f"overlong.buffer: expected at most max_new_tokens={self.max_new_tokens}, got {self.overlong.buffer}"
            )
        return self


def load_rl_config(path: str | Path | None = None, overrides: list[str] | None = None) -> RlConfig:
    """An RlConfig from a YAML file and ``key.sub=value`` overrides; errors as ``sections.load``'s."""
    return sections.load(RlConfig, path, overrides)


def parse_rl_config(values: dict[str, Any], source: str = "configuration") -> RlConfig:
    """An RlConfig from nested ``values``; errors as ``sections.load``'s."""
    return sections.parse(RlConfig, values, source)
