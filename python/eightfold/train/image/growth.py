"""Depth growth with partial preservation (SANA-1.5, arXiv 2501.18427): the first blocks are kept, the others begin as
identities.

What a new block adds to the stream is exactly 0: the last products of its three branches are (weights and biases). The
grown model's output is that of the kept blocks between the old first and last layers, bit for bit in any precision.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn

from eightfold.models.decoder import RMSNorm
from eightfold.models.sana import Sana, SanaBlock

DROPPED = 2  # of a trained model's last blocks: they belong to the task, and what grew behind them would stay idle
_STD, _DEPTHWISE_STD = 0.02, 0.2


def grow(model: Sana, layers: int, keep: int | None = None, seed: int = 0) -> Sana:
    """A copy of `model` with `layers` blocks: its first `keep` (None: all but the last two) and new ones.

    ValueError naming the argument.
    """
    keep = kept_blocks(model.config.num_layers, keep)
    if layers <= keep:
        raise ValueError(f"layers: expected more than the {keep} blocks that are kept, got {layers}")
    generator = torch.Generator().manual_seed(seed)
    grown = with_blocks(model, [*range(keep), *([0] * (layers - keep))])
    for block in grown.transformer_blocks[keep:]:
        _begin_as_identity(block, generator)
    return grown


def kept_blocks(depth: int, keep: int | None) -> int:
    """How many blocks of a model of `depth` `grow` keeps."""
    keep = max(1, depth - DROPPED) if keep is None else keep
    if not 1 <= keep <= depth:
        raise ValueError(f"keep: expected 1 to the model's {depth} blocks, got {keep}")
    return keep


def with_blocks(model: Sana, chosen: list[int]) -> Sana:
    """A copy of `model` whose blocks are copies of those at `chosen`."""
    config = dataclasses.replace(model.config, num_layers=len(chosen))
    with torch.device("meta"):
        made = Sana(config, model.precision, model.checkpoint_blocks)
    state = {name: t for name, t in model.state_dict().items() if not name.startswith("transformer_blocks.")}
    for place, source in enumerate(chosen):
        for name, tensor in model.transformer_blocks[source].state_dict().items():
            state[f"transformer_blocks.{place}.{name}"] = tensor
    made.load_state_dict({name: tensor.clone() for name, tensor in state.items()}, assign=True)
    return made.requires_grad_(True)


@torch.no_grad()
def _begin_as_identity(block: SanaBlock, generator: torch.Generator) -> None:
    """As the released code does it; the biases of linears and of the inverted convolution are random too."""

    def normal(parameter: nn.Parameter, std: float) -> None:
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)

    for module in block.modules():
        if isinstance(module, RMSNorm):
            nn.init.ones_(module.weight)
        else:
            for parameter in module.parameters(recurse=False):
                normal(parameter, _DEPTHWISE_STD if isinstance(module, nn.Conv2d) else _STD)
    for last in (block.attn1.to_out, block.attn2.to_out, block.ff.conv_point):
        for parameter in last.parameters():
            nn.init.zeros_(parameter)
