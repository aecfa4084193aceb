"""Where a batch of sequences stands that a diffusion language model decodes: on the device, at addresses that stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from eightfold.generate.diffusion_options import Plan

_PAGE = 128  # what page sizes on CUDA are multiples of


@dataclass(frozen=True)
class CanvasRow:
    """A sequence to decode: its prompt, where its first block begins and its last one ends, its seed."""

    prompt: list[int]
    first: int
    end: int
    seed: int


class Seen:
    """What a pass left: `read()` waits for it and gives, of each sequence, the masks left in the window and whether it
    has ended, and where they were asked for the tokens of all sequences."""

    def __init__(self, status: torch.Tensor, tokens: torch.Tensor | None, done: torch.cuda.Event | None):
        self._status, self._tokens, self._done = status, tokens, done

    def read(self) -> tuple[list[int], list[bool], list[list[int]] | None]:
        if self._done is not None:
            self._done.synchronize()
        left, ended = self._status.tolist()
        return left, [e != 0 for e in ended], None if self._tokens is None else self._tokens.tolist()


class CanvasState:
    """At most `capacity` sequences of up to `max_tokens` tokens, each with its own length, and the window: the tokens
    of each among which is uncovered. Nothing is padded: a token's place is its position."""

    def __init__(self, plan: Plan, capacity: int, max_tokens: int, device: torch.device):
        self.plan, self.capacity, self.max_tokens = plan, capacity, -(-max_tokens // _PAGE) * _PAGE

        def numbers(dtype, *shape):
            return torch.zeros(*shape, dtype=dtype, device=device)

        self._tokens = numbers(torch.int64, capacity, self.max_tokens)
        # Of each sequence: tokens of the prompt; where the first block begins, and the window; keys that are attended;
        # masks that the window had; passes that counted, and whether the next one does whatever it finds.
        self._prompts, self._first, self._at, self._lengths, self._masks, self._forwards, self._owed = (
            numbers(torch.int32, capacity) for _ in range(7)
        )
        self._status = numbers(torch.int32, 2, capacity)
        self._left, self._ended = self._status  # masks that the window has; whether a stop id was found
        self._seeds, self._turn = numbers(torch.int64, capacity), numbers(torch.int32, 1)
        # Of a pass over whole sequences, one behind the other: place of each row among the tokens, and the first rows.
        self._slots, self._starts = numbers(torch.int64, capacity * self.max_tokens), numbers(torch.int32, capacity + 1)
        self._index = torch.arange(max(capacity + 1, self.max_tokens), device=device)
        self._pinned = device.type == "cuda"
        # Two of each: the host reads one while the device writes the other.
        self._read = [
            (self._host(torch.int32, 2, capacity), self._host(torch.int64, capacity, self.max_tokens)) for _ in range(2)
        ]
        self._rows: list[CanvasRow] = []
        self._whole: list[int] = []  # tokens of each sequence in a pass over whole ones
        self._offset = self._inside = self._seen = 0

    def _host(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, pin_memory=self._pinned)

    def load(self, rows: Sequence[CanvasRow]) -> None:
        """The sequences from now on, their canvases all masks."""
        tokens = torch.full((len(rows), self.max_tokens), self.plan.mask_id)
        for kept, row in zip(tokens, rows, strict=True):
            kept[: len(row.prompt)] = torch.tensor(row.prompt)
        n = len(rows)
        self._tokens[:n] = tokens.to(self._tokens.device)
        for column, values in (
            (self._prompts, [len(row.prompt) for row in rows]),
            (self._first, [row.first for row in rows]),
            (self._lengths, [row.end for row in rows]),
            (self._seeds, [row.seed for row in rows]),
        ):
            column[:n] = torch.tensor(values, dtype=column.dtype).to(column.device)
        for column in (self._ended, self._left, self._forwards, self._owed):
            column.zero_()
        self._set_rows(list(rows))

    def keep(self, indices: Sequence[int]) -> None:
        """Goes on with these of the sequences, in rising order."""
        index, n = torch.tensor(indices, device=self._tokens.device), len(indices)
        sizes = self._prompts, self._first, self._at, self._lengths
        for column in (*sizes, self._tokens, self._seeds, self._forwards, self._ended):
            column[:n] = column[index]
        self._set_rows([self._rows[i] for i in indices])

    def result(self, index: int) -> tuple[list[int], int]:
        """The tokens, prompt included, and the passes of a sequence."""
        return self._tokens[index, : self._rows[index].end].tolist(), int(self._forwards[index])

    def _set_rows(self, rows: list[CanvasRow]) -> None:
        self._rows = rows
        # What passes over whole sequences compute: prompt and canvas, or a block-causal prompt's full blocks.
        self._whole = [row.first if self.plan.causal else row.end for row in rows]
        starts = [0]
        for length in self._whole:
            starts.append(starts[-1] + length)
        slots = [self._index[:length] + s * self.max_tokens for s, length in enumerate(self._whole)]
        if slots:
            self._slots[: starts[-1]] = torch.cat(slots)
        self._starts[: len(starts)] = torch.tensor(starts, dtype=torch.int32).to(self._starts.device)

    def enter(self, offset: int, block: int = 0) -> None:
        """The window that begins `offset` tokens behind the beginning of the first block is decoded from now on; of a
        block-causal model in the block that begins `block` tokens behind it."""
        n = len(self._rows)
        self._offset, self._inside = offset, offset - block
        torch.add(self._first[:n], offset, out=self._at[:n])
        if self.plan.causal:
            torch.add(self._first[:n], block + self.plan.block, out=self._lengths[:n])
        masks = (self._of_window(n)[1] == self.plan.mask_id).sum(dim=1) * (self._ended[:n] == 0)
        for column in (self._left, self._masks):
            column[:n] = masks
        self._turn.zero_()

    def seen(self, tokens: bool) -> Seen:
        """What the last pass left, `tokens` included."""
        n = len(self._rows)
        status, ids = self._read[self._seen % 2]
        self._seen += 1
        status.copy_(self._status, non_blocking=True)
        if tokens:
            ids[:n].copy_(self._tokens[:n], non_blocking=True)
        done = None
        if self._pinned:
            done = torch.cuda.Event()
            done.record()
        return Seen(status[:, :n], ids[:n] if tokens else None, done)

    def _of_window(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places and tokens of the window, int64 [n, window]."""
        places = self._at[:n, None] + self._index[: self.plan.window]
        return places, self._tokens[:n].gather(1, places)
