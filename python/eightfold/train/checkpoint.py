"""Checkpoints: ``OUTPUT/checkpoints/step-00000100`` is a model folder that transformers loads, with the trainer's state
beside the weights.

    config.json, model.safetensors, tokenizer files     the model
    trainer/*.distcp, trainer/.metadata                 optimizer states (torch.distributed.checkpoint: any world size)
    trainer/state.json                                  step, data position, RNG, and the size of every file

Everything is written under a temporary name and renamed when complete; only then are old checkpoints removed.
"""

import contextlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from eightfold.train import distributed
from eightfold.train.distributed import World

FORMAT = 1
STATE = Path("trainer") / "state.json"
_NAME = re.compile(r"step-(\d{8})")


def folder_of(output: str | Path, step: int) -> Path:
    return Path(output) / "checkpoints" / f"step-{step:08d}"


def complete(output: str | Path) -> list[Path]:
    """Complete checkpoints below ``output``, oldest first."""
    root = Path(output) / "checkpoints"
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if _NAME.fullmatch(path.name) and (path / STATE).exists())


def find(output: str | Path, resume: str) -> Path:
    """The checkpoint that ``resume`` ('latest' or a folder) means."""
    if resume != "latest":
        return Path(resume)
    found = complete(output)
    if not found:
        raise ValueError(f"{Path(output) / 'checkpoints'}: no checkpoint to resume from")
    return found[-1]


def save(
    output: str | Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    world: World,
    *,
    tokenizer: Any = None,
    keep_last: int = 2,
    write: Callable[[nn.Module, Path], None] | None = None,
) -> Path:
    """Writes a checkpoint (every process calls it) and removes all but the newest ``keep_last``.

    ``write`` puts the files of a whole model into a folder; None: those of a Decoder and its ``tokenizer``.
    ``state`` is JSON. OSError with one line when the disk does not take it; the older checkpoints are then untouched.
    """
    final = folder_of(output, step)
    draft = final.with_name(f".{final.name}.writing")
    error = None
    try:
        if world.leads:
            for leftover in final.parent.glob(".step-*"):
                shutil.rmtree(leftover)
            final.parent.mkdir(parents=True, exist_ok=True)
        _save_model(model, draft, write or _decoder_writer(tokenizer), world)
    except OSError as failure:
        error = _reason(failure)
    try:
        world.together(error)
        try:
            _save_optimizer(model, optimizer, draft / "trainer", world)
            random = world.gather(_random_state(world))
            if world.leads:
                _seal(draft, {"format": FORMAT, "step": step, "random": random, **state})
                if final.exists():
                    _remove(final)
                draft.rename(final)
                _sync(final.parent)
        except OSError as failure:
            error = _reason(failure)
        world.together(error)
    except OSError as failure:
        if world.leads:
            shutil.rmtree(draft, ignore_errors=True)
        raise OSError(f"{final}: the checkpoint could not be written: {failure}; older ones are untouched") from None
    if world.leads:
        for old in complete(output)[:-keep_last]:
            _remove(old)
    return final


def load(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    world: World,
    read: Callable[[nn.Module, Path], dict[str, torch.Tensor]] | None = None,
) -> dict[str, Any]:
    """Restores model, optimizer and RNG from a checkpoint; returns the ``state`` given to ``save``, plus ``step``.

    ``read`` gives the tensors of the model's files under the model's own names; None: of a Decoder's.
    ValueError with one line when it is incomplete, of another format, of another model or another optimizer.
    """
    state = read_state(folder)
    _load_model(folder, model, (read or _read_decoder)(model, folder))
    _load_optimizer(folder / "trainer", model, optimizer, world)
    if len(state["random"]) == world.size:
        _set_random_state(state["random"][world.rank], world)
    return state


def read_state(folder: Path) -> dict[str, Any]:
    """The trainer state of a checkpoint whose files are all there, whole."""
    path = folder / STATE
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such checkpoint folder")
    if not path.exists():
        raise ValueError(f"{folder}: not a checkpoint of eightfold train: {STATE} is missing")
    try:
        state = json.loads(path.read_text())
    except ValueError:
        raise ValueError(f"{path}: damaged: not JSON") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        found = state.get("format") if isinstance(state, dict) else None
        raise ValueError(f"{folder}: checkpoint format {found!r}; this version reads format {FORMAT}")
    for name, size in state["files"].items():
        file = folder / name
        if not file.exists():
            raise ValueError(f"{folder}: {name} is missing")
        if file.stat().st_size != size:
            raise ValueError(f"{folder}: {name} has {file.stat().st_size} bytes, expected {size}: truncated?")
    return state


def _decoder_writer(tokenizer: Any) -> Callable[[nn.Module, Path], None]:
    from eightfold.models.loading import write_decoder

    return lambda model, folder: write_decoder(model, folder, tokenizer)


def _save_model(model: nn.Module, folder: Path, write: Callable[[nn.Module, Path], None], world: World) -> None:
    from safetensors import SafetensorError

    model = distributed.whole(model, world)
    if model is None:
        return
    folder.mkdir()
    try:
        write(model, folder)
    except Exception as error:  # safetensors and tokenizers report a failed write in exceptions of their own
        if isinstance(error, SafetensorError) or type(error) is Exception:
            raise OSError(str(error)) from None
        raise


def _read_decoder(model: nn.Module, folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError, safe_open

    from eightfold.models.loading import decoder_names

    tensors = {}
    try:
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, "pt") as opened:
                tensors.update({name: opened.get_tensor(name) for name in opened.keys()})  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{folder}: damaged weights: {error}") from None
    return decoder_names(tensors, model.config.model_type, folder)


def _load_model(folder: Path, model: nn.Module, tensors: dict[str, torch.Tensor]) -> None:
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    named = dict(model.named_parameters())  # tied weights appear once
    for name, parameter in named.items():
        if name not in tensors:
            raise ValueError(f"{folder}: a checkpoint of another model: it has no {name}")
        if tensors[name].shape != parameter.shape:
            raise ValueError(
                f"{folder}: a checkpoint of another model: {name} has shape {tuple(tensors[name].shape)}, "
                f"expected {tuple(parameter.shape)}"
            )
    strange = sorted(set(tensors) - set(model.state_dict()))
    if strange:
        raise ValueError(f"{folder}: a checkpoint of another model: it has {strange[0]}")
    if tensors[next(iter(named))].dtype != next(iter(named.values())).dtype:
        raise ValueError(
            f"{folder}: its parameters are {tensors[next(iter(named))].dtype}, the run's are "
            f"{next(iter(named.values())).dtype} (model.parameters)"
        )
    set_model_state_dict(
        model,
        {name: tensors[name] for name in named},
        options=StateDictOptions(full_state_dict=True, strict=False),
    )


def _save_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path, world: World) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    states = get_optimizer_state_dict(model, optimizer)["state"]
    try:
        with _no_lone_warning():
            dcp.save({"state": states}, checkpoint_id=folder, no_dist=world.size == 1)
    except CheckpointException as error:
        raise OSError(_first_failure(error)) from None
    except RuntimeError as error:  # torch's zip writer reports a short write so
        raise OSError(str(error).split("\n")[0]) from None


def _load_optimizer(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, world: World) -> None:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    current = get_optimizer_state_dict(model, optimizer)  # makes zero states to load into
    saved = {"state": current["state"]}
    try:
        with _no_lone_warning():
            dcp.load(saved, checkpoint_id=folder, no_dist=world.size == 1)
    except CheckpointException as error:
        raise ValueError(f"{folder}: optimizer states do not fit this run: {_first_failure(error)}") from None
    except (RuntimeError, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{folder}: optimizer states do not fit this run: {str(error).splitlines()[0]}") from None
    set_optimizer_state_dict(model, optimizer, {**current, **saved})


@contextlib.contextmanager
def _no_lone_warning() -> Iterator[None]:
    """Without torch's remark that a single process saves alone, which no_dist has said already."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _first_failure(error: BaseException) -> str:
    failure = next(iter(error.failures.values()))[0]
    return _reason(failure) if isinstance(failure, OSError) else str(failure).split("\n")[0]


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def _random_state(world: World) -> dict[str, str]:
    state = {"cpu": torch.get_rng_state().numpy().tobytes().hex()}
    if world.device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state().numpy().tobytes().hex()
    return state


def _set_random_state(state: dict[str, str], world: World) -> None:
    def tensor(text: str) -> torch.Tensor:
        return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)

    torch.set_rng_state(tensor(state["cpu"]))
    if world.device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(tensor(state["cuda"]))


def _seal(folder: Path, state: dict[str, Any]) -> None:
    """Writes state.json with the sizes of all other files, and puts everything on the disk."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    state["files"] = {str(path.relative_to(folder)): path.stat().st_size for path in files}
    with open(folder / STATE, "w") as out:
        json.dump(state, out, indent=1)
    for path in [*files, folder / STATE, folder / "trainer", folder]:
        _sync(path)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(folder: Path) -> None:
    """Removes a checkpoint so that it never looks complete half-way."""
    doomed = folder.with_name(f".{folder.name}.removing")
    folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)
