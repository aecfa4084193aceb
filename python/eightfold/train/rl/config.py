"""The configuration of a reinforcement learning run, read as ``train.config`` reads its own."""

from pathlib import Path
from typing import Any

from pydantic import Field, PositiveInt, model_validator

from eightfold.train import sections
from eightfold.train.config import ModelConfig, OptimizerConfig
from eightfold.train.rl.advantages import AdvantageOptions, OverlongOptions
from eightfold.train.rl.objective import ObjectiveOptions
from eightfold.train.rl.rewards import RewardOptions
from eightfold.train.rl.tasks import PromptOptions, TaskOptions
from eightfold.train.sections import Section


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
    seed: int = Field(0, ge=0, lt=1 << 32)

    @model_validator(mode="after")
    def _agrees(self) -> "RlConfig":
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
