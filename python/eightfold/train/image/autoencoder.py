"""An autoencoder from disk as the first half that training on latents asks for."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from torch import Tensor

from eightfold.models.dc_ae import DCAE
from eightfold.models.dc_ae_loading import load_dc_ae


class DCAEEncoder:
    """An `eightfold.train.image.data.Encoder`. `name` is of the weights and sizes, not of the folder, so that a cache
    outlives a move and another autoencoder in the same folder gets latents of its own."""

    def __init__(self, model: DCAE):
        self._model = model
        self.compression = model.config.ratio
        hashed = hashlib.blake2b(repr(model.config).encode(), digest_size=16)
        for name, tensor in sorted(model.encoder.state_dict().items()):
            hashed.update(name.encode() + tensor.cpu().contiguous().numpy().tobytes())
        self.name = f"dc-ae-{hashed.hexdigest()}"

    def __call__(self, pictures: Tensor) -> Tensor:
        return self._model.encode(pictures)


def load_encoder(path: str | Path, channels: int, device: torch.device | str = "cpu") -> DCAEEncoder:
    """The encoder of `path` (as `models.load_dc_ae` takes it), in float32, for a transformer of `channels`
    in_channels. ValueError or FileNotFoundError with one line for a path or sizes that will not do."""
    try:
        model = load_dc_ae(path, torch.float32)
    except (ValueError, FileNotFoundError) as error:
        raise type(error)(f"data.autoencoder: {error}") from None
    checks = ("pictures", model.config.in_channels, 3), ("the model's latents", model.config.latent_channels, channels)
    for what, given, wanted in checks:
        if given != wanted:
            raise ValueError(f"data.autoencoder: {path}: expected {wanted} channels, those of {what}, got {given}")
    return DCAEEncoder(model.to(device).requires_grad_(False))
