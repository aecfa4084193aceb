"""How files hold the tensors of a DC-AE: those of diffusers' AutoencoderDC (q, k and v in three matrices) and of
efficientvit's DCAE (mit-han-lab/efficientvit, models/efficientvit/dc_ae.py: other names, matrices as 1x1 convolutions).

A layout maps a name and shape of `DCAE` to the file's names and shapes of its parts, the first rows first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Literal

from torch import Tensor, cat

from eightfold.models.dc_ae_config import DCAEConfig
from eightfold.models.files import check_tensors

Names = Literal["diffusers", "efficientvit"]
Shape = tuple[int, ...]
Layout = Callable[[str, Shape], dict[str, Shape]]
NAMES = ("diffusers", "efficientvit")

# Of a block of a stage.
_PARTS = {
    "conv1": "main.conv1.conv",
    "conv2": "main.conv2.conv",
    "norm": "main.conv2.norm",
    "attn.to_qkv": "context_module.main.qkv.conv",
    "attn.to_out": "context_module.main.proj.conv",
    "attn.norm_out": "context_module.main.proj.norm",
    "conv_out.conv_inverted": "local_module.main.inverted_conv.conv",
    "conv_out.conv_depth": "local_module.main.depth_conv.conv",
    "conv_out.conv_point": "local_module.main.point_conv.conv",
    "conv_out.norm": "local_module.main.point_conv.norm",
}


def diffusers_layout(name: str, shape: Shape) -> dict[str, Shape]:
    """Thirds of the one matrix; which rows of it are queries only its heads know (`MultiscaleAttention`)."""
    if not name.endswith(".to_qkv.weight"):
        return {name: shape}
    return {name.replace("to_qkv", f"to_{part}"): (shape[0] // 3, *shape[1:]) for part in "qkv"}


def efficientvit_layout(config: DCAEConfig) -> Layout:
    def layout(name: str, shape: Shape) -> dict[str, Shape]:
        matrix = name.endswith((".to_qkv.weight", ".to_out.weight"))
        return {efficientvit_name(name, config): (*shape, 1, 1) if matrix else shape}

    return layout


def efficientvit_name(name: str, config: DCAEConfig) -> str:
    """efficientvit's name of the tensor `name` of a DCAE."""
    stem, _, leaf = name.rpartition(".")
    strided = config.downsample_block_type == "conv"
    if block := re.fullmatch(r"(encoder\.down|decoder\.up)_blocks\.(\d+)\.(\d+)\.(.+)", stem):
        side, part = block[1].split(".")[0], block[4]
        if part == "conv":
            part = "main.conv" if side == "encoder" and strided else "main.conv.conv"
        elif scale := re.fullmatch(r"attn\.to_qkv_multiscale\.(\d+)\.proj_(in|out)", part):
            part = f"context_module.main.aggreg.{scale[1]}.{int(scale[2] == 'out')}"
        else:
            part = _PARTS[part]
        return f"{side}.stages.{block[2]}.op_list.{block[3]}.{part}.{leaf}"
    around = {
        "encoder.conv_in": "encoder.project_in.conv",
        "encoder.conv_in.conv": "encoder.project_in.conv" if strided else "encoder.project_in.conv.conv",
        "encoder.conv_out": f"encoder.project_out{'.main' if config.encoder_out_shortcut else ''}.op_list.0.conv",
        "decoder.conv_in": f"decoder.project_in{'.main' if config.decoder_in_shortcut else ''}.conv",
        "decoder.norm_out": "decoder.project_out.op_list.0",
        "decoder.conv_out": "decoder.project_out.op_list.2.conv",
        "decoder.conv_out.conv": "decoder.project_out.op_list.2.conv.conv",
    }
    return f"{around[stem]}.{leaf}"


def names_of(keys: Iterable[str]) -> Names:
    """Whose names these are, by what only efficientvit's have."""
    return "efficientvit" if any(re.match(r"(en|de)coder\.(project_|stages\.)", key) for key in keys) else "diffusers"


def layout_of(names: Names, config: DCAEConfig) -> Layout:
    if names not in NAMES:
        raise ValueError(f"names: expected one of {', '.join(NAMES)}, got {names!r}")
    return diffusers_layout if names == "diffusers" else efficientvit_layout(config)


def gathered(
    expected: dict[str, Shape], layout: Layout, tensors: dict[str, Tensor], source: object
) -> dict[str, Tensor]:
    """The tensors of a DCAE, named and shaped as `expected`, of the file's `tensors`.

    Raises ValueError, naming `source` and the file's names, for missing and unknown tensors and other shapes.
    """
    parts = {name: layout(name, shape) for name, shape in expected.items()}
    check_tensors(tensors, {key: shape for of_one in parts.values() for key, shape in of_one.items()}, source)
    joined = {}
    for name, of_one in parts.items():
        pieces = [tensors[key] for key in of_one]
        joined[name] = (cat(pieces) if len(pieces) > 1 else pieces[0]).reshape(expected[name])
    return joined


def scattered(tensors: dict[str, Tensor], layout: Layout) -> dict[str, Tensor]:
    """The inverse of `gathered`: the file's tensors, contiguous, of those of a DCAE."""
    stored = {}
    for name, tensor in tensors.items():
        parts = layout(name, tuple(tensor.shape))
        pieces = tensor.chunk(len(parts)) if len(parts) > 1 else (tensor,)
        stored |= {key: piece.reshape(parts[key]).contiguous() for key, piece in zip(parts, pieces)}
    return stored
