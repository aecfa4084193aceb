"""The step of a rollout that is taken most: one token of each running sequence, on the device from end to end.

A step makes the inputs of the next: the host may ask for a step before it has read what the last one drew. On CUDA it
is one graph, captured for a few numbers of rows (what a batch lacks is blank), and replayed with the sequences of the
moment: their pages, lengths, seeds and options are data.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eightfold.generate.replay import Replay
from eightfold.generate.text import SamplingOptions
from eightfold.models.attention import Paged, PagedCache
from eightfold.models.decoder import Decoder
from eightfold.models.head import Codes, row_log_probs, row_logits
from eightfold.ops import paged_next_rows_, sample

_BUCKETS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
_BEYOND = 256  # from the last of them on, multiples of this


@dataclass
class DecodeRow:
    """A sequence whose last token waits for its successor: that token and its place in the text."""

    token: int
    position: int
    pages: list[int]
    seed: int
    options: SamplingOptions


def draw(
    logits: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    temperatures: torch.Tensor,
    top_k: torch.Tensor,
    top_p: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of rows of logits, each for its place `positions` in its text, and their log-probabilities. A row without
    a token (its logits are not finite) gives -1 and NaN."""
    tokens = sample(logits, seeds, positions, temperatures, top_k, top_p)
    return tokens, row_log_probs(logits, tokens, temperatures)


class Drawn:
    """What a step drew: `read()` waits for it."""

    def __init__(self, values: torch.Tensor, count: int, done: torch.cuda.Event | None):
        self._values, self._count, self._done = values, count, done

    def read(self) -> tuple[list[int], list[float]]:
        if self._done is not None:
            self._done.synchronize()
        return tuple(column[: self._count].tolist() for column in _columns(self._values))


def _columns(drawn: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, int64, and log-probabilities, fp32, of all rows in one tensor, int64 [2, rows], so that one copy brings
    both."""
    return drawn[0], drawn[1].view(torch.float32)[: drawn.shape[1]]


class DecodeStep:
    """One decoder, one cache, at most `capacity` rows. Between calls of `prepare` weights stay at their addresses."""

    def __init__(self, model: Decoder, cache: PagedCache, capacity: int, graphs: bool):
        self._model, self._cache, self._graphs = model, cache, graphs
        self._capacity = bucket(capacity) if graphs else capacity
        on = {"device": model.device}
        self._pinned = model.device.type == "cuda"

        def numbers(dtype):
            return torch.zeros(self._capacity, dtype=dtype, **on)

        self._drawn = torch.zeros(2, self._capacity, dtype=torch.int64, **on)
        self._tokens, self._log_probs = _columns(self._drawn)
        self._positions, self._seeds = (numbers(torch.int64) for _ in range(2))
        self._temperatures, self._top_p = (numbers(torch.float32) for _ in range(2))
        self._top_k, self._active = (numbers(torch.int32) for _ in range(2))
        self._starts = torch.arange(self._capacity + 1, dtype=torch.int32, **on)
        self._head: torch.Tensor | Codes | None = None
        self._weights: list[int] = []
        self._count, self._launches, self._changed = 0, 0, False
        self._replay = Replay(graphs, model.device)
        # Two of each: the host writes and reads one while the device uses the other.
        self._read = [self._host(torch.int64, 2, self._capacity) for _ in range(2)]
        self._resize(1)

    def _host(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, pin_memory=self._pinned)

    def _resize(self, width: int) -> None:
        self._width = width
        self._table = torch.zeros(self._capacity, width, dtype=torch.int32)
        self._sent = [self._host(torch.int32, self._capacity, width) for _ in range(2)]
        self._pages = torch.zeros(self._capacity, width, dtype=torch.int32, device=self._model.device)
        self._replay.forget()

    def prepare(self, head: torch.Tensor | Codes, most_pages: int) -> None:
        """Before sequences of up to `most_pages` pages: `head` [vocabulary, hidden_size] is the head's weight, or its
        codes."""
        read = (*(head if isinstance(head, tuple) else (head,)), *self._model.parameters())
        weights = [weight.data_ptr() for weight in read]
        if weights != self._weights:  # graphs read them where they were
            self._replay.forget()
        self._head, self._weights = head, weights
        if most_pages > self._width:
            self._resize(1 << (most_pages - 1).bit_length())

    def load(self, rows: Sequence[DecodeRow]) -> None:
        """The batch from now on; no step may be under way."""
        self._count = len(rows)
        columns = (
            (self._tokens, [row.token for row in rows]),
            (self._positions, [row.position for row in rows]),
            (self._seeds, [row.seed for row in rows]),
            (self._temperatures, [row.options.temperature for row in rows]),
            (self._top_k, [row.options.top_k for row in rows]),
            (self._top_p, [row.options.top_p for row in rows]),
            (self._active, [1] * len(rows)),
        )
        for column, values in columns:
            values = values + [1 if column is self._top_p else 0] * (self._capacity - len(values))
            column.copy_(torch.tensor(values, dtype=column.dtype))
        self._table[len(rows) :, 0] = -1
        width = max((len(row.pages) for row in rows), default=0)
        pages = [row.pages + [0] * (width - len(row.pages)) for row in rows]
        self._table[: len(rows), :width] = torch.tensor(pages, dtype=torch.int32).view(len(rows), width)
        self._changed = True

    def set_pages(self, index: int, pages: list[int]) -> None:
        self._table[index, : len(pages)] = torch.tensor(pages, dtype=torch.int32)
        self._changed = True

    def launch(self) -> Drawn:
        """Draws one token more of every row."""
        turn = self._launches % 2
        self._launches += 1
        rows = bucket(self._count) if self._graphs else self._count
        if self._changed:
            self._sent[turn][:rows] = self._table[:rows]
            self._pages[:rows].copy_(self._sent[turn][:rows], non_blocking=True)
            self._changed = False
        self._replay(rows, lambda: self._advance(rows))
        drawn = self._read[turn]
        drawn.copy_(self._drawn, non_blocking=True)
        done = None
        if self._pinned:
            done = torch.cuda.Event()
            done.record(torch.cuda.current_stream(self._model.device))
        return Drawn(drawn, self._count, done)

    def _advance(self, rows: int) -> None:
        """A step of the first `rows` rows. A blank one has no keys, and with page -1 a slot below 0: it writes none."""
        part, pages = slice(rows), self._pages[:rows]
        positions = self._positions[part]
        ids, at, slots, lengths = paged_next_rows_(
            positions, self._tokens[part], self._active[part], pages, self._cache.page_size
        )
        # Settled: behind the last of these lie torch's own kernels, as of the embedding, before the first layer.
        attend = Paged(self._cache, pages, self._starts[: rows + 1], lengths, slots, 1, settled=True)
        hidden = self._model.rows_hidden(ids, at, attend)
        options = self._temperatures[part], self._top_k[part], self._top_p[part]
        tokens, log_probs = draw(row_logits(hidden, self._head), self._seeds[part], positions, *options)
        self._tokens[part] = tokens
        self._log_probs[part] = log_probs


def bucket(rows: int) -> int:
    """The number of rows for which a step of `rows` is captured."""
    if rows > _BUCKETS[-1]:
        return -(-rows // _BEYOND) * _BEYOND
    return _BUCKETS[bisect_left(_BUCKETS, rows)]
