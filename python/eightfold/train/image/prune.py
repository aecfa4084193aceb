"""Block importance and depth pruning (SANA-1.5, arXiv 2501.18427).

A block's importance is 1 minus the mean cosine between the tokens that enter it and those that leave it: a block that
changes nothing has 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from eightfold.models.sana import Sana
from eightfold.train.image.growth import with_blocks
from eightfold.train.image.model import ImageModel
from eightfold.train.image.samples import sample_classes


class BlockImportance:
    """Sums over all that a model computes while it watches (`watch_blocks`)."""

    def __init__(self, layers: int):
        self._cosines, self._tokens = torch.zeros(layers, dtype=torch.float64), 0

    def add(self, layer: int, before: Tensor, after: Tensor) -> None:
        """Tokens [B, N, width] in front of a block and behind it."""
        cosines = F.cosine_similarity(before.float(), after.float(), dim=-1)
        self._cosines[layer] += cosines.double().sum().cpu()
        self._tokens += cosines.numel() if layer == 0 else 0

    def values(self) -> list[float]:
        """Of each block. ValueError where nothing has been seen."""
        if not self._tokens:
            raise ValueError("importance: expected the model to compute something, it has not")
        return (1 - self._cosines / self._tokens).tolist()


@contextmanager
def watch_blocks(model: Sana) -> Iterator[BlockImportance]:
    """While the context lasts, every forward without gradients is watched."""
    seen, hooks = BlockImportance(model.config.num_layers), []

    def hook(layer: int):
        def watch(block, inputs, outputs) -> None:
            seen.add(layer, model.compute.add(*inputs[:2]), model.compute.add(*outputs))

        return watch

    try:
        for layer, block in enumerate(model.transformer_blocks):
            hooks.append(block.register_forward_hook(hook(layer)))
        yield seen
    finally:
        for each in hooks:
            each.remove()


def sampled_importance(
    model: ImageModel, side: int, samples: int = 32, batch: int = 8, steps: int = 20, shift: float = 3.0
) -> list[float]:
    """The importance of each block of a model of classes, while it makes `samples` latents of `side` x `side`, of its
    classes by turns, `batch` at once. ValueError where the model has no classes."""
    labels = [number % max(1, len(model.captions.names)) for number in range(samples)]
    with watch_blocks(model.sana) as seen:
        for begin in range(0, samples, batch):
            sample_classes(model, labels[begin : begin + batch], (side, side), steps, shift=shift)
    return seen.values()


def most_important(importance: list[float], layers: int) -> list[int]:
    """The `layers` most important blocks, in their order. ValueError naming the argument."""
    depth = len(importance)
    if not 1 <= layers < depth:
        raise ValueError(f"layers: expected 1 to {depth - 1}, as the model has {depth}, got {layers}")
    ranked = sorted(range(depth), key=lambda block: (-importance[block], block))
    return sorted(ranked[:layers])


def prune(model: Sana, importance: list[float], layers: int) -> Sana:
    """A copy of `model` with its `layers` most important blocks. ValueError naming the argument."""
    if len(importance) != model.config.num_layers:
        wanted = f"one number for each of {model.config.num_layers} blocks"
        raise ValueError(f"importance: expected {wanted}, got {len(importance)}")
    return with_blocks(model, most_important(importance, layers))
