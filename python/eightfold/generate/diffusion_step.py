"""The passes of decoding by a diffusion language model, on the device from end to end.

All that a pass needs and changes lies on the device. The host asks for a pass without knowing what the one before has
uncovered; a pass over a window without masks changes no token and counts for nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from eightfold.generate.diffusion_options import Plan
from eightfold.generate.diffusion_state import CanvasRow, CanvasState
from eightfold.generate.replay import Replay
from eightfold.models.canvas import BLOCK_ROWS, BlockRows, CanvasCache, CanvasRows
from eightfold.models.decoder import Decoder
from eightfold.models.precision import KeptWeights
from eightfold.ops import QuantizedTensor, lm_head_confidence, quantize, uncover_


class DiffusionStep(CanvasState):
    """One decoder and one cache: what is asked for is done to all sequences. Weights stay at their addresses."""

    def __init__(self, model: Decoder, plan: Plan, kept: KeptWeights, capacity: int, max_tokens: int, graphs: bool):
        super().__init__(plan, capacity, max_tokens, model.device)
        self._model, self._kept, self._replay = model, kept, Replay(graphs, model.device)
        on = {"device": model.device}
        dtype = torch.float8_e4m3fn if plan.options.fp8_cache else model.compute.cache_dtype
        self._cache = CanvasCache(model.config, capacity, self.max_tokens, dtype, model.device)
        # The hidden row before the window, for models whose rows predict the token after theirs.
        self._before = torch.zeros(capacity, model.config.hidden_size, dtype=model.compute.dtype, **on)
        self._temperatures = torch.full((capacity * plan.window,), plan.options.temperature, **on)
        self._stops = torch.tensor(plan.stop_ids, dtype=torch.int64, **on)
        self._forbidden = torch.tensor(plan.forbidden, dtype=torch.int64, **on)
        self.passes = 0

    def load(self, rows: Sequence[CanvasRow]) -> None:
        super().load(rows)
        self._before.zero_()
        self.passes = 0

    def keep(self, indices: Sequence[int]) -> None:
        super().keep(indices)
        for target, source in enumerate(indices):
            if source != target:  # rising: nothing is written over that is still to be moved
                self._before[target] = self._before[source]
                if self.plan.keeps_keys:
                    self._cache.copy_page(source, target)

    def refresh(self) -> None:
        """Uncovers tokens of the window after a pass over the whole canvas, or over the block of a block-causal
        model; all keys that the pass computes are kept."""
        if self.plan.causal:
            inside = self._inside
            self._ask(("block", inside), lambda n: self._pass_rows(n, self.plan.block, inside, True))
        else:
            rows, longest = sum(self._whole), max(self._whole)
            self._ask(("whole", rows, longest), lambda n: self._pass_whole(n, rows, longest))

    def advance(self) -> None:
        """Uncovers tokens of the window after a pass over it and as many tokens before it; keys of all others stay what
        they are."""
        window = self.plan.window
        self._ask(("advance",), lambda n: self._pass_rows(n, 2 * window, window, True))

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
            window = self._before[:n, None].expand(-1, self.plan.window, -1)
            self._uncover(n, window.contiguous(), first_only=True)
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

    def _predict(self, hidden: torch.Tensor, active: torch.Tensor, places: torch.Tensor) -> tuple:
        """Ids and confidence [n, rows] of hidden rows [n, rows, hidden_size] that predict the tokens at `places`."""
        n, rows = active.shape
        noise = {}
        if self.plan.options.temperature > 0:
            seeds = self._seeds[:n, None].expand(n, rows).contiguous().flatten()
            noise = {
                "temperatures": self._temperatures[: n * rows],
                "seeds": seeds,
                "positions": places.flatten(),
            }
        hidden, weight = self._operands(hidden.flatten(0, 1))
        forbidden = self._forbidden if self.plan.forbidden else None
        ids, confidence = lm_head_confidence(hidden, weight, active=active.flatten(), forbidden=forbidden, **noise)
        return ids.view(n, rows), confidence.view(n, rows)

    def _operands(self, hidden: torch.Tensor) -> tuple:
        head = self._model.lm_head
        if not (self.plan.options.fp8_head or self._model.compute.fp8_head):
            return hidden, self._kept.rounded(head)
        codes, scales = self._kept.codes[head].codes(head.weight)
        return quantize(hidden.contiguous(), (1, 128)), QuantizedTensor(codes, scales, (128, 128))

    def _uncover(self, n: int, hidden: torch.Tensor, first_only: bool = False) -> None:
        """hidden [n, window, hidden_size]: what the window's tokens, or its first alone, are predicted from."""
        options, mask_id = self.plan.options, self.plan.mask_id
        places, block = self._of_window(n)
        running = self._ended[:n] == 0
        active = (block == mask_id) & running[:, None]
        if first_only:
            active &= self._index[: self.plan.window] == 0
        ids, confidence = self._predict(hidden, active, places)
        self._count(n, running)
        if options.steps is not None:
            masks = self._masks[:n]
            rule = {"counts": masks // options.steps + (self._turn < masks % options.steps).int()}
            self._turn += 1
        elif options.factor is not None:
            rule = {"factor": options.factor, "last_too": options.compat}
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

    def _count(self, n: int, running: torch.Tensor) -> None:
        """A pass for everybody who has masks to uncover."""
        self._forwards[:n] += ((self._left[:n] + self._owed[:n] > 0) & running).int()
        self._owed[:n] = 0
