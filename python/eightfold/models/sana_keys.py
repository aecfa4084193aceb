"""SANA's tensors under the names of diffusers and of NVlabs, both ways, to the byte.

A tensor of `models.sana.Sana` is one or more tensors there, one below the other; those of pointwise convolutions have
two more dimensions of size 1, that of the patch embedding the patch's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Literal

import torch

from eightfold.models.sana_config import NAMED, SanaConfig

Layout = Literal["diffusers", "nvlabs"]
BLOCKS = {"diffusers": "transformer_blocks", "nvlabs": "blocks"}
# In NVlabs' files, and not needed: what training puts in the place of dropped text, the table of positions (made when
# it is used), and the head that weighs Sprint's loss.
DROPPED = re.compile(r"y_embedder\.y_embedding|pos_embed|logvar_linear\..*")
# ours, diffusers', NVlabs': of a whole model, and of a block
_MODEL = (
    ("patch_embed", "patch_embed.proj", "x_embedder.proj"),
    ("time_embed.timestep_embedder.linear_1", "time_embed.emb.timestep_embedder.linear_1", "t_embedder.mlp.0"),
    ("time_embed.timestep_embedder.linear_2", "time_embed.emb.timestep_embedder.linear_2", "t_embedder.mlp.2"),
    ("time_embed.guidance_embedder.linear_1", "time_embed.guidance_embedder.linear_1", "cfg_embedder.mlp.0"),
    ("time_embed.guidance_embedder.linear_2", "time_embed.guidance_embedder.linear_2", "cfg_embedder.mlp.2"),
    ("time_embed.linear", "time_embed.linear", "t_block.1"),
    ("caption_projection.linear_1", "caption_projection.linear_1", "y_embedder.y_proj.fc1"),
    ("caption_projection.linear_2", "caption_projection.linear_2", "y_embedder.y_proj.fc2"),
    ("caption_norm", "caption_norm", "attention_y_norm"),
    ("scale_shift_table", "scale_shift_table", "final_layer.scale_shift_table"),
    ("proj_out", "proj_out", "final_layer.linear"),
)
_BLOCK = (
    ("scale_shift_table", "scale_shift_table", "scale_shift_table"),
    ("attn1.qkv", "attn1.to_q attn1.to_k attn1.to_v", "attn.qkv"),
    ("attn1.norm_q", "attn1.norm_q", "attn.q_norm"),
    ("attn1.norm_k", "attn1.norm_k", "attn.k_norm"),
    ("attn1.to_out", "attn1.to_out.0", "attn.proj"),
    ("attn2.to_q", "attn2.to_q", "cross_attn.q_linear"),
    ("attn2.kv", "attn2.to_k attn2.to_v", "cross_attn.kv_linear"),
    ("attn2.norm_q", "attn2.norm_q", "cross_attn.q_norm"),
    ("attn2.norm_k", "attn2.norm_k", "cross_attn.k_norm"),
    ("attn2.to_out", "attn2.to_out.0", "cross_attn.proj"),
    ("ff.conv_inverted", "ff.conv_inverted", "mlp.inverted_conv.conv"),
    ("ff.conv_depth", "ff.conv_depth", "mlp.depth_conv.conv"),
    ("ff.conv_point", "ff.conv_point", "mlp.point_conv.conv"),
)
_NAMES = {
    "diffusers": ({row[0]: row[1].split() for row in _MODEL}, {row[0]: row[1].split() for row in _BLOCK}),
    "nvlabs": ({row[0]: row[2].split() for row in _MODEL}, {row[0]: row[2].split() for row in _BLOCK}),
}
_NVLABS_EPS = {"attention_eps": 1e-8, "cross_norm_eps": 1e-6}


def stored_names(name: str, layout: Layout, config: SanaConfig) -> list[str]:
    """What the parameter `name` of a Sana is called in `layout`, in the order in which it is cut along its rows."""
    prefix, names, (model, block) = "", name, _NAMES[layout]
    if match := re.fullmatch(r"transformer_blocks\.(\d+)\.(.*)", name):
        prefix, names, model = f"{BLOCKS[layout]}.{match[1]}.", match[2], block
    module, leaf = (names, "") if names in model else names.rsplit(".", 1)
    stored = [prefix + each + (f".{leaf}" if leaf else "") for each in model[module]]
    if layout == "diffusers" and config.guidance_embeds:
        stored = [each.replace("time_embed.emb.", "time_embed.") for each in stored]
    return stored


def to_stored(tensors: dict[str, torch.Tensor], layout: Layout, config: SanaConfig) -> dict[str, torch.Tensor]:
    """The state dict `tensors` of a Sana under the names and in the shapes of `layout`: views of them."""
    stored = {}
    for name, tensor in tensors.items():
        names = stored_names(name, layout, config)
        for each, part in zip(names, tensor.chunk(len(names)), strict=True):
            stored[each] = part.reshape(*part.shape[:1], *_stored_shape(name, part, config))
    return stored


def from_stored(tensors: dict[str, torch.Tensor], ours: Iterable[str], layout: Layout, config: SanaConfig):
    """The state dict of a Sana, with the names `ours`, from tensors that `layout` names, all of which are there."""
    state = {}
    for name in ours:
        parts = [tensors[each] for each in stored_names(name, layout, config)]
        whole = parts[0] if len(parts) == 1 else torch.cat(parts)
        # What has four dimensions and is not depthwise is a linear here.
        state[name] = whole.flatten(1) if whole.dim() == 4 and "conv_depth" not in name else whole
    return state


def _stored_shape(name: str, part: torch.Tensor, config: SanaConfig) -> tuple[int, ...]:
    if name == "patch_embed.weight":
        return config.in_channels, config.patch_size, config.patch_size
    if name.endswith(("conv_inverted.weight", "conv_point.weight")):
        return part.shape[1], 1, 1
    return part.shape[1:]


def config_of_nvlabs(tensors: dict[str, torch.Tensor], source: object) -> SanaConfig:
    """The configuration of an NVlabs state dict, by its shapes. What they do not show is that of the released models:
    heads of 32, those of the attention to text by the width, no positional embedding. ValueError naming `source` and
    the tensor that is missing, or asking for a configuration where the width is none of the released ones."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}

    def shape(name: str, dims: int) -> tuple[int, ...]:
        if len(shapes.get(name, ())) != dims:
            raise ValueError(f"{source}: {name}: expected {dims} dimensions, got {shapes.get(name, 'no such tensor')}")
        return shapes[name]

    width, channels, patch, _ = shape("x_embedder.proj.weight", 4)
    hidden = shape("blocks.0.mlp.point_conv.conv.weight", 4)[1]
    released = {SanaConfig.named(name).width: NAMED[name] for name in ("0.6B", "1.6B")}
    if width not in released:
        known = " or ".join(map(str, released))
        raise ValueError(f"{source}: width: expected {known}, or a config that says how many heads, got {width}")
    heads = {name: value for name, value in released[width].items() if name != "num_layers"}
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return SanaConfig(
        **heads,
        **_NVLABS_EPS,
        num_layers=len(blocks),
        in_channels=channels,
        out_channels=shape("final_layer.linear.weight", 2)[0] // patch**2,
        caption_channels=shape("y_embedder.y_proj.fc1.weight", 2)[1],
        mlp_ratio=hidden / width,
        qk_norm="blocks.0.attn.q_norm.weight" in shapes,
        guidance_embeds="cfg_embedder.mlp.0.weight" in shapes,
        patch_size=patch,
    )
