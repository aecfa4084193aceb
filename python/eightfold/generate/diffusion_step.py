"""The passes of decoding by a diffusion language model, on the device from end to end.

All that a pass needs and changes lies on the device: tokens, where the window (the tokens among which is uncovered)
begins, how many masks it has left, who has ended. The host asks for a pass without knowing what the one before has
uncovered; a pass over a window without masks changes no token and counts for nobody. Nothing is padded: each sequence
has its own length, and its tokens' places are their positions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from eightfold.generate.diffusion_options import Plan
from eightfold.generate.replay import Replay
from eightfold.models._canvas_ops import lm_head_confidence, uncover_
from eightfold.models.canvas import BLOCK_ROWS, BlockRows, CanvasCache, CanvasRows
from eightfold.models.decoder import Decoder
from eightfold.models.precision import KeptWeights
from eightfold.ops import QuantizedTensor, quantize

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


class DiffusionStep:
    """One decoder, one cache for at most `capacity` sequences of up to `max_tokens` tokens. Weights stay at their
    addresses."""

    def __init__(self, model: Decoder, plan: Plan, kept: KeptWeights, capacity: int, max_tokens: int, graphs: bool):
        self.plan, self.capacity, self.max_tokens = plan, capacity, -(-max_tokens // _PAGE) * _PAGE
        self._model, self._kept, self._replay = model, kept, Replay(graphs)
        on = {"device": model.device}
        dtype = torch.float8_e4m3fn if plan.options.fp8_cache else model.compute.dtype
        self._cache = CanvasCache(model.config, capacity, self.max_tokens, dtype, model.device)

        def numbers(dtype, *shape):
            return torch.zeros(*shape, dtype=dtype, **on)

        self._tokens = numbers(torch.int64, capacity, self.max_tokens)
        self._prompts, self._first, self._at, self._lengths, self._masks, self._forwards, self._owed = (
            numbers(torch.int32, capacity) for _ in range(7)
        )
        self._status = numbers(torch.int32, 2, capacity)
        self._left, self._ended = self._status
        self._seeds, self._turn = numbers(torch.int64, capacity), numbers(torch.int32, 1)
        self._before = numbers(model.compute.dtype, capacity, model.config.hidden_size)
        self._slots = numbers(torch.int64, capacity * self.max_tokens)
        self._starts = numbers(torch.int32, capacity + 1)
        self._temperatures = torch.full((capacity * plan.window,), plan.options.temperature, **on)
        self._stops = torch.tensor(plan.stop_ids, dtype=torch.int64, **on)
        self._forbidden = torch.tensor(plan.forbidden, dtype=torch.int64, **on)
        self._index = torch.arange(max(capacity + 1, self.max_tokens), **on)
        self._pinned = model.device.type == "cuda"
        # Two of each: the host reads one while the device writes the other.
        self._read = [
            (self._host(torch.int32, 2, capacity), self._host(torch.int64, capacity, self.max_tokens)) for _ in range(2)
        ]
        self._rows: list[CanvasRow] = []
        self._offset = self._inside = self._seen = self.passes = 0

    def _host(self, dtype: torch.dtype, *shape: int) -> torch.Tensor:
        return torch.zeros(*shape, dtype=dtype, pin_memory=self._pinned)

    # ---- which sequences ----

    def load(self, rows: Sequence[CanvasRow]) -> None:
        """The sequences from now on, their canvases all masks."""
        tokens = torch.full((len(rows), self.max_tokens), self.plan.mask_id)
        for kept, row in zip(tokens, rows, strict=True):
            kept[: len(row.prompt)] = torch.tensor(row.prompt)
        n = len(rows)
        self._tokens[:n] = tokens.to(self._model.device)
        for column, values in (
            (self._prompts, [len(row.prompt) for row in rows]),
            (self._first, [row.first for row in rows]),
            (self._lengths, [row.end for row in rows]),
            (self._seeds, [row.seed for row in rows]),
        ):
            column[:n] = torch.tensor(values, dtype=column.dtype).to(column.device)
        for column in (self._ended, self._left, self._forwards, self._owed, self._before):
            column.zero_()
        self.passes = 0
        self._set_rows(list(rows))

    def keep(self, indices: Sequence[int]) -> None:
        """Goes on with these of the sequences, in rising order."""
        index, n = torch.tensor(indices, device=self._model.device), len(indices)
        sizes = self._prompts, self._first, self._at, self._lengths
        for column in (*sizes, self._tokens, self._seeds, self._forwards, self._ended, self._before):
            column[:n] = column[index]
        if self.plan.causal:
            for target, source in enumerate(indices):
                if source != target:
                    self._cache.copy_page(source, target)
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

    # ---- what is asked for ----

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

    def refresh(self) -> None:
        """Uncovers tokens of the window after a pass over the whole canvas, or over the block of a block-causal
        model; all keys that the pass computes are kept."""
        if self.plan.causal:
            inside = self._inside
            self._ask(("block", inside), lambda n: self._pass_rows(n, self.plan.block, inside, True))
        else:
            rows, longest = sum(self._whole), max(self._whole)
            self._ask(("whole", rows, longest), lambda n: self._pass_whole(n, rows, longest))

    def step(self) -> None:
        """Uncovers tokens of the window, with keys of the last refresh as far as the options' cache goes."""
        cache = self.plan.options.cache
        if cache == "none" or (cache == "prefix" and self.plan.causal):
            self.refresh()
        elif cache == "prefix":
            rows = self.plan.options.canvas - self._offset
            self._ask(("rows", rows), lambda n: self._pass_rows(n, rows, 0, False))
        else:
            self._ask(("window",), lambda n: self._pass_rows(n, self.plan.window, 0, False))

    def prefill(self) -> None:
        """Keys and values of the prompts' full blocks, of a block-causal model."""
        rows, longest, n = sum(self._whole), max(self._whole), len(self._rows)
        if rows:
            self.passes += 1
            lengths = self._first[:n]
            hidden = self._hidden_whole(n, rows, longest, lengths, self.plan.block)
            self._before[:n] = hidden[(self._starts[1 : n + 1].long() - 1).clamp(min=0)]

    def commit(self) -> None:
        """Keys and values of the block as it is now, of a block-causal model: for those who come after it."""
        inside = self._inside
        self._ask(("commit", inside), lambda n: self._pass_commit(n, inside))

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

    def _ask(self, kind: tuple, work: Callable[[int], None]) -> None:
        n = len(self._rows)
        self.passes += 1
        self._replay((n, *kind), lambda: work(n))

    # ---- passes: these run while a graph is captured ----

    def _pass_whole(self, n: int, rows: int, longest: int) -> None:
        hidden = self._hidden_whole(n, rows, longest, self._lengths[:n], 0)
        begin = (self._starts[:n] + self._at[:n]).long()
        if self.plan.shifted:
            self._before[:n] = hidden[begin - 1]
        if self.plan.force_first:
            self._uncover_first(n)
        else:
            self._uncover(n, hidden[(begin - int(self.plan.shifted))[:, None] + self._index[: self.plan.window]])
        if self.plan.least_steps:
            self._owed[:n] = 1 - self._ended[:n]

    def _pass_rows(self, n: int, rows: int, inside: int, keep: bool) -> None:
        """A pass over `rows` tokens of each sequence, among which the window begins after `inside`."""
        hidden = self._hidden_rows(n, rows, inside)
        if not self.plan.shifted:
            window = hidden[:, inside : inside + self.plan.window]
        else:
            if keep and inside > 0:
                self._before[:n] = hidden[:, inside - 1]
            window = torch.cat((self._before[:n, None], hidden[:, inside : inside + self.plan.window - 1]), dim=1)
        self._uncover(n, window)

    def _pass_commit(self, n: int, inside: int) -> None:
        hidden = self._hidden_rows(n, self.plan.block, inside)
        self._before[:n] = hidden[:, -1]
        self._forwards[:n] += 1 - self._ended[:n]

    def _hidden_whole(self, n: int, rows: int, longest: int, lengths: torch.Tensor, block: int) -> torch.Tensor:
        """[rows, hidden_size] of whole sequences, one behind the other."""
        attend = CanvasRows(self._cache, self._starts[: n + 1], lengths, self._slots[:rows], longest, block)
        return self._hidden(self._slots[:rows], attend)

    def _hidden_rows(self, n: int, rows: int, inside: int) -> torch.Tensor:
        """[n, rows, hidden_size] of the tokens that begin `inside` before the window."""
        at, lengths = self._at[:n] - inside, self._lengths[:n]
        slots = (self._index[:n, None] * self.max_tokens + at[:, None] + self._index[:rows]).flatten()
        if rows <= BLOCK_ROWS:
            attend = BlockRows(self._cache, at, lengths, slots)
        else:
            starts = (self._index[: n + 1] * rows).int()
            attend = CanvasRows(self._cache, starts, lengths, slots, rows)
        return self._hidden(slots, attend).unflatten(0, (n, rows))

    def _hidden(self, slots: torch.Tensor, attend: CanvasRows) -> torch.Tensor:
        return self._model.rows_hidden(self._tokens.flatten()[slots], slots % self.max_tokens, attend)

    def _of_window(self, n: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Places and tokens of the window, int64 [n, window]."""
        places = self._at[:n, None] + self._index[: self.plan.window]
        return places, self._tokens[:n].gather(1, places)

    def _predict(self, hidden: torch.Tensor, active: torch.Tensor, places: torch.Tensor) -> tuple:
        """Ids and confidence [n, rows] of hidden rows [n, rows, hidden_size] that predict the tokens at `places`."""
        n, rows = active.shape
        noise = {}
        if self.plan.options.temperature > 0:
            seeds = self._seeds[:n, None].expand(n, rows).flatten()
            noise = {
                "temperatures": self._temperatures[: n * rows],
                "seeds": seeds,
                "positions": places.flatten(),
            }
        hidden, weight = self._operands(hidden.flatten(0, 1))
        forbidden = self._forbidden if self.plan.forbidden else None
        ids, confidence = lm_head_confidence(hidden, weight, active=active.flatten(), forbidden=forbidden, **noise)
        # A row without a token (it is not active, or its logits are not finite) stays a mask.
        ids = torch.where(confidence >= 0, ids, self.plan.mask_id)
        return ids.view(n, rows), confidence.view(n, rows)

    def _operands(self, hidden: torch.Tensor) -> tuple:
        head = self._model.lm_head
        if not self.plan.options.fp8_head:
            return hidden, self._kept.rounded(head)
        codes, scales = self._kept.codes[head].codes(head.weight)
        return quantize(hidden.contiguous(), (1, 128)), QuantizedTensor(codes, scales, (128, 128))

    def _uncover(self, n: int, hidden: torch.Tensor) -> None:
        """hidden [n, window, hidden_size]: what the window's tokens are predicted from."""
        options, mask_id = self.plan.options, self.plan.mask_id
        places, block = self._of_window(n)
        running = self._ended[:n] == 0
        ids, confidence = self._predict(hidden, (block == mask_id) & running[:, None], places)
        self._count(n, running)
        if options.steps is not None:
            masks = self._masks[:n]
            rule = {"counts": masks // options.steps + (self._turn < masks % options.steps).int()}
            self._turn += 1
        elif options.factor is not None:
            rule = {"factor": options.factor, "compat": options.compat}
        else:
            rule = {"threshold": options.threshold}
        ends = options.early_stop and self.plan.stop_ids
        if ends and not self.plan.causal:
            rule |= {"eos_ids": self._stops, "ended": self._ended[:n]}
        uncover_(self._tokens[:n], self._at[:n], ids, confidence, self._left[:n], mask_id=mask_id, **rule)
        if ends and self.plan.causal:
            self._end(n)

    def _end(self, n: int) -> None:
        """Ends sequences at stop ids that are not their prompts', parts of which a block-causal model's first block may
        hold."""
        places, block = self._of_window(n)
        known = (block == self.plan.mask_id).int().cumsum(dim=1) == 0
        stops = (block[..., None] == self._stops).any(dim=2) & known & (places >= self._prompts[:n, None])
        self._ended[:n] |= stops.any(dim=1).int()

    def _uncover_first(self, n: int) -> None:
        """The window's first token, from the row before it."""
        at = self._at[:n, None].long()
        running = self._ended[:n] == 0
        active = (self._tokens[:n].gather(1, at) == self.plan.mask_id) & running[:, None]
        ids, _ = self._predict(self._before[:n, None], active, at)
        self._count(n, running)
        self._tokens[:n].scatter_(1, at, torch.where(active, ids, self._tokens[:n].gather(1, at)))
        self._left[:n] -= (active & (ids != self.plan.mask_id))[:, 0].int()

    def _count(self, n: int, running: torch.Tensor) -> None:
        """A pass for everybody who has masks to uncover."""
        self._forwards[:n] += ((self._left[:n] + self._owed[:n] > 0) & running).int()
        self._owed[:n] = 0
