"""What a rollout is asked for and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from eightfold.generate.text import SamplingOptions

Finish = Literal["stop", "length"]
_SEED_STEP = 0x9E3779B97F4A7C15  # odd: seeds of the samples of a request are all different


@dataclass(frozen=True)
class Request:
    """A prompt and how to continue it, `samples` times.

    stop_ids end a completion and stay in it, as does the token that completes one of the strings `stop`. Sample i of
    seed s is drawn as sample 0 of another request would be with the seed that `sample_seed(s, i)` gives.
    """

    prompt: Sequence[int]
    max_tokens: int
    options: SamplingOptions = field(default_factory=lambda: SamplingOptions(temperature=1.0))
    seed: int = 0
    samples: int = 1
    stop_ids: frozenset[int] = frozenset()
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        if len(self.prompt) == 0:
            raise ValueError("prompt: expected at least one token, got none")
        for name in ("max_tokens", "samples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")


@dataclass
class Completion:
    """The tokens drawn after a prompt, each token's log-probability (natural, at the request's temperature; at
    temperature 0 that of temperature 1), and why it ended."""

    tokens: list[int]
    log_probs: list[float]
    finish: Finish


@dataclass(frozen=True)
class RolloutOptions:
    """pages of `page_size` tokens are the cache; at most `sequences` run at once, and `prefill_tokens` tokens of
    prompts are computed in a step. cuda_graphs: steps of one token are replayed (None: where there are kernels).
    keep_cache=False gives the cache's memory back after each call, and with it the graphs, which are captured again."""

    pages: int
    page_size: int = 64
    sequences: int = 256
    prefill_tokens: int = 8192
    cuda_graphs: bool | None = None
    keep_cache: bool = True

    def __post_init__(self):
        for name in ("pages", "page_size", "sequences", "prefill_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected 1 or more, got {getattr(self, name)}")
        if self.page_size % 16:
            raise ValueError(f"page_size: expected a multiple of 16, got {self.page_size}")


def sample_seed(seed: int, index: int) -> int:
    """The seed of sample `index` of a request, int64."""
    value = (seed + index * _SEED_STEP) % 2**64
    return value - 2**64 if value >= 2**63 else value
