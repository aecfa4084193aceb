"""DC-AE autoencoders from and to disk: diffusers folders and efficientvit checkpoints."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from eightfold.models.dc_ae import DCAE, check_dtype
from eightfold.models.dc_ae_config import SANA_F32C32, DCAEConfig
from eightfold.models.dc_ae_names import Names, gathered, layout_of, names_of, scattered
from eightfold.models.loading import SINGLE, read_safetensors, read_shard, save_folder, write_json, write_safetensors

WEIGHTS = "diffusion_pytorch_model.safetensors"


def load_dc_ae(
    path: str | os.PathLike,
    config: DCAEConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> DCAE:
    """Loads an autoencoder, in eval mode.

    `path` is a diffusers pipeline's folder (its vae/ is read), an AutoencoderDC's folder (config.json and
    diffusion_pytorch_model.safetensors, or its index and shards, or model.safetensors), or a .safetensors file. Names
    are diffusers' or efficientvit's, whichever they are. `config` replaces the folder's config.json; a file has none,
    and is SANA's autoencoder if no `config` is given. `dtype` of the parameters: float32 or bfloat16; None keeps the
    file's, which must be one of them. Raises FileNotFoundError or ValueError with one line naming the file, and the key
    or field that is wrong.
    """
    if dtype is not None:
        check_dtype("dtype", dtype)
    path = Path(path)
    if path.is_dir():
        path = path / "vae" if (path / "vae").is_dir() else path
        config = read_dc_ae_config(path) if config is None else config
        tensors = read_safetensors(path, SINGLE if (path / SINGLE).is_file() else WEIGHTS)
    elif path.is_file() and path.suffix == ".safetensors":
        tensors = read_shard(path)
    else:
        raise FileNotFoundError(f"{path}: expected a folder or a .safetensors file")
    return build_dc_ae(config or SANA_F32C32, tensors, dtype, source=path).to(device)


def read_dc_ae_config(folder: Path) -> DCAEConfig:
    """DCAEConfig of folder/config.json."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        return DCAEConfig.from_diffusers(json.loads(file.read_text(encoding="utf-8")))
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from None


def build_dc_ae(
    config: DCAEConfig,
    tensors: dict[str, torch.Tensor],
    dtype: torch.dtype | None = None,
    source: object = "state dict",
) -> DCAE:
    """An autoencoder of `tensors`, under diffusers' or efficientvit's names, every key and shape checked."""
    with torch.device("meta"):
        model = DCAE(config)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    joined = gathered(expected, layout_of(names_of(tensors), config), tensors, source)
    if dtype is None:
        dtypes = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
        if len(dtypes) > 1:
            raise ValueError(f"{source}: expected one dtype, got {', '.join(sorted(map(str, dtypes)))}: give `dtype`")
        check_dtype(f"{source}: dtype", next(iter(dtypes)))
    model.load_state_dict(joined, assign=True)
    return model.requires_grad_(True).to(dtype=dtype, memory_format=torch.channels_last).eval()


def save_dc_ae(model: DCAE, folder: str | os.PathLike, names: Names = "diffusers") -> Path:
    """Writes config.json and the weights, such that diffusers' AutoencoderDC.from_pretrained(folder) gives the same
    model; with `names` "efficientvit" model.safetensors with those names, for efficientvit's DCAE. The errors, and what
    happens to an older `folder`, are those of `save_folder`; ValueError names `names`."""
    layout = layout_of(names, model.config)

    def write(work: Path) -> None:
        write_json(work / "config.json", model.config.to_diffusers())
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        write_safetensors(work / (WEIGHTS if names == "diffusers" else SINGLE), scattered(tensors, layout))

    return save_folder(folder, write)
