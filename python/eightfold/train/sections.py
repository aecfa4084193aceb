"""How configurations are read: YAML plus ``key.sub=value`` overrides into typed sections, one clear line a mistake.

A section is a pydantic ``Section``, or a frozen dataclass whose ``__post_init__`` checks its values: such options also
serve callers that have no file, and say what is wrong in the same words there.
"""

import dataclasses
import difflib
import typing
from pathlib import Path
from typing import Any, TypeVar

import pydantic
import yaml
from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """Keys of one part of a configuration; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


Root = TypeVar("Root", bound=Section)


def load(root: type[Root], path: str | Path | None = None, overrides: list[str] | None = None) -> Root:
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
    return parse(root, values, source)


def parse(root: type[Root], values: dict[str, Any], source: str = "configuration") -> Root:
    """Validates nested ``values``; errors as in ``load``."""
    try:
        return root.model_validate(values)
    except pydantic.ValidationError as error:
        raise ValueError(f"{source}: {_explain(error.errors()[0], root)}") from None


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


def _explain(error: Any, root: type[Section]) -> str:
    """One sentence about one pydantic error."""
    location = [str(part) for part in error["loc"]]
    name = ".".join(location)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        allowed = _keys(root, location[:-1])
        close = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        where = f"in {'.'.join(location[:-1])!r}" if location[:-1] else "at the top"
        return f"unknown key {name!r}{hint}; allowed {where}: {', '.join(allowed)}"
    if error["type"] in ("missing", "missing_argument"):
        return f"key {name!r} is missing"
    if error["type"] == "value_error":  # our own check, which names the argument and its value
        return f"key {name!r}: {error['ctx']['error']}" if name else str(error["ctx"]["error"])
    return f"key {name!r}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _keys(root: type[Section], path: list[str]) -> list[str]:
    """The keys allowed in the section at ``path``."""
    section: Any = root
    for part in path:
        kind = typing.get_type_hints(section)[part]
        # Of ``Section | None`` the section.
        section = next((each for each in typing.get_args(kind) if each is not type(None)), kind)
    names = section.model_fields if issubclass(section, BaseModel) else [f.name for f in dataclasses.fields(section)]
    return sorted(names)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
