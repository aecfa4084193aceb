"""How a diffusion language model attends its canvas: keys and values of a sequence lie in one page, rotated, at their
places in the text; rows replace theirs before they attend."""

from __future__ import annotations

import torch

from eightfold.models.attention import Paged, PagedCache
from eightfold.ops import block_attention, paged_attention, rope_cache_write

BLOCK_ROWS = 64  # the most rows that block_attention takes
_CODES = torch.float8_e4m3fn


class CanvasCache(PagedCache):
    """A page for each of `batch` sequences of up to `max_tokens` tokens, bf16 or fp32, or E4M3 codes with a scale for
    each key and value: float32 [layers, batch, kv_heads, max_tokens]."""

    def __init__(self, config, batch: int, max_tokens: int, dtype: torch.dtype, device: torch.device | str = "cpu"):
        super().__init__(config, batch, max_tokens, dtype, device)
        coded = dtype == _CODES
        self.key_scales, self.value_scales = (
            torch.ones(self.keys.shape[:-1], dtype=torch.float32, device=device) if coded else None for _ in range(2)
        )
        self.pages_of = torch.arange(batch, dtype=torch.int32, device=device)[:, None]

    def scales(self, layer: int) -> dict[str, torch.Tensor]:
        """What ops take as scales."""
        if self.key_scales is None:
            return {}
        return {"k_scales": self.key_scales[layer], "v_scales": self.value_scales[layer]}

    def copy_page(self, source: int, target: int) -> None:
        super().copy_page(source, target)
        if self.key_scales is not None:
            self.key_scales[:, target] = self.key_scales[:, source]
            self.value_scales[:, target] = self.value_scales[:, source]


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

    def of_projections(self, layer: int, q, k, v, tables, norms=(None, None)) -> torch.Tensor:
        keys, values, scales = self.cache.keys[layer], self.cache.values[layer], self.cache.scales(layer)
        cos, sin = (table[0, :, 0] for table in tables)
        weights = {}
        if norms[0] is not None:
            weights = {"q_weight": norms[0].weight, "k_weight": norms[1].weight, "eps": norms[0].eps}
        q = rope_cache_write(q[0], k[0], v[0], cos, sin, keys, values, self.slots, **weights, **scales)
        return self._attend(q, keys, values, scales).flatten(1)[None]

    def _attend(self, q, keys, values, scales) -> torch.Tensor:
        mask = {"causal": self.block > 0, "block": max(1, self.block)}
        of = self.pages, self.starts, self.lengths
        return paged_attention(q, keys, values, *of, longest=self.longest, **mask, **scales)


class BlockRows(CanvasRows):
    """As many rows of each sequence, at most BLOCK_ROWS, from its place at[s] (int32 [sequences]) on, attend its first
    lengths[s] keys."""

    def __init__(self, cache: CanvasCache, at, lengths, slots):
        super().__init__(cache, None, lengths, slots, slots.shape[0] // lengths.shape[0])
        self.at = at

    def _attend(self, q, keys, values, scales) -> torch.Tensor:
        batch = self.lengths.shape[0]
        rows = q.unflatten(0, (batch, self.longest))
        out = block_attention(
            rows, None, None, keys[:batch], values[:batch], self.at, self.lengths, **_of(batch, scales)
        )
        return out.flatten(0, 1)


def _of(batch: int, scales: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: scale[:batch] for name, scale in scales.items()}
