"""An image network over an image in overlapping tiles, blended linearly: its memory is that of a tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tiling:
    """Tiles of at most `tile` x `tile` pixels that begin at most `stride` pixels apart, so that neighbours share at
    least tile - stride. 512 / 448 is seen as seams on flat areas of 4096 px images, 1024 / 896 is not (diffusers,
    pull request 10510)."""

    tile: int = 1024
    stride: int = 896

    def __post_init__(self):
        if self.tile <= 0:
            raise ValueError(f"tile: expected a positive number of pixels, got {self.tile}")
        if not 0 < self.stride <= self.tile:
            raise ValueError(f"stride: expected 1 to tile ({self.tile}) pixels, got {self.stride}")

    def cells(self, ratio: int) -> tuple[int, int]:
        """(tile, overlap) in cells of `ratio` pixels. ValueError where they are not whole."""
        for name, value in (("tile", self.tile), ("stride", self.stride)):
            if value % ratio:
                raise ValueError(f"{name}: expected a multiple of {ratio} pixels, got {value}")
        return self.tile // ratio, (self.tile - self.stride) // ratio


def spans(size: int, tile: int, overlap: int) -> list[tuple[int, int]]:
    """As few spans of 0 to size as do with a length of at most `tile` and at least `overlap` shared by neighbours, all
    of the same length, which is the least possible."""
    if size <= tile:
        return [(0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    length = -(-(size + (count - 1) * overlap) // count)
    starts = [i * (size - length) // (count - 1) for i in range(count)]
    return [(start, start + length) for start in starts]


def ramps(spans: list[tuple[int, int]], device: torch.device | str = "cpu") -> list[Tensor]:
    """fp32 weights of the positions of each span: linear where it overlaps with a neighbour. They sum to 1 over the
    spans at every position."""
    weights = []
    for i, (start, end) in enumerate(spans):
        at = torch.arange(start, end, device=device) + 0.5
        weight = torch.ones_like(at)
        if i > 0 and (shared := spans[i - 1][1] - start):
            weight = torch.minimum(weight, (at - start) / shared)
        if i + 1 < len(spans) and (shared := end - spans[i + 1][0]):
            weight = torch.minimum(weight, (end - at) / shared)
        weights.append(weight)
    total = torch.zeros(spans[-1][1], device=device)
    for (start, end), weight in zip(spans, weights):
        total[start:end] += weight
    return [weight / total[start:end] for (start, end), weight in zip(spans, weights)]


def tiled(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, scales: tuple[int, int]) -> Tensor:
    """function(x) [B, C', H', W'] of x [B, C, H, W], from tiles of at most `tile` x `tile` cells, of which neighbours
    share at least `overlap`. A cell is scales[0] x scales[0] of x and scales[1] x scales[1] of the output.

    One call of `function` sees at most as many cells as a tile has: images are taken together while they fit. What one
    call of it covers is its output to the bit.
    """
    per_cell, out_per_cell = scales
    grid = [spans(size // per_cell, tile, overlap) for size in x.shape[2:]]
    area = (grid[0][0][1] - grid[0][0][0]) * (grid[1][0][1] - grid[1][0][0])
    together = max(1, tile * tile // area)
    parts = [_blended(function, part, grid, per_cell, out_per_cell) for part in x.split(together)]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _blended(function, x: Tensor, grid: list[list[tuple[int, int]]], per_cell: int, out_per_cell: int) -> Tensor:
    if all(len(spans) == 1 for spans in grid):
        return function(x)
    to_rows, to_columns = ([(a * out_per_cell, b * out_per_cell) for a, b in spans] for spans in grid)
    weights = [ramps(spans, x.device) for spans in (to_rows, to_columns)]
    total = None
    for (top, bottom), rows, of_row in zip(grid[0], to_rows, weights[0]):
        for (left, right), columns, of_column in zip(grid[1], to_columns, weights[1]):
            corner = x[:, :, top * per_cell : bottom * per_cell, left * per_cell : right * per_cell]
            out = function(corner.contiguous(memory_format=torch.channels_last))
            if total is None:
                size = (*out.shape[:2], to_rows[-1][1], to_columns[-1][1])
                total = out.new_zeros(size, dtype=torch.float32).contiguous(memory_format=torch.channels_last)
            # fp32, so that what two tiles share is rounded once.
            total[:, :, slice(*rows), slice(*columns)] += out * (of_row[:, None] * of_column)
    return total.to(out.dtype)
