"""Rollout: many completions at once over a paged cache, each the same whatever runs beside it.

Continuous batching (Orca, OSDI 2022) over pages (PagedAttention, arXiv 2309.06180): a step computes one token of
every running sequence; new prompts come in as pages become free, in pieces of at most `prefill_tokens`. The samples of
a prompt share its pages. Rows of every op used here depend on their own sequence alone, so a completion is a function
of weights, prompt, sampling options and seed: not of the batch, the order or the pages, and a sequence that had to give
its pages back is computed again to the same bits. A token's log-probability has the bits of `Decoder.token_log_probs`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from eightfold.generate.decoding import DecodeRow, DecodeStep, Drawn, draw
from eightfold.generate.pages import PagePool
from eightfold.generate.requests import Completion, Finish, Request, RolloutOptions, sample_seed
from eightfold.generate.text import check_causal
from eightfold.models.attention import Paged, PagedCache
from eightfold.models.decoder import Decoder
from eightfold.models.head import row_logits
from eightfold.models.precision import KeptWeights
from eightfold.ops import kernels_run_on


@dataclass(eq=False)
class _Sequence:
    request: Request
    place: tuple[int, int]  # of the completion in the results
    seed: int
    tokens: list[int]  # prompt and completion
    log_probs: list[float] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    cached: int = 0  # tokens whose keys and values are in the pages
    followers: list[_Sequence] = field(default_factory=list)  # samples that begin when the prompt is computed

    @property
    def drawn(self) -> list[int]:
        return self.tokens[len(self.request.prompt) :]

    @property
    def left(self) -> int:
        """Tokens that may still be drawn."""
        return self.request.max_tokens + len(self.request.prompt) - len(self.tokens)


@dataclass
class _Flight:
    """A step that was asked for and not read yet."""

    sequences: list[_Sequence]
    drawn: Drawn


class Rollout:
    """An engine over one decoder. Weights must not change while `generate` runs; between two calls they may."""

    def __init__(self, model: Decoder, options: RolloutOptions, tokenizer=None):
        """tokenizer: needed for requests with strings to stop at; only its `decode` is used. ValueError for a model
        that is not causal."""
        check_causal(model)
        self.model, self.options, self.tokenizer = model, options, tokenizer
        self.pool = PagePool(options.pages)
        self.kept = KeptWeights(model.compute.dtype)
        self._cache: PagedCache | None = None
        self._steps: DecodeStep | None = None
        self._ahead = model.device.type == "cuda"  # a step is asked for before the one ahead of it is read
        self._flight: _Flight | None = None
        self._waiting: deque[_Sequence] = deque()
        self._running: list[_Sequence] = []

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[Request], on_complete: Callable[[int, int, Completion], None] | None = None
    ) -> list[list[Completion]]:
        """The completions of each request, in order. `on_complete(request, sample, completion)` is called as they end.

        Raises ValueError naming the argument where a request cannot fit or needs a tokenizer.
        """
        results: list[list[Completion | None]] = [[None] * request.samples for request in requests]
        for index, request in enumerate(requests):
            self._check(index, request)
        for index, request in enumerate(requests):
            samples = [
                _Sequence(request, (index, i), sample_seed(request.seed, i), list(request.prompt))
                for i in range(request.samples)
            ]
            samples[0].followers = samples[1:]
            self._waiting.append(samples[0])
        self.kept.refresh()
        try:
            with self.model.compute.constant_weights(self.kept):
                self._head = self.model.compute.head_operand(self.model.lm_head)
                self._open(max((len(request.prompt) + request.max_tokens for request in requests), default=1))
                while self._waiting or self._running:
                    for sequence, finish in self._step():
                        completion = Completion(sequence.drawn, sequence.log_probs, finish)
                        results[sequence.place[0]][sequence.place[1]] = completion
                        if on_complete is not None:
                            on_complete(*sequence.place, completion)
        finally:
            for sequence in self._running:
                self._give_back(sequence)
            self._running, self._waiting, self._flight = [], deque(), None
            if not self.options.keep_cache:
                self._cache = self._steps = None
        return results

    def _open(self, longest: int) -> None:
        """The cache and the steps over it, for sequences of up to `longest` tokens."""
        model, options = self.model, self.options
        if self._cache is None:
            self._cache = PagedCache(
                model.config, options.pages, options.page_size, model.compute.cache_dtype, model.device
            )
            graphs = kernels_run_on(model.device) if options.cuda_graphs is None else options.cuda_graphs
            self._steps = DecodeStep(model, self._cache, options.sequences, graphs)
        self._steps.prepare(self._head, -(-longest // options.page_size))

    def _check(self, index: int, request: Request) -> None:
        limit = self.model.config.max_position_embeddings
        tokens = len(request.prompt) + request.max_tokens
        if tokens > limit:
            raise ValueError(
                f"requests[{index}]: prompt and completion of {len(request.prompt)} + {request.max_tokens} tokens are "
                f"longer than the model's context of {limit}"
            )
        if -(-tokens // self.options.page_size) > self.options.pages:
            raise ValueError(
                f"requests[{index}]: {tokens} tokens need {-(-tokens // self.options.page_size)} pages of "
                f"{self.options.page_size}, the cache has {self.options.pages}"
            )
        if request.stop and self.tokenizer is None:
            raise ValueError(f"requests[{index}]: strings to stop at need a tokenizer, got none")

    # ---- one step: one token of everything that runs, then prompts ----

    def _step(self) -> list[tuple[_Sequence, Finish]]:
        ended = self._decode()
        pieces = self._next_pieces()
        if pieces:
            ended += self._land()  # a sequence that gives up its pages must have no token on its way
            ended += self._draw(self._compute(pieces))
        return ended

    def _decode(self) -> list[tuple[_Sequence, Finish]]:
        """Asks for one token more of every running sequence; takes in those of the step before."""
        flight = self._flight
        if flight is not None and self._goes_on(flight):
            self._launch(flight.sequences)
            return self._take(flight)
        ended = self._land()
        ready = self._with_pages([s for s in self._running if 0 < s.cached == len(s.tokens) - 1])
        if ready:
            rows = [DecodeRow(s.tokens[-1], s.cached, s.pages, s.seed, s.request.options) for s in ready]
            self._steps.load(rows)
            self._launch(ready)
            if not self._ahead:
                ended += self._land()
        return ended

    def _goes_on(self, flight: _Flight) -> bool:
        """Whether the same sequences take another step: none has ended for certain, each has a page."""
        size, grown = self.options.page_size, []
        if any(s.left < 2 or not s.pages for s in flight.sequences):
            return False
        for index, sequence in enumerate(flight.sequences):
            if len(sequence.pages) * size <= sequence.cached:
                grown.append((index, sequence))
        if len(grown) > self.pool.free:
            return False
        for index, sequence in grown:
            sequence.pages.append(self.pool.take())
            self._steps.set_pages(index, sequence.pages)
        return True

    def _launch(self, sequences: list[_Sequence]) -> None:
        self._flight = _Flight(sequences, self._steps.launch())
        for sequence in sequences:
            sequence.cached += 1

    def _land(self) -> list[tuple[_Sequence, Finish]]:
        flight, self._flight = self._flight, None
        return [] if flight is None else self._take(flight)

    def _take(self, flight: _Flight) -> list[tuple[_Sequence, Finish]]:
        """The tokens of a step; those of sequences that ended while it was under way are dropped. Whoever ends leaves a
        batch that is not what the next step needs."""
        tokens, log_probs = flight.drawn.read()
        drawn = [d for d in zip(flight.sequences, tokens, log_probs, strict=True) if d[0].pages]
        return self._append(*zip(*drawn, strict=True)) if drawn else []

    def _next_pieces(self) -> list[tuple[_Sequence, int]]:
        """The tokens of prompts that this step computes."""
        self._admit()
        pieces, budget = [], self.options.prefill_tokens
        for sequence in self._running:
            left = len(sequence.tokens) - sequence.cached
            if left > 1 or sequence.cached == 0:
                pieces.append((sequence, min(left, budget)))
                budget -= pieces[-1][1]
                if budget == 0:
                    break
        return pieces

    def _admit(self) -> None:
        """Lets waiting sequences in while their prompts, and a page for each to go on, find room."""
        while self._waiting and len(self._running) < self.options.sequences:
            sequence = self._waiting[0]
            pages = -(-len(sequence.tokens) // self.options.page_size)
            if self.pool.free < pages + (1 if self._running else 0):
                return
            self._waiting.popleft()
            sequence.pages = [self.pool.take() for _ in range(pages)]
            self._running.append(sequence)

    def _fork(self, leader: _Sequence) -> list[_Sequence]:
        """The followers that find room begin beside their leader: full pages are shared, the last one is copied. The
        others wait, to compute the prompt themselves."""
        started, size = [], self.options.page_size
        full, part = divmod(leader.cached, size)
        for follower in leader.followers:
            if self.pool.free < (1 if part else 0) or len(self._running) >= self.options.sequences:
                self._waiting.appendleft(follower)
                continue
            follower.pages = [self.pool.share(page) for page in leader.pages[:full]]
            if part:
                follower.pages.append(self.pool.take())
                self._cache.copy_page(leader.pages[full], follower.pages[full])
            follower.cached = leader.cached
            self._running.append(follower)
            started.append(follower)
        leader.followers = []
        return started

    def _with_pages(self, ready: list[_Sequence]) -> list[_Sequence]:
        """Those of `ready` that have a page for their next token; where pages run out, who came last gives up all."""
        out = []
        for sequence in ready:
            if sequence not in self._running:
                continue
            while len(sequence.pages) * self.options.page_size < len(sequence.tokens):
                if self.pool.free:
                    sequence.pages.append(self.pool.take())
                    continue
                last = self._running[-1]
                self._preempt(last)
                out = [s for s in out if s is not last]
                if last is sequence:
                    break
            else:
                out.append(sequence)
        return out

    def _preempt(self, sequence: _Sequence) -> None:
        """Back to the queue: its tokens are known, their keys and values will be computed again."""
        self._running.remove(sequence)
        self._give_back(sequence)
        sequence.cached = 0
        self._waiting.appendleft(sequence)

    def _give_back(self, sequence: _Sequence) -> None:
        for page in sequence.pages:
            self.pool.release(page)
        sequence.pages = []

    def _compute(self, pieces: list[tuple[_Sequence, int]]) -> list[tuple[_Sequence, torch.Tensor]]:
        """Computes the next tokens of sequences, (sequence, how many), one behind the other; their keys and values go
        to the pages. Returns (sequence, hidden row [1, H]) of those without a token left, and of their followers."""
        if not pieces:
            return []
        ids, positions, slots, starts, lengths = [], [], [], [0], []
        size = self.options.page_size
        for sequence, count in pieces:
            end = sequence.cached + count
            ids += sequence.tokens[sequence.cached : end]
            positions += range(sequence.cached, end)
            slots += [sequence.pages[p // size] * size + p % size for p in range(sequence.cached, end)]
            starts.append(starts[-1] + count)
            lengths.append(end)
            sequence.cached = end
        most = max(len(sequence.pages) for sequence, _ in pieces)
        pages = [sequence.pages + [0] * (most - len(sequence.pages)) for sequence, _ in pieces]
        attend = Paged(
            self._cache,
            self._tensor(pages, torch.int32),
            self._tensor(starts, torch.int32),
            self._tensor(lengths, torch.int32),
            self._tensor(slots, torch.int64),
            max(count for _, count in pieces),
        )
        hidden = self.model.rows_hidden(self._tensor(ids, torch.int64), self._tensor(positions, torch.int64), attend)
        rows = []
        for (sequence, _), end in zip(pieces, starts[1:], strict=True):
            if sequence.cached == len(sequence.tokens):
                last = hidden[end - 1 : end]
                rows += [(s, last) for s in (sequence, *self._fork(sequence))]
        return rows

    def _tensor(self, values: list, dtype: torch.dtype) -> torch.Tensor:
        tensor = torch.tensor(values, dtype=dtype)
        return tensor.to(self.model.device, non_blocking=True)

    def _draw(self, rows: list[tuple[_Sequence, torch.Tensor]]) -> list[tuple[_Sequence, Finish]]:
        """Draws a token for each (sequence, hidden row) and takes out the sequences that end with it."""
        if not rows:
            return []
        sequences = [sequence for sequence, _ in rows]
        options = [sequence.request.options for sequence in sequences]
        tokens, log_probs = draw(
            row_logits(torch.cat([row for _, row in rows]), self._head),
            self._tensor([s.seed for s in sequences], torch.int64),
            self._tensor([len(s.tokens) for s in sequences], torch.int64),
            self._tensor([o.temperature for o in options], torch.float32),
            self._tensor([o.top_k for o in options], torch.int32),
            self._tensor([o.top_p for o in options], torch.float32),
        )
        return self._append(sequences, tokens.tolist(), log_probs.tolist())

    def _append(self, sequences, tokens, log_probs) -> list[tuple[_Sequence, Finish]]:
        ended = []
        for sequence, token, log_prob in zip(sequences, tokens, log_probs, strict=True):
            if token < 0:
                raise ValueError(f"requests[{sequence.place[0]}]: the model's logits are not finite")
            sequence.tokens.append(token)
            sequence.log_probs.append(log_prob)
            finish = self._finish(sequence)
            if finish is not None:
                self._running.remove(sequence)
                self._give_back(sequence)
                ended.append((sequence, finish))
        return ended

    def _finish(self, sequence: _Sequence) -> Finish | None:
        request, last = sequence.request, sequence.tokens[-1]
        if last in request.stop_ids:
            return "stop"
        if request.stop:
            # A token of the text is a byte at least: no string to stop at that has just ended begins before this.
            begin = max(len(request.prompt), len(sequence.tokens) - max(len(t.encode()) for t in request.stop) - 4)
            text = self.tokenizer.decode(sequence.tokens[begin:])
            if any(stop in text for stop in request.stop):
                return "stop"
        return "length" if sequence.left == 0 else None
