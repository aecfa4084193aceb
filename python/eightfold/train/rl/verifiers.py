"""Verifiers that come with the library. Each is called as ``verifier(item, completion, finish_reason)`` and returns a
number: the reward. ``item`` is what the task holds of the prompt (a dict; at least its question), ``completion`` the
text that was sampled, ``finish_reason`` "stop" or "length".

Worker processes load this file by its path and import nothing else of the library, so that they start without torch.
"""

import difflib
import importlib
import re
from types import ModuleType
from typing import Any, Literal, Protocol, get_args

REASONING_GYM = "reasoning-gym==0.1.25"
MATH_VERIFY = "math-verify==0.9.0"

Extraction = Literal["tag", "last_line", "last_number", "whole"]


class Verifier(Protocol):
    """What a user's own function looks like too."""

    def __call__(self, item: dict[str, Any], completion: str, finish_reason: str) -> float: ...


def require_package(module: str, package: str) -> ModuleType:
    """The imported ``module``; ImportError that names the pip ``package`` where it or something it needs is absent."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f"{module} cannot be imported ({error}): pip install {package}") from None


def reasoning_gym_dataset(name: str, options: dict[str, Any], seed: int, size: int) -> Any:
    """reasoning-gym's generator ``name``. ValueError for an unknown name or options that it refuses."""
    gym = require_package("reasoning_gym", REASONING_GYM)
    known = sorted(gym.factory.DATASETS)
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"task: reasoning-gym has no task {name!r}{hint}; its tasks: {', '.join(known)}")
    if taken := {"seed", "size"} & options.keys():
        raise ValueError(f"task options: {', '.join(sorted(taken))} of {name!r} are set by the task itself")
    try:
        return gym.create_dataset(name, seed=seed, size=size, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise ValueError(f"task options: {name!r} refuses {options}: {error}") from None


class ReasoningGym:
    """The scorer of reasoning-gym's task ``name``, asked about the answer that ``extraction`` finds in a completion;
    0 where it finds none. Rewards are from 0 to 1."""

    def __init__(self, name: str, options: dict[str, Any], extraction: Extraction) -> None:
        self._dataset = reasoning_gym_dataset(name, options, seed=0, size=1)
        self._extraction = extraction

    def __call__(self, item: dict[str, Any], completion: str, finish_reason: str) -> float:
        answer = extract_answer(completion, self._extraction)
        return 0.0 if answer is None else self._dataset.score_answer(answer, item)


class MathAnswer:
    """1 where math-verify finds the completion's answer equal to the item's, else 0.

    In both, the answer is what follows the last ``####`` (GSM8K's form), else what the last <answer></answer> holds,
    else where math-verify finds it. Its own time limits stay on (5 s an expression): where they end a comparison the
    answer counts as wrong.
    """

    def __init__(self, answer_field: str) -> None:
        self._math = require_package("math_verify", MATH_VERIFY)
        self._field = answer_field

    def __call__(self, item: dict[str, Any], completion: str, finish_reason: str) -> float:
        answer = _final(str(item[self._field]))
        # Plain text first; as LaTeX what is an expression rather than a number.
        expected = self._math.parse(answer) or self._math.parse(f"${answer}$")
        if not expected:
            raise ValueError(f"field {self._field!r}: math-verify finds no answer in {answer[:200]!r}")
        return float(self._math.verify(expected, self._math.parse(_final(completion))))


def _final(text: str) -> str:
    _, hashes, after = text.rpartition("####")
    if hashes:
        return after.strip()
    tagged = extract_answer(text, "tag")
    return text.strip() if tagged is None else tagged


def extract_answer(completion: str, extraction: Extraction) -> str | None:
    """The answer in a completion, or None: "tag", inside the last <answer></answer>; "last_line" that is not empty;
    "last_number" (digits may hold commas and a decimal point); "whole", all of it without outer white space."""
    if extraction == "tag":
        found = re.findall(r"<answer>(.*?)</answer>", completion, flags=re.DOTALL)
    elif extraction == "last_line":
        found = completion.strip().splitlines()
    elif extraction == "last_number":
        found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", completion)
        found = [number.rstrip(",").replace(",", "") for number in found]
    elif extraction == "whole":
        found = [completion]
    else:
        raise ValueError(f"extraction: expected one of {', '.join(get_args(Extraction))}, got {extraction!r}")
    return found[-1].strip() if found else None
