"""A small SANA of three classes with all parameters moved, and inputs for it."""

import torch

from eightfold.models.sana import Sana, SanaConfig
from eightfold.train.image.captions import Captions
from eightfold.train.image.model import ImageModel

SIZES = {
    "num_layers": 3,
    "num_attention_heads": 2,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 2,
    "cross_attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "caption_channels": 8,
    "sample_size": 8,
    "patch_size": 2,
}


def image_model(precision, **changes):
    torch.manual_seed(0)
    sana = Sana(SanaConfig(**{**SIZES, **changes}), precision)
    with torch.no_grad():
        for parameter in sana.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return ImageModel(sana, Captions(8, 2, ("blue", "green", "red")))


def inputs(sana, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return {
        "latents": torch.randn(2, 3, 8, 6, generator=draw),
        "timestep": torch.tensor([900.0, 150.0]),
        "text": torch.randn(2, 4, sana.config.caption_channels, generator=draw),
    }
