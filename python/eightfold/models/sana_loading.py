"""SANA transformers from and to disk: diffusers folders, and NVlabs state dicts (.pth or .safetensors)."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import torch

from eightfold.models.files import (
    DIFFUSERS_STEM,
    aligned,
    check_tensors,
    read_config_file,
    read_diffusers,
    read_safetensors_file,
    write_file,
    write_folder,
    write_json,
    write_safetensors,
)
from eightfold.models.precision import Precision
from eightfold.models.sana import Sana
from eightfold.models.sana_config import SanaConfig
from eightfold.models.sana_keys import DROPPED, Layout, config_of_nvlabs, from_stored, to_stored

PICKLED = (".pth", ".pt", ".bin")


def load_sana(
    path: str | os.PathLike,
    precision: Precision = "bf16",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    config: SanaConfig | None = None,
    variant: str | None = None,
) -> Sana:
    """Loads a SANA transformer.

    `path` is a diffusers folder (a pipeline's, or its `transformer`), of whose weights `variant` ("fp16", "bf16") says
    which, or a file of NVlabs: .pth (its "state_dict") or .safetensors. A file has no configuration: None takes one
    from its shapes, which do not show positional embeddings (`SanaConfig.interpolation_scale`, of the 2K and 4K models)
    nor heads of a width that was never released. `dtype` of the parameters: None keeps the file's.

    Raises FileNotFoundError or ValueError with one line naming the file, and the key or tensor that is wrong.
    """
    path = Path(path)
    if path.is_dir():
        if config is not None:
            raise ValueError(f"config: expected None for a folder, which has its own, got one with {path}")
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        config, layout, source = read_sana_config(folder), "diffusers", folder
        tensors = read_diffusers(folder, variant)
    elif path.is_file():
        if variant is not None:
            raise ValueError(f"variant: expected None for a file, got {variant!r} with {path}")
        layout, source = "nvlabs", path
        tensors = {name: tensor for name, tensor in read_nvlabs(path).items() if not DROPPED.fullmatch(name)}
        config = config_of_nvlabs(tensors, path) if config is None else config
    else:
        raise FileNotFoundError(f"{path}: expected a folder, a .pth or a .safetensors file")
    model = build_sana(config, tensors, precision, layout, source)
    return model.to(device, dtype)


def read_sana_config(folder: Path) -> SanaConfig:
    """SanaConfig of folder/config.json."""
    return read_config_file(folder, SanaConfig.from_diffusers)


def read_nvlabs(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors file, or of a .pth file that is a state dict or has one under "state_dict"."""
    if file.suffix == ".safetensors":
        return read_safetensors_file(file)
    if file.suffix not in PICKLED:
        raise ValueError(f"{file}: expected a name that ends with .safetensors or {', '.join(PICKLED)}")
    try:
        content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{file}: truncated or not a file of tensors: {reason}") from None
    state = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(x, torch.Tensor) for x in state.values()):
        raise ValueError(f"{file}: expected a state dict, or one under 'state_dict'")
    return {name: aligned(tensor) for name, tensor in state.items()}


def build_sana(
    config: SanaConfig,
    tensors: dict[str, torch.Tensor],
    precision: Precision = "bf16",
    layout: Layout = "diffusers",
    source: object = "state dict",
) -> Sana:
    """A Sana that takes over `tensors`, which have the names of `layout`, every key and shape checked."""
    with torch.device("meta"):
        model = Sana(config, precision)
    ours = model.state_dict()
    expected = {name: tuple(tensor.shape) for name, tensor in to_stored(ours, layout, config).items()}
    check_tensors(tensors, expected, source)
    model.load_state_dict(from_stored(tensors, ours, layout, config), assign=True)
    return model.requires_grad_(True)


def sana_tensors(model: Sana, layout: Layout = "diffusers") -> dict[str, torch.Tensor]:
    """The model's parameters under the names and in the shapes of `layout`: views of them."""
    return to_stored({name: tensor.detach() for name, tensor in model.state_dict().items()}, layout, model.config)


def save_sana(model: Sana, folder: str | os.PathLike, shard_bytes: int = 10 * 10**9) -> Path:
    """Writes config.json and safetensors files of at most `shard_bytes` (but for a larger tensor), such that diffusers'
    SanaTransformer2DModel.from_pretrained(folder) gives the same model. Errors are those of
    `models.files.write_folder`."""
    folder = Path(folder)
    write_folder(folder, lambda work: write_sana(model.config, sana_tensors(model), work, shard_bytes))
    return folder


def write_sana(
    config: SanaConfig, tensors: dict[str, torch.Tensor], folder: Path, shard_bytes: int = 10 * 10**9
) -> None:
    """The files of `save_sana`, into a folder that is there; `tensors` have diffusers' names and shapes."""
    from huggingface_hub import split_torch_state_dict_into_shards

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    write_json(folder / "config.json", config.to_diffusers())
    plan = split_torch_state_dict_into_shards(
        tensors, filename_pattern=f"{DIFFUSERS_STEM}{{suffix}}.safetensors", max_shard_size=shard_bytes
    )
    for name, keys in plan.filename_to_tensors.items():
        write_safetensors({key: tensors[key] for key in keys}, folder / name)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        write_json(folder / f"{DIFFUSERS_STEM}.safetensors.index.json", index)


def save_nvlabs(model: Sana, file: str | os.PathLike) -> Path:
    """Writes the state dict with NVlabs' names: to .pth under "state_dict", or to .safetensors. Written to a temporary
    name and renamed. Raises ValueError for another suffix, OSError naming the file."""
    file, tensors = Path(file), sana_tensors(model, "nvlabs")
    if file.suffix not in (".safetensors", *PICKLED):
        raise ValueError(f"{file}: expected a name that ends with .safetensors or {', '.join(PICKLED)}")

    def write(work: Path) -> None:
        if file.suffix == ".safetensors":
            write_safetensors({name: tensor.contiguous() for name, tensor in tensors.items()}, work)
        else:
            torch.save({"state_dict": tensors}, work)

    return write_file(file, write)
