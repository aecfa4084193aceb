"""How a diffusion language model attends its canvas: keys and values of a sequence lie in one page, rotated, at their
places in the text; rows replace theirs before they attend."""

from __future__ import annotations

import torch

from eightfold.models.attention import Paged, PagedCache
from eightfold.ops import block_attention

BLOCK_ROWS = 64  # the most rows that block_attention takes


class CanvasCache(PagedCache):
    """A page for each of `batch` sequences of up to `max_tokens` tokens."""

    def __init__(self, config, batch: int, max_tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        super().__init__(config, batch, max_tokens, dtype, device)
        self.pages_of = torch.arange(batch, dtype=torch.int32, device=device)[:, None]


class CanvasRows(Paged):
    """Rows of the first sequences of a CanvasCache, starts[s] to starts[s + 1] those of sequence s, attend its first
    lengths[s] keys: all of them, or with `block` those of its own block of so many tokens and of the blocks before, the
    rows being the last of the keys.

    starts int32 [sequences + 1], lengths int32 [sequences]; slots int64 [tokens], sequence * max_tokens + place of each
    row; longest: no sequence has more rows.
    """

    def __init__(self, cache: CanvasCache, starts, lengths, slots, longest: int, block: int = 0):
        super().__init__(cache, cache.pages_of[: lengths.shape[0]], starts, lengths, slots, longest)
        self.block = block

    def _mask(self) -> dict[str, bool | int]:
        return {"causal": self.block > 0, "block": max(1, self.block)}


class BlockRows(CanvasRows):
    """As many rows of each sequence, at most BLOCK_ROWS, from its place at[s] (int32 [sequences]) on, attend its first
    lengths[s] keys."""

    gives_codes = False

    def __init__(self, cache: CanvasCache, at, lengths, slots):
        super().__init__(cache, None, lengths, slots, slots.shape[0] // lengths.shape[0])
        self.at = at

    def _attend(self, q: torch.Tensor, pages: dict[str, torch.Tensor]) -> torch.Tensor:
        batch = self.lengths.shape[0]
        part = {name: pages[name][:batch] for name in pages}
        k, v, rows = part.pop("k_pages"), part.pop("v_pages"), q.unflatten(0, (batch, self.longest))
        return block_attention(rows, None, None, k, v, self.at, self.lengths, **part).view(1, q.shape[0], -1)
