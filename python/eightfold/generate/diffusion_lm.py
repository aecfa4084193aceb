"""Decoding by diffusion language models: LLaDA (arXiv 2502.09992), Dream (2508.15487) with the caches and the parallel
rules of Fast-dLLM (2505.22618), and block-causal models (Fast-dLLM v2: 2509.26328).

A canvas of masks is uncovered block by block. The inside of a block never waits for the host: it asks for a pass, and
for one more before it has read what the first has left, unless that is likely to have been the last of the block.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

import torch

from eightfold.generate.diffusion_options import (
    DiffusionMeters,
    DiffusionOptions,
    DiffusionResult,
    Plan,
    make_plan,
    result_of,
)
from eightfold.generate.diffusion_state import CanvasRow, Seen
from eightfold.generate.diffusion_step import DiffusionStep
from eightfold.models.decoder import Decoder
from eightfold.models.precision import KeptWeights
from eightfold.ops import kernels_run_on

OnPass = Callable[[int, list[int]], None]


class DiffusionGenerator:
    """An engine over one decoder. Weights must not change while `generate` runs; between two calls they may."""

    def __init__(self, model: Decoder, tokenizer=None, options: DiffusionOptions | None = None):
        """tokenizer: needed for prompts that are text; its end token is a stop id. Raises ValueError naming the option
        that does not fit the model."""
        self.model, self.tokenizer, self.options = model, tokenizer, options or DiffusionOptions()
        end = getattr(tokenizer, "eos_token_id", None)
        self.plan: Plan = make_plan(self.options, model.config, [] if end is None else [end])
        self.kept = KeptWeights(model.compute.dtype)
        self.meters = DiffusionMeters()  # of the last call
        graphs = self.options.cuda_graphs
        self._graphs = kernels_run_on(model.device) if graphs is None else graphs
        self._ahead = model.device.type == "cuda"  # a pass is asked for before the one ahead of it is read
        self._step: DiffusionStep | None = None
        self._weights: list[tuple[int, int]] | None = None
        self._pace = 0

    @torch.inference_mode()
    def generate(
        self, prompts: Sequence[Sequence[int] | str], seeds: Sequence[int] | None = None, on_pass: OnPass | None = None
    ) -> list[DiffusionResult]:
        """What each prompt (token ids, or text) is answered with, in order; the same whatever stands beside it.

        seeds: of each prompt, default 0, 1 and so on; used at temperatures above 0. `on_pass(prompt, canvas)` is called
        after each pass for every prompt that takes part, with its canvas as it is then. `self.meters` are of this call.

        Raises ValueError naming the argument where a prompt is empty, does not fit the model's context or holds ids it
        does not have, and where a pass uncovers nothing.
        """
        seeds = range(len(prompts)) if seeds is None else seeds
        if len(seeds) != len(prompts):
            raise ValueError(f"seeds: expected one for each of {len(prompts)} prompts, got {len(seeds)}")
        rows = [self._row(i, prompt, int(seeds[i])) for i, prompt in enumerate(prompts)]
        results: list[DiffusionResult | None] = [None] * len(rows)
        self.meters = DiffusionMeters()
        if rows:
            self._open(rows)
        self._synchronize()
        begin = time.perf_counter()
        with self.model.compute.constant_weights(self.kept):
            for group in range(0, len(rows), self.options.batch):
                numbers = range(group, min(group + self.options.batch, len(rows)))
                for number, result in _Batch(self, rows, numbers, on_pass).run():
                    results[number] = result
        self._synchronize()
        self.meters.seconds = time.perf_counter() - begin
        self.meters.canvas_tokens = sum(result.uncovered for result in results)
        self.meters.tokens = sum(len(result.tokens) for result in results)
        self.meters.forwards = sum(result.forwards for result in results)
        return results

    def _synchronize(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _row(self, index: int, prompt: Sequence[int] | str, seed: int) -> CanvasRow:
        plan, limit = self.plan, self.model.config.max_position_embeddings
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise ValueError(f"prompts[{index}]: text needs a tokenizer, got none")
            prompt = self.tokenizer.encode(prompt)
        prompt = [int(token) for token in prompt]
        if not prompt:
            raise ValueError(f"prompts[{index}]: expected at least one token, got none")
        wrong = [i for i in prompt if not 0 <= i < self.model.config.vocab_size or i == plan.mask_id]
        if wrong:
            raise ValueError(
                f"prompts[{index}]: expected ids from 0 to {self.model.config.vocab_size - 1} but the mask token "
                f"{plan.mask_id}, got {wrong[0]}"
            )
        if len(prompt) + plan.options.canvas > limit:
            raise ValueError(
                f"prompts[{index}]: prompt and canvas of {len(prompt)} + {plan.options.canvas} tokens are longer than "
                f"the model's context of {limit}"
            )
        return CanvasRow(prompt, plan.first(len(prompt)), plan.end(len(prompt)), seed)

    def _open(self, rows: list[CanvasRow]) -> None:
        """The cache and the passes over it, with what the weights of the moment give."""
        capacity = min(self.options.batch, len(rows))
        longest = max(row.end for row in rows)
        parameters = list(self.model.parameters())
        weights = [(p.data_ptr(), -1 if p.is_inference() else p._version) for p in parameters]
        if self._weights != weights or any(version < 0 for _, version in weights):
            self.kept.refresh()
        moved = self._weights is None or [a for a, _ in self._weights] != [a for a, _ in weights]
        self._weights = weights
        step = self._step
        if moved or step is None or step.capacity < capacity or step.max_tokens < longest:
            if step is not None:
                capacity, longest = max(capacity, step.capacity), max(longest, step.max_tokens)
            self._step = step = None  # its memory is free before the next one's is taken
            self._step = DiffusionStep(self.model, self.plan, self.kept, capacity, longest, self._graphs)


class _Batch:
    """Sequences that are decoded together, block by block; who ends leaves at the end of its block."""

    def __init__(self, engine: DiffusionGenerator, rows: list[CanvasRow], numbers: range, on_pass: OnPass | None):
        self._engine, self._plan, self._step = engine, engine.plan, engine._step
        self._numbers, self._rows = list(numbers), [rows[i] for i in numbers]
        self._on_pass = on_pass
        self._ended = [False] * len(numbers)

    def run(self) -> Iterator[tuple[int, DiffusionResult]]:
        """(number, result) of each as it ends."""
        plan, step = self._plan, self._step
        step.load(self._rows)
        if plan.causal:
            step.prefill()
        offset = 0
        while self._rows:
            for inside in range(0, plan.block, plan.window):
                self._decode(offset, inside)
            offset += plan.block
            yield from self._retire(offset)
            if plan.causal and self._rows:
                step.commit()
        self._engine.meters.passes += step.passes

    def _decode(self, block: int, inside: int) -> None:
        """Uncovers the window that begins `inside` a block, itself `block` tokens behind the first."""
        behind = block + inside + self._plan.window
        if all(over or row.first + behind <= len(row.prompt) for over, row in zip(self._ended, self._rows)):
            return
        step = self._step
        step.enter(block + inside, block)
        if block // self._plan.block % self._plan.options.refresh_every:
            step.advance()
        else:
            step.refresh()
        flying, steps = step.seen(self._on_pass is not None), 0
        window = self._plan.window
        masks = [min(window, max(0, row.first + behind - len(row.prompt))) for row in self._rows]
        left = [0 if over else count for count, over in zip(masks, self._ended)]
        pace, first = self._engine._pace, True
        while True:
            following = None
            if self._engine._ahead and max(left) > pace:
                step.step()
                following = step.seen(self._on_pass is not None)
            left, pace = self._read(flying, left)
            if first:
                self._engine._pace, first = pace, False  # what the next window's first pass will likely uncover
            if not any(left) and steps >= self._plan.least_steps:
                self._engine.meters.wasted += following is not None
                return
            if following is None:
                step.step()
                following = step.seen(self._on_pass is not None)
            flying, steps = following, steps + 1

    def _read(self, seen: Seen, before: list[int]) -> tuple[list[int], int]:
        """Masks that a pass has left to each sequence, none to who has ended; and the most that it has uncovered of
        one. before: the masks that it found."""
        left, self._ended, tokens = seen.read()
        left = [0 if over else count for count, over in zip(left, self._ended)]
        for row, (was, now) in enumerate(zip(before, left)):
            if was and was == now:
                raise ValueError(
                    f"prompts[{self._numbers[row]}]: a pass has uncovered nothing: the model's logits are not finite, "
                    f"or it predicts the mask token {self._plan.mask_id}"
                )
        if tokens is not None:
            for row, was in enumerate(before):
                if was:
                    self._on_pass(self._numbers[row], self._canvas(row, tokens[row]))
        return left, max(was - now for was, now in zip(before, left))

    def _canvas(self, row: int, tokens: list[int]) -> list[int]:
        begin = len(self._rows[row].prompt)
        return tokens[begin : begin + self._plan.options.canvas]

    def _retire(self, offset: int) -> Iterator[tuple[int, DiffusionResult]]:
        """Takes out who has ended, and who has no block `offset` behind its first."""
        kept = []
        for row, number in enumerate(self._numbers):
            if not self._ended[row] and self._rows[row].first + offset < self._rows[row].end:
                kept.append(row)
                continue
            tokens, forwards = self._step.result(row)
            yield number, result_of(self._canvas(row, tokens), forwards, self._plan)
        if len(kept) < len(self._rows):
            self._rows, self._numbers = [self._rows[i] for i in kept], [self._numbers[i] for i in kept]
            self._ended = [self._ended[i] for i in kept]
            if kept:
                self._step.keep(kept)
