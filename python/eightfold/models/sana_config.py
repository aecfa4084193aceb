"""SanaConfig: the sizes and switches of a SANA or SANA-1.5 transformer, from and to diffusers' config.json."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

CLASS_NAME = "SanaTransformer2DModel"
QK_NORM = "rms_norm_across_heads"
# What diffusers' class can be told and this model does not compute.
_FIXED = {"dropout": 0.0, "attention_bias": False, "norm_elementwise_affine": False}
_SIZES = (
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "num_cross_attention_heads",
    "cross_attention_head_dim",
    "in_channels",
    "out_channels",
    "caption_channels",
    "sample_size",
    "patch_size",
)
_SCALES = ("mlp_ratio", "guidance_embeds_scale", "timestep_scale", "norm_eps", "attention_eps", "cross_norm_eps")
_SWITCHES = ("qk_norm", "guidance_embeds")
_NARROW = {"num_attention_heads": 36, "num_cross_attention_heads": 16, "cross_attention_head_dim": 72}
# Of arXiv 2410.10629 and, with norms of queries and keys, arXiv 2501.18427.
NAMED: dict[str, dict[str, Any]] = {
    "0.6B": {**_NARROW, "num_layers": 28},
    "1.6B": {},
    "1.6B-1.5": {"qk_norm": True},
    "4.8B": {"qk_norm": True, "num_layers": 60},
}


@dataclass(frozen=True)
class SanaConfig:
    """Field names are those of diffusers' config.json; the defaults are SANA 1.6B.

    `num_attention_heads` and `attention_head_dim` are those of the linear attention, and their product is the width;
    the two `cross` fields are those of the attention to text. `qk_norm`: RMS norms of queries and keys over the whole
    width (SANA-1.5). `interpolation_scale`: None for no positional embedding, else the scale of a sine embedding laid
    out on a grid of `sample_size` (1.0 for 2K, 2.0 for 4K). `guidance_embeds`: an embedding of the guidance scale is
    added to that of the time (Sprint). `timestep_scale` and `guidance_embeds_scale` are what a sampler multiplies its
    time and its guidance by before the model embeds them.

    `attention_eps` (of the linear attention's division) and `cross_norm_eps` (of the norms of `qk_norm` in the
    attention to text) are not in diffusers' file: there they are 1e-15 and 1e-5, in NVlabs' code 1e-8 and 1e-6.
    """

    num_layers: int = 20
    num_attention_heads: int = 70
    attention_head_dim: int = 32
    num_cross_attention_heads: int = 20
    cross_attention_head_dim: int = 112
    in_channels: int = 32
    out_channels: int = 32
    caption_channels: int = 2304
    mlp_ratio: float = 2.5
    qk_norm: bool = False
    guidance_embeds: bool = False
    guidance_embeds_scale: float = 0.1
    sample_size: int = 32
    patch_size: int = 1
    interpolation_scale: float | None = None
    timestep_scale: float = 1.0
    norm_eps: float = 1e-6
    attention_eps: float = 1e-15
    cross_norm_eps: float = 1e-5

    def __post_init__(self):
        for name in _SIZES:
            value = getattr(self, name)
            if type(value) is not int or value <= 0:
                raise ValueError(f"{name}: expected a positive integer, got {value!r}")
        for name in _SCALES + (() if self.interpolation_scale is None else ("interpolation_scale",)):
            value = getattr(self, name)
            if type(value) not in (int, float) or not 0 < value < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {value!r}")
        for name in _SWITCHES:
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"{name}: expected true or false, got {getattr(self, name)!r}")
        if self.num_cross_attention_heads * self.cross_attention_head_dim != self.width:
            raise ValueError(
                f"cross_attention_head_dim: expected the width {self.width} (num_attention_heads * attention_head_dim) "
                f"/ {self.num_cross_attention_heads} heads, got {self.cross_attention_head_dim}"
            )
        if self.ffn_width < 1:
            raise ValueError(f"mlp_ratio: expected at least 1 / the width {self.width}, got {self.mlp_ratio}")
        if self.interpolation_scale is not None and self.width % 4:
            raise ValueError(
                f"interpolation_scale: expected None unless the width is a multiple of 4, got {self.width}"
            )

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def ffn_width(self) -> int:
        """Features between the gate and the last product of a feed-forward block; before the gate there are twice as
        many."""
        return int(self.mlp_ratio * self.width)

    @classmethod
    def named(cls, name: str, **changes: Any) -> SanaConfig:
        """One of "0.6B", "1.6B" (SANA), "1.6B-1.5", "4.8B" (SANA-1.5), with `changes` to its fields."""
        if name not in NAMED:
            raise ValueError(f"name: expected one of {', '.join(NAMED)}, got {name!r}")
        return cls(**{**NAMED[name], **changes})

    @classmethod
    def from_diffusers(cls, config: dict[str, Any]) -> SanaConfig:
        """Reads the dict of a config.json. ValueError naming the key that is unknown, or whose value this model does
        not compute."""
        if config.get("_class_name", CLASS_NAME) != CLASS_NAME:
            raise ValueError(f"_class_name: expected {CLASS_NAME!r}, got {config['_class_name']!r}")
        values = {key: value for key, value in config.items() if not key.startswith("_")}
        for key, usual in _FIXED.items():
            if (value := values.pop(key, usual)) != usual:
                raise ValueError(f"{key}: expected {usual!r}, got {value!r}")
        norm, cross_width = values.get("qk_norm"), values.pop("cross_attention_dim", 2240)
        if norm not in (None, QK_NORM):
            raise ValueError(f"qk_norm: expected null or {QK_NORM!r}, got {norm!r}")
        values["qk_norm"] = norm == QK_NORM
        values["out_channels"] = values.get("out_channels", 32) or values.get("in_channels", 32)
        if unknown := sorted(set(values) - {field.name for field in dataclasses.fields(cls)}):
            raise ValueError(f"{unknown[0]}: unknown key")
        made = cls(**values)
        if cross_width != made.width:
            raise ValueError(f"cross_attention_dim: expected the width {made.width}, got {cross_width!r}")
        return made

    def to_diffusers(self) -> dict[str, Any]:
        """The dict of a config.json that diffusers loads; it does not know `attention_eps` and `cross_norm_eps`, which
        are written where they are not its own."""
        config = dataclasses.asdict(self)
        for field in dataclasses.fields(self):
            if field.name in ("attention_eps", "cross_norm_eps") and config[field.name] == field.default:
                del config[field.name]
        config["qk_norm"] = QK_NORM if self.qk_norm else None
        return {**config, **_FIXED, "cross_attention_dim": self.width, "_class_name": CLASS_NAME}
