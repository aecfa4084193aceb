"""Inference-time scaling: N images of a prompt, of which a judge picks one in a knock-out (arXiv 2501.18427)."""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

Judge = Callable[[Any, str], tuple[bool, float]]
"""(image, prompt) to (yes: does the image show the prompt; score: how sure that answer is, more is surer)."""


class Judgement(NamedTuple):
    """An answer; without one (`failure` says why) it is the surest no."""

    yes: bool
    score: float
    failure: str | None = None

    def beats(self, other: Judgement) -> bool:
        """Of different answers yes; of two yes the surer one; of two no the less sure one. False for equals."""
        return self._rank() > other._rank()

    def _rank(self) -> tuple[bool, float]:
        return self.yes, self.score if self.yes else -self.score


@dataclass(frozen=True)
class Tournament:
    """winner: the number of an image. rounds: of each round the matches (first, second, winner), from first to last
    image; a number that stands in none had a bye. judgements: of each image."""

    winner: int
    rounds: tuple[tuple[tuple[int, int, int], ...], ...]
    judgements: tuple[Judgement, ...]

    @property
    def failures(self) -> list[int]:
        """The images that the judge has not answered for."""
        return [number for number, judgement in enumerate(self.judgements) if judgement.failure is not None]


def judged(judge: Judge, image: Any, prompt: str) -> Judgement:
    """The judge's answer; where it raises, or answers something else than a boolean and a finite number, a
    failure, in one line."""
    try:
        answer = judge(image, prompt)
    except Exception as error:
        return _failure(f"{type(error).__name__}: {' '.join(str(error).split())}")
    try:
        yes, score = answer
        fits = yes in (True, False) and math.isfinite(score)
    except (TypeError, ValueError, RuntimeError):
        fits = False
    if not fits:
        return _failure(f"expected (yes, score), got {answer!r}")
    return Judgement(bool(yes), float(score))


def tournament(images: Sequence[Any], prompt: str, judge: Judge) -> Tournament:
    """A knock-out of the images, at least one, in their order: neighbours meet, the winner goes on in their place, of
    an odd number the last has a bye, and of equals the first wins.

    Each image is judged once: with a judge that would say the same again the rounds need no other answers. A judge that
    fails for an image says no for it as surely as can be (`judged`): it loses to every answer.
    """
    if not len(images):
        raise ValueError("images: expected at least one, got none")
    judgements = tuple(judged(judge, image, prompt) for image in images)
    left, rounds = list(range(len(images))), []
    while len(left) > 1:
        pairs = zip(left[::2], left[1::2], strict=False)
        matches = tuple((a, b, b if judgements[b].beats(judgements[a]) else a) for a, b in pairs)
        bye = left[2 * len(matches) :]
        left = [winner for _, _, winner in matches] + bye
        rounds.append(matches)
    return Tournament(left[0], tuple(rounds), judgements)


def candidate_seeds(seed: int, count: int) -> range:
    """The seeds of the images among which the one of `seed` is chosen: those of two seeds have none in common, and of
    seed 0 more candidates contain fewer."""
    if count < 1:
        raise ValueError(f"count: expected 1 or more, got {count}")
    return range(seed * count, (seed + 1) * count)


def load_judge(path: str) -> Judge:
    """The function that "package.module:function" or "file.py:function" names. ValueError or FileNotFoundError in one
    line, also for a module that cannot be imported."""
    source, separator, name = path.rpartition(":")
    if not separator or not source or not name.isidentifier():
        raise ValueError(f"judge: expected module:function or file.py:function, got {path!r}")
    try:
        module = _file(Path(source)) if source.endswith(".py") else importlib.import_module(source)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"judge: {source}: not imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        raise ValueError(f"judge: {source} has no function {name!r}")
    return function


def _file(file: Path):
    if not file.is_file():
        raise FileNotFoundError(f"judge: {file}: no such file")
    spec = importlib.util.spec_from_file_location(f"judge_{file.stem}", file)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _failure(line: str) -> Judgement:
    return Judgement(False, math.inf, line)
