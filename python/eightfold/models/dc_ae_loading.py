"""DC-AE autoencoders from and to disk: diffusers folders and efficientvit checkpoints."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from eightfold.models.dc_ae import DCAE, check_dtype
from eightfold.models.dc_ae_config import SANA_F32C32, DCAEConfig
from eightfold.models.dc_ae_names import Names, gathered, layout_of, names_of, scattered
from eightfold.models.files import (
    DIFFUSERS_STEM,
    read_config_file,
    read_diffusers,
    read_safetensors_file,
    write_folder,
    write_json,
    write_safetensors,
)

SINGLE = "model.safetensors"


def load_dc_ae(
    path: str | os.PathLike,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    *,
    config: DCAEConfig | None = None,
    variant: str | None = None,
) -> DCAE:
    """Loads an autoencoder, in eval mode.

    `path` is a diffusers pipeline's folder (its vae/ is read), an AutoencoderDC's folder (config.json and
    diffusion_pytorch_model.safetensors, or its index and shards, or model.safetensors), or a .safetensors file. Names
    are diffusers' or efficientvit's, whichever they are. `config` replaces the folder's config.json; a file has none,
    and is SANA's autoencoder if no `config` is given. `variant` ("bf16") says which of a folder's weights. `dtype` of
    the parameters: float32 or bfloat16; None keeps the file's, which must be one of them.

    Raises FileNotFoundError or ValueError with one line naming the file, and the key or field that is wrong.
    """
    if dtype is not None:
        check_dtype("dtype", dtype)
    path = Path(path)
    if path.is_dir():
        path = path / "vae" if (path / "vae").is_dir() else path
        config = read_dc_ae_config(path) if config is None else config
        single = variant is None and (path / SINGLE).is_file()
        tensors = read_safetensors_file(path / SINGLE) if single else read_diffusers(path, variant)
    elif path.is_file() and path.suffix == ".safetensors":
        if variant is not None:
            raise ValueError(f"variant: expected None for a file, got {variant!r} with {path}")
        tensors = read_safetensors_file(path)
    else:
        raise FileNotFoundError(f"{path}: expected a folder or a .safetensors file")
    return build_dc_ae(config or SANA_F32C32, tensors, dtype, source=path).to(device)


def read_dc_ae_config(folder: Path) -> DCAEConfig:
    """DCAEConfig of folder/config.json."""
    return read_config_file(folder, DCAEConfig.from_diffusers)


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
    happens to an older `folder`, are those of `models.files.write_folder`; ValueError names `names`."""
    folder, layout = Path(folder), layout_of(names, model.config)
    single = f"{DIFFUSERS_STEM}.safetensors" if names == "diffusers" else SINGLE

    def write(work: Path) -> None:
        write_json(work / "config.json", model.config.to_diffusers())
        tensors = {name: tensor.detach() for name, tensor in model.state_dict().items()}
        write_safetensors(scattered(tensors, layout), work / single)

    write_folder(folder, write)
    return folder
