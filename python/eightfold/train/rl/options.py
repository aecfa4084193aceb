"""Checks that the frozen option classes share: each error names the argument, what was expected and what came."""

import math
from typing import Any


def require(holds: bool, name: str, expected: str, value: Any) -> None:
    """ValueError unless ``holds``."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, got {value!r}")


def require_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError unless ``value`` is one of ``choices``."""
    require(value in choices, name, f"one of {', '.join(choices)}", value)


def require_finite(name: str, value: float) -> None:
    """ValueError unless ``value`` is a finite number."""
    require(math.isfinite(value), name, "a finite number", value)
