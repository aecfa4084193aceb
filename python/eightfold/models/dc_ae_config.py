"""DCAEConfig: the sizes and switches of a deep-compression autoencoder (DC-AE), from and to diffusers' config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

BLOCK_TYPES = ("ResBlock", "EfficientViTBlock")
NORMS = ("rms_norm", "batch_norm")
ACTIVATIONS = ("silu", "swish", "relu", "gelu", "mish")
DOWNSAMPLE_TYPES = ("conv", "pixel_unshuffle")
UPSAMPLE_TYPES = ("interpolate", "pixel_shuffle")
CLASS_NAME = "AutoencoderDC"
_SIDES = ("encoder", "decoder")
_PER_STAGE = ("block_types", "block_out_channels", "layers_per_block", "qkv_multiscales")


@dataclass(frozen=True)
class DCAEConfig:
    """Field names and defaults are those of diffusers' AutoencoderDC (arXiv 2410.10733); the autoencoder of SANA is
    `SANA_F32C32`. Fields of stages run from the image to the latents, in the decoder too, and a single name stands for
    all stages.

    A stage's `qkv_multiscales` are the sizes of the depthwise convolutions that its attention gathers more queries,
    keys and values with. A first stage of no layers puts the first change of resolution into the convolution at the
    image. `scaling_factor` is what latents are multiplied with for a diffusion model.
    """

    in_channels: int = 3
    latent_channels: int = 32
    attention_head_dim: int = 32
    encoder_block_types: str | Sequence[str] = "ResBlock"
    decoder_block_types: str | Sequence[str] = "ResBlock"
    encoder_block_out_channels: Sequence[int] = (128, 256, 512, 512, 1024, 1024)
    decoder_block_out_channels: Sequence[int] = (128, 256, 512, 512, 1024, 1024)
    encoder_layers_per_block: Sequence[int] = (2, 2, 2, 3, 3, 3)
    decoder_layers_per_block: Sequence[int] = (3, 3, 3, 3, 3, 3)
    encoder_qkv_multiscales: Sequence[Sequence[int]] = ((), (), (), (5,), (5,), (5,))
    decoder_qkv_multiscales: Sequence[Sequence[int]] = ((), (), (), (5,), (5,), (5,))
    upsample_block_type: str = "pixel_shuffle"
    downsample_block_type: str = "pixel_unshuffle"
    decoder_norm_types: str | Sequence[str] = "rms_norm"
    decoder_act_fns: str | Sequence[str] = "silu"
    encoder_out_shortcut: bool = True
    decoder_in_shortcut: bool = True
    decoder_conv_act_fn: str = "relu"
    scaling_factor: float = 1.0

    def __post_init__(self):
        for name in ("in_channels", "latent_channels", "attention_head_dim"):
            _check_positive(name, getattr(self, name))
        for side in _SIDES:
            self._check_stages(side)
        if len(self.encoder_block_out_channels) != len(self.decoder_block_out_channels):
            raise ValueError(
                f"decoder_block_out_channels: expected {len(self.encoder_block_out_channels)} stages as in the "
                f"encoder, got {len(self.decoder_block_out_channels)}"
            )
        for name, allowed in (("decoder_norm_types", NORMS), ("decoder_act_fns", ACTIVATIONS)):
            self._set_per_stage("decoder", name)
            for value in getattr(self, name):
                _check_among(name, value, allowed)
        _check_among("decoder_conv_act_fn", self.decoder_conv_act_fn, ACTIVATIONS)
        _check_among("downsample_block_type", self.downsample_block_type, DOWNSAMPLE_TYPES)
        _check_among("upsample_block_type", self.upsample_block_type, UPSAMPLE_TYPES)
        for side, shortcut in (("encoder", "encoder_out_shortcut"), ("decoder", "decoder_in_shortcut")):
            widest = getattr(self, f"{side}_block_out_channels")[-1]
            if getattr(self, shortcut) and widest % self.latent_channels:
                raise ValueError(
                    f"{shortcut}: expected a last stage of a multiple of {self.latent_channels} channels "
                    f"(latent_channels), got {widest}"
                )
        if not isinstance(self.scaling_factor, (int, float)) or not self.scaling_factor > 0:
            raise ValueError(f"scaling_factor: expected a positive number, got {self.scaling_factor!r}")

    def _set_per_stage(self, side: str, name: str) -> None:
        """Makes the field a tuple with an entry for each of the side's stages."""
        value, stages = getattr(self, name), len(getattr(self, f"{side}_block_out_channels"))
        if isinstance(value, str):
            value = (value,) * stages
        if not isinstance(value, (list, tuple)) or len(value) != stages:
            raise ValueError(f"{name}: expected {stages} entries ({side}_block_out_channels), got {value!r}")
        object.__setattr__(self, name, tuple(value))

    def _check_stages(self, side: str) -> None:
        widths_name = f"{side}_block_out_channels"
        if not isinstance(getattr(self, widths_name), (list, tuple)) or not getattr(self, widths_name):
            raise ValueError(f"{widths_name}: expected a list of widths, got {getattr(self, widths_name)!r}")
        for field in _PER_STAGE:
            self._set_per_stage(side, f"{side}_{field}")
        types, widths, layers, scales = (getattr(self, f"{side}_{field}") for field in _PER_STAGE)
        for stage, (kind, width, depth, sizes) in enumerate(zip(types, widths, layers, scales)):
            _check_among(f"{side}_block_types", kind, BLOCK_TYPES)
            _check_positive(widths_name, width)
            if not isinstance(depth, int) or depth < (stage > 0 or len(widths) == 1):
                raise ValueError(
                    f"{side}_layers_per_block: expected positive integers (0 only in the first of several stages), "
                    f"got {list(layers)}"
                )
            if not isinstance(sizes, (list, tuple)) or not all(isinstance(n, int) and n > 0 and n % 2 for n in sizes):
                raise ValueError(f"{side}_qkv_multiscales: expected lists of odd sizes, got {sizes!r}")
            if kind == "EfficientViTBlock" and width < self.attention_head_dim:
                raise ValueError(
                    f"{widths_name}: expected at least attention_head_dim ({self.attention_head_dim}) channels in a "
                    f"stage of EfficientViTBlock, got {width}"
                )
        object.__setattr__(self, f"{side}_qkv_multiscales", tuple(tuple(sizes) for sizes in scales))
        for fine, coarse in self.steps(side):
            if 4 * fine % coarse or (4 * fine // coarse > 2 and 4 * fine // coarse % 4):
                raise ValueError(
                    f"{widths_name}: expected neighbouring stages a, b with 4 a / b of 1, 2 or a multiple of 4, "
                    f"got {fine}, {coarse}"
                )
            if side == "encoder" and self.downsample_block_type == "pixel_unshuffle" and coarse % 4:
                raise ValueError(f"{widths_name}: expected multiples of 4 for pixel_unshuffle, got {coarse}")

    def steps(self, side: str) -> list[tuple[int, int]]:
        """(finer, coarser) widths of the changes of resolution between the side's stages that have layers."""
        widths = getattr(self, f"{side}_block_out_channels")
        first = 0 if getattr(self, f"{side}_layers_per_block")[0] else 1
        return list(zip(widths[first:], widths[first + 1 :]))

    @property
    def ratio(self) -> int:
        """Pixels to a latent, along each side."""
        return 2 ** (len(self.encoder_block_out_channels) - 1)

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> DCAEConfig:
        """Reads the dict of a config.json of AutoencoderDC; keys that begin with "_" are diffusers' own.

        Raises ValueError, naming the key and its value, for what this autoencoder does not compute.
        """
        if config.get("_class_name", CLASS_NAME) != CLASS_NAME:
            raise ValueError(f"_class_name: expected {CLASS_NAME!r}, got {config['_class_name']!r}")
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        unknown = sorted(values.keys() - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(f"{unknown[0]}: not a field of {CLASS_NAME}, got {values[unknown[0]]!r}")
        return cls(**values)

    def to_diffusers(self) -> dict[str, Any]:
        """The dict of a config.json that diffusers' AutoencoderDC loads."""
        return {"_class_name": CLASS_NAME, **dataclasses.asdict(self)}


def _check_positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or value <= 0:
        raise ValueError(f"{name}: expected a positive integer, got {value!r}")


def _check_among(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, got {value!r}")


_SANA_BLOCKS = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
SANA_F32C32 = DCAEConfig(
    encoder_block_types=_SANA_BLOCKS,
    decoder_block_types=_SANA_BLOCKS,
    downsample_block_type="conv",
    upsample_block_type="interpolate",
    scaling_factor=0.41407,
)
"""dc-ae-f32c32-sana-1.0 and 1.1: 32 x 32 pixels to a latent of 32 channels (arXiv 2410.10629)."""
