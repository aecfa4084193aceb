"""What decoding by a diffusion language model is asked for and gives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from eightfold.models.config import DecoderConfig

Cache = Literal["none", "prefix", "dual"]
_THRESHOLD, _BLOCK = 0.9, 32
_MOST = 64  # tokens among which uncover_ chooses


@dataclass(frozen=True)
class DiffusionOptions:
    """How a canvas of masks behind a prompt is uncovered, block by block from left to right (LLaDA: arXiv 2502.09992;
    Fast-dLLM: 2505.22618; Fast-dLLM v2: 2509.26328).

    canvas: tokens after each prompt. block_length: tokens of a block, up to 64; None: 32, or a block-causal model's.
    cache: "none" computes the whole sequence in every pass; "prefix" that once a block, and then the block and what is
        behind it; "dual" once a block, and then the block alone. A block-causal model knows what is before the block:
        "prefix" computes the block in every pass, "dual" that once for each `sub_block` of it, and then those alone.
    refresh_every: blocks from one pass over the whole sequence to the next, with cache "dual"; Fast-dLLM has 1. A block
        between two of them begins with a pass over itself and the block before, whose last tokens no pass has seen.
    threshold, factor, steps: one of them says which masks of the block a pass uncovers; the most confident one always
        is. threshold: all of a confidence (the token's probability) of at least this, 0 < threshold <= 1; 0.9 if none
        of the three is given. factor: the n most confident, n the largest for which each m-th of them has
        (m + 1) (1 - confidence) <= factor. steps: the same number in each of so many passes a block.
    temperature: 0 takes the most likely token; else tokens are drawn, with random numbers of the prompt's seed and the
        token's place alone.
    stop_ids: tokens that end a text; None: what the model and the tokenizer call so. early_stop: a text with such a
        token and no mask before it is not decoded further.
    forbid_mask: the mask token is never predicted. forbidden: nor are these.
    batch: sequences decoded at once. fp8_cache: keys and values in E4M3 (bf16 otherwise). fp8_head: the head's product
        in FP8. cuda_graphs: passes are replayed (None: where there are kernels).
    mask_token_id, shifted_logits, attention_block: the model's, where its config does not say so (DecoderConfig).
    compat: what the published loops for LLaDA and Dream do beyond their paper: a pass more for a block that the first
        one finishes; the factor rule takes the last mask too where it alone fails; the first pass over a block of a
        model with shifted logits uncovers its first token and no other.
    """

    canvas: int = 256
    block_length: int | None = None
    cache: Cache = "dual"
    refresh_every: int = 1
    threshold: float | None = None
    factor: float | None = None
    steps: int | None = None
    temperature: float = 0.0
    stop_ids: frozenset[int] | None = None
    early_stop: bool = True
    forbid_mask: bool = True
    forbidden: tuple[int, ...] = ()
    sub_block: int = 8
    batch: int = 8
    fp8_cache: bool = False
    fp8_head: bool = False
    cuda_graphs: bool | None = None
    mask_token_id: int | None = None
    shifted_logits: bool | None = None
    attention_block: int | None = None
    compat: bool = False

    def __post_init__(self):
        for name in ("canvas", "block_length", "refresh_every", "steps", "sub_block", "batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected 1 or more, got {value}")
        if self.cache not in ("none", "prefix", "dual"):
            raise ValueError(f"cache: expected none, prefix or dual, got {self.cache!r}")
        if self.refresh_every > 1 and self.cache != "dual":
            raise ValueError(f"refresh_every: expected 1 with cache={self.cache!r}, got {self.refresh_every}")
        rules = {name: getattr(self, name) for name in ("threshold", "factor", "steps")}
        given = {name: value for name, value in rules.items() if value is not None}
        if len(given) > 1:
            raise ValueError(f"threshold, factor, steps: expected one of them, got {given}")
        if not given:
            object.__setattr__(self, "threshold", _THRESHOLD)
        elif self.threshold is not None and not 0 < self.threshold <= 1:
            raise ValueError(f"threshold: expected 0 < threshold <= 1, got {self.threshold}")
        elif self.factor is not None and not 0 < self.factor < float("inf"):
            raise ValueError(f"factor: expected a positive number, got {self.factor}")
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature: expected 0 or more, got {self.temperature}")


@dataclass(frozen=True)
class Plan:
    """Options and a model's config, brought together: what the passes need to know."""

    options: DiffusionOptions
    mask_id: int
    shifted: bool
    block: int  # tokens of a block
    window: int  # tokens among which a pass uncovers: the block, or a sub-block
    causal: bool  # block-causal
    stop_ids: tuple[int, ...]
    forbidden: tuple[int, ...]

    @property
    def keeps_keys(self) -> bool:
        """A block may begin with keys that are older than it."""
        return self.causal or self.options.refresh_every > 1

    @property
    def force_first(self) -> bool:
        """The first pass over a block uncovers its first token and no other."""
        return self.options.compat and self.shifted

    @property
    def least_steps(self) -> int:
        """Passes after the first that a block takes whatever the first has left."""
        return 1 if self.options.compat and self.options.cache != "none" else 0

    def first(self, prompt: int) -> int:
        """Where the first block begins."""
        return prompt // self.block * self.block if self.causal else prompt

    def end(self, prompt: int) -> int:
        """Where the last block ends."""
        begin, blocks = self.first(prompt), -(-(prompt - self.first(prompt) + self.options.canvas) // self.block)
        return begin + blocks * self.block


def make_plan(options: DiffusionOptions, config: DecoderConfig, stop_ids: Sequence[int] = ()) -> Plan:
    """Raises ValueError naming the option that the model, or another option, does not allow. `stop_ids`: those of the
    tokenizer."""

    def told(name):
        return getattr(config if getattr(options, name) is None else options, name)

    mask_id, seen = told("mask_token_id"), told("attention_block")
    if mask_id is None:
        raise ValueError("mask_token_id: the model's config names none, and none was given")
    if not 0 <= mask_id < config.vocab_size:
        raise ValueError(f"mask_token_id: expected 0 to {config.vocab_size - 1}, got {mask_id}")
    if seen == 1:
        raise ValueError("attention_block: expected 0 or 2 and more, got 1: a causal model sees nothing behind a token")
    causal, shifted = seen > 1, told("shifted_logits")
    block = options.block_length or (seen if causal else _BLOCK)
    window = min(options.sub_block, block) if causal else block
    if causal:
        _check_causal(options, block, window, seen)
    elif options.canvas % block:
        raise ValueError(f"canvas: expected a multiple of block_length ({block}), got {options.canvas}")
    if window > _MOST:
        raise ValueError(f"block_length: expected 1 to {_MOST}, got {window}")
    least = 16 if options.fp8_head else 8
    if config.vocab_size % least:
        raise ValueError(f"vocab_size: expected a multiple of {least}, got {config.vocab_size}")
    if options.steps is not None and options.steps > window:
        raise ValueError(f"steps: expected 1 to {window}, the tokens that they uncover, got {options.steps}")
    if options.compat and shifted and (options.cache == "none" or options.steps is not None):
        raise ValueError(
            "compat: of models with shifted logits only cache prefix and dual by threshold or factor, "
            f"got cache={options.cache!r}, steps={options.steps}"
        )
    if options.compat and options.refresh_every > 1:
        raise ValueError(f"compat: expected refresh_every 1, got {options.refresh_every}")
    stops = stop_ids if options.stop_ids is None else options.stop_ids
    if options.stop_ids is None and config.eos_token_id is not None:
        eos = config.eos_token_id
        stops = [*stops, *(eos if isinstance(eos, list) else [eos])]
    forbidden = {*options.forbidden, *([mask_id] if options.forbid_mask else [])}
    for name, ids in (("stop_ids", stops), ("forbidden", forbidden)):
        wrong = [i for i in ids if not 0 <= i < config.vocab_size]
        if wrong:
            raise ValueError(f"{name}: expected 0 to {config.vocab_size - 1}, got {wrong[0]}")
    stops = tuple(sorted(set(stops) - {mask_id}))
    return Plan(options, mask_id, shifted, block, window, causal, stops, tuple(sorted(forbidden)))


def _check_causal(options: DiffusionOptions, block: int, window: int, seen: int) -> None:
    if block != seen:
        raise ValueError(f"block_length: expected {seen}, the blocks of this block-causal model, got {block}")
    if block % window:
        raise ValueError(f"sub_block: expected a divisor of block_length ({block}), got {window}")
    if options.cache == "none":
        raise ValueError(
            "cache: a block-causal model's cache of the prefix is exact: expected prefix or dual, got none"
        )
    if options.compat:
        raise ValueError("compat: expected False for a block-causal model, got True")
    if options.refresh_every > 1:
        raise ValueError(
            f"refresh_every: a block-causal model's cache is exact: expected 1, got {options.refresh_every}"
        )


@dataclass
class DiffusionResult:
    """What became of a prompt. tokens: the canvas up to and with its first stop id. canvas: all of it, with the mask
    token where decoding stopped before. forwards: passes of the model over this sequence while it had masks to uncover:
    those over all of it (refreshes) and those over a block (steps), of a block-causal model also those that fix a
    block's keys, but not that over the prompt. finish: "eos" where tokens end with a stop id, else "length"."""

    tokens: list[int]
    canvas: list[int]
    forwards: int
    finish: Literal["eos", "length"]
    uncovered: int

    @property
    def tokens_per_forward(self) -> float:
        """Tokens of the canvas that a pass uncovered on average."""
        return self.uncovered / self.forwards


def result_of(canvas: list[int], forwards: int, plan: Plan) -> DiffusionResult:
    """The result that a decoded canvas is."""
    ends = (i for i, token in enumerate(canvas) if token == plan.mask_id or token in plan.stop_ids)
    end = next(ends, None)
    stopped = end is not None and canvas[end] != plan.mask_id
    tokens = canvas[: end + 1] if stopped else list(canvas)
    uncovered = sum(token != plan.mask_id for token in canvas)
    return DiffusionResult(tokens, canvas, forwards, "eos" if stopped else "length", uncovered)


@dataclass
class DiffusionMeters:
    """Of one call: wall seconds; tokens of all canvases that were uncovered, and of them those up to the stop ids;
    `forwards` of all results; passes the device was asked for, and those of them that found no mask left."""

    seconds: float = 0.0
    canvas_tokens: int = 0
    tokens: int = 0
    forwards: int = 0
    passes: int = 0
    wasted: int = 0

    @property
    def canvas_tokens_per_second(self) -> float:
        return self.canvas_tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    @property
    def tokens_per_forward(self) -> float:
        return self.canvas_tokens / self.forwards if self.forwards else 0.0
