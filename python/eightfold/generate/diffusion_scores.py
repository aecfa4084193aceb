"""How many answers of a diffusion language model are right, and what they take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eightfold.generate.diffusion_lm import DiffusionGenerator


@dataclass
class Scores:
    """Of one call: answers that are right to the character, of so many; what `DiffusionMeters` says of it."""

    right: int
    problems: int
    forwards: int
    tokens_per_forward: float
    tokens_per_second: float  # of the canvases

    @property
    def accuracy(self) -> float:
        return self.right / self.problems


def read_problems(path: Path) -> list[dict[str, str]]:
    """Lines of {"prompt": ..., "completion": ...}. ValueError with file and line for another."""
    problems = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            problem = json.loads(line)
            problems.append({"prompt": problem["prompt"], "completion": problem["completion"]})
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}:{number}: expected an object with prompt and completion") from None
    if not problems:
        raise ValueError(f"{path}: holds no problems")
    return problems


def score(engine: DiffusionGenerator, problems: Sequence[dict[str, str]]) -> Scores:
    """Answers of the engine's model to all prompts, compared with the completions."""
    tokenizer = engine.tokenizer
    results = engine.generate([tokenizer.encode(problem["prompt"]) for problem in problems])
    texts = [tokenizer.decode(r.tokens[:-1] if r.finish == "eos" else r.tokens) for r in results]
    right = sum(text.strip() == problem["completion"].strip() for text, problem in zip(texts, problems, strict=True))
    meters = engine.meters
    return Scores(right, len(problems), meters.forwards, meters.tokens_per_forward, meters.canvas_tokens_per_second)
