"""A SANA transformer with the captions it learns, as one module and as one folder.

The folder is diffusers' (`models.sana_loading`), with embeddings.safetensors beside the weights: `negative`, the
embedding of the empty caption [tokens, channels], and for a model of classes `embeddings` [classes, tokens, channels];
the metadata has their names, a JSON list under "captions".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from eightfold.models.files import check_tensors, read_diffusers, read_safetensors_file, write_folder
from eightfold.models.precision import Precision
from eightfold.models.sana import Sana
from eightfold.models.sana_config import SanaConfig
from eightfold.models.sana_keys import from_stored, to_stored
from eightfold.models.sana_loading import load_sana, read_sana_config, write_sana
from eightfold.train.image.captions import Captions

CAPTIONS = "embeddings.safetensors"
_STORED = {"null": "negative", "classes": "embeddings"}  # of captions, ours and the file's
_PARTS = ("sana.", "captions.")


class ImageModel(nn.Module):
    """`sana` and its `captions`."""

    def __init__(self, sana: Sana, captions: Captions):
        super().__init__()
        self.sana, self.captions = sana, captions

    @property
    def config(self) -> SanaConfig:
        return self.sana.config

    @property
    def device(self) -> torch.device:
        return self.sana.device

    def forward(self, points: Tensor, times: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Velocities at times 0 to 1000 (see `Sana.forward`)."""
        return self.sana(points, times * self.config.timestep_scale, text, mask)


def load_image_model(
    folder: str | Path,
    precision: Precision = "bf16",
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> ImageModel:
    """The model of a folder that `save_image_model` wrote; errors as of `load_sana`."""
    folder = Path(folder)
    captions = read_captions(folder)
    if captions is None:
        raise FileNotFoundError(f"{folder / CAPTIONS}: no such file")
    sana = load_sana(folder, precision, dtype)
    channels = captions.null.shape[-1]
    if channels != sana.config.caption_channels:
        raise ValueError(
            f"{folder / CAPTIONS}: expected {sana.config.caption_channels} channels as the transformer, got {channels}"
        )
    return ImageModel(sana, captions).to(device, dtype)


def read_captions(folder: Path) -> Captions | None:
    """The captions of a folder; None where it has none."""
    file = folder / CAPTIONS
    if not file.is_file():
        return None
    tensors = read_safetensors_file(file)
    try:
        with safe_open(file, framework="pt") as opened:
            names = json.loads((opened.metadata() or {}).get("captions", "[]"))
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file}: truncated or not a safetensors file: {error}") from None
    null = tensors.get("negative")
    if null is None or null.dim() != 2:
        raise ValueError(f"{file}: negative: expected 2 dimensions, got {None if null is None else tuple(null.shape)}")
    captions = Captions(null.shape[1], null.shape[0], tuple(names))
    state = captions.state_dict()
    check_tensors(tensors, {_STORED[name]: tuple(each.shape) for name, each in state.items()}, file)
    captions.load_state_dict({name: tensors[_STORED[name]] for name in state}, assign=True)
    return captions.requires_grad_(True)


def save_image_model(model: ImageModel, folder: str | Path, tensors: Mapping[str, Tensor] | None = None) -> Path:
    """Writes the folder; `tensors` are written in the place of the model's own (a mean of weights)."""
    folder = Path(folder)
    write_folder(folder, lambda work: write_image_model(model, work, tensors))
    return folder


def write_image_model(model: ImageModel, folder: Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """The files of `save_image_model`, into a folder that is there."""
    state = {name: tensor.detach() for name, tensor in (tensors or model.state_dict()).items()}
    sana, captions = ({n.removeprefix(part): t for n, t in state.items() if n.startswith(part)} for part in _PARTS)
    write_sana(model.config, to_stored(sana, "diffusers", model.config), folder)
    names = {"captions": json.dumps(model.captions.names)}
    save_file({_STORED[name]: tensor.contiguous() for name, tensor in captions.items()}, folder / CAPTIONS, names)
    (folder / CAPTIONS).chmod(0o644)  # safetensors lets only its owner read it


def read_image_model(model: ImageModel, folder: Path) -> dict[str, Tensor]:
    """The tensors of a folder under the names of `model`. ValueError where it holds another model."""
    config = read_sana_config(folder)
    if config != model.config:
        raise ValueError(f"{folder}: a checkpoint of another model: {_difference(config, model.config)}")
    captions = read_captions(folder)
    if captions is None or captions.names != model.captions.names:
        raise ValueError(f"{folder}: a checkpoint of another model: its classes are not those of the data")
    ours = model.sana.state_dict()
    tensors = read_diffusers(folder)
    expected = {name: tuple(tensor.shape) for name, tensor in to_stored(ours, "diffusers", config).items()}
    check_tensors(tensors, expected, folder)
    sana = from_stored(tensors, ours, "diffusers", config)
    learned = {f"captions.{name}": tensor.detach() for name, tensor in captions.state_dict().items()}
    return {**{f"sana.{name}": tensor for name, tensor in sana.items()}, **learned}


def _difference(theirs: SanaConfig, ours: SanaConfig) -> str:
    for name in SanaConfig.__dataclass_fields__:
        found, wanted = getattr(theirs, name), getattr(ours, name)
        if found != wanted:
            return f"its {name} is {found}, the run's {wanted}"
    return ""
