"""Folders of safetensors files: read whole or in shards, checked against a model, and written such that nothing is left
half done."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

DIFFUSERS_STEM = "diffusion_pytorch_model"
Config = TypeVar("Config")


def read_config_file(folder: Path, parse: Callable[[dict[str, Any]], Config]) -> Config:
    """parse(the dict in folder/config.json). FileNotFoundError, or ValueError that names the file and what is wrong."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return parse(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from None


def read_diffusers(folder: Path, variant: str | None = None) -> dict[str, torch.Tensor]:
    """All tensors of a folder of one of diffusers' models, of the weights of that `variant` ("fp16", "bf16")."""
    suffix = "" if variant is None else f".{variant}"
    index = f"{DIFFUSERS_STEM}.safetensors.index{suffix}.json"
    return read_shards(folder, f"{DIFFUSERS_STEM}{suffix}.safetensors", index)


def read_shards(folder: Path, single: str, index: str) -> dict[str, torch.Tensor]:
    """All tensors of folder/single, or of the shards that folder/index names."""
    if not (folder / index).is_file():
        if not (folder / single).is_file():
            raise FileNotFoundError(f"{folder}: neither {single} nor {index} is there")
        return read_safetensors_file(folder / single)
    try:
        weight_map = json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{folder / index}: not a safetensors index: {error!r}") from None
    absent = [shard for shard in shards if not (folder / shard).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder / absent[0]}: shard named in {index} is missing")
    tensors: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensors.update(read_safetensors_file(folder / shard))
    return tensors


def read_safetensors_file(file: Path) -> dict[str, torch.Tensor]:
    try:
        with safe_open(file, framework="pt") as shard:
            return {key: aligned(shard.get_tensor(key)) for key in shard.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{file}: truncated or not a safetensors file: {error}") from None


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, copied if need be to where the ops take it; in a file a tensor begins at any multiple of 8 bytes."""
    return tensor if tensor.data_ptr() % 16 == 0 else tensor.clone()


def check_tensors(
    tensors: Mapping[str, torch.Tensor],
    expected: Mapping[str, tuple[int, ...]],
    source: object,
    stored: Callable[[str], str] = str,
) -> None:
    """ValueError naming `source` and the tensors (under their `stored` names) that are missing, unexpected or of
    another shape than `expected`."""
    missing = [stored(name) for name in expected if tensors.get(name) is None]
    unexpected = [name for name in tensors if name not in expected]
    if missing:
        raise ValueError(f"{source}: missing {some(missing)}")
    if unexpected:
        raise ValueError(f"{source}: unexpected {some(unexpected)}")
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{source}: {stored(name)}: expected shape {shape}, got {tuple(tensors[name].shape)}")


def some(names: list[str], first: int = 3) -> str:
    more = f" and {len(names) - first} more" if len(names) > first else ""
    return f"{len(names)} tensor{'s' if len(names) > 1 else ''}: {', '.join(names[:first])}{more}"


def write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def write_safetensors(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)  # safetensors lets only its owner read it


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary folder beside `folder`, which is then renamed to it; if that fails (a full disk),
    the temporary folder is removed and an older `folder` stays as it was.

    Raises OSError naming the folder; ValueError if it holds something other than a saved model (a config.json).
    """
    if folder.exists() and not (folder.is_dir() and ((folder / "config.json").exists() or not any(folder.iterdir()))):
        raise ValueError(f"{folder}: expected a new name, an empty folder or a saved model to replace")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(work)
        work.chmod(0o755)
        _replace_folder(work, folder)
    except Exception as error:
        # The tokenizers library reports a failed write as a bare Exception.
        if isinstance(error, (OSError, SafetensorError)) or type(error) is Exception:
            raise OSError(f"{folder}: not saved: {error}") from None
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _replace_folder(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; an older one is moved aside first and removed last, or moved back on failure."""
    if not folder.exists():
        os.rename(new, folder)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{folder.name}-old-", dir=folder.parent))
    os.rename(folder, old / folder.name)
    try:
        os.rename(new, folder)
    except OSError:
        os.rename(old / folder.name, folder)
        raise
    finally:
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
