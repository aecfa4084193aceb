"""`eightfold generate --diffusion`: a canvas on the terminal while it is uncovered, then its text."""

from __future__ import annotations

import argparse
import sys
from itertools import groupby

import torch

from eightfold.generate.console import encode
from eightfold.generate.diffusion_lm import DiffusionGenerator
from eightfold.generate.diffusion_options import DiffusionMeters, DiffusionOptions
from eightfold.models.loading import load_decoder

_MASK = "░"
_STYLES = {"mask": "dim", "new": "bold green", "old": ""}
_OPTIONS = {"canvas": "canvas", "block": "block_length", "cache": "cache", "threshold": "threshold", "factor": "factor"}
_OPTIONS |= {"refresh_every": "refresh_every", "steps": "steps", "temperature": "temperature"}


def run(args: argparse.Namespace) -> int:
    """Answers `args.prompt` (None: standard input) with `args.model`; see the command line's help for the rest. The
    text goes to standard output, what it took to standard error."""
    given = {option: getattr(args, flag) for flag, option in _OPTIONS.items() if getattr(args, flag) is not None}
    options = DiffusionOptions(**given)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_decoder(args.model, precision=args.precision, device=device)
    if tokenizer is None:
        raise ValueError(f"{args.model}: has no tokenizer")
    engine = DiffusionGenerator(model.eval(), tokenizer, options)
    ids = encode(tokenizer, sys.stdin.read() if args.prompt is None else args.prompt, args.chat)
    result = _watched(engine, ids, args.seed) if sys.stdout.isatty() else engine.generate([ids], [args.seed])[0]
    tokens = result.tokens[:-1] if result.finish == "eos" else result.tokens
    print(tokenizer.decode(tokens), flush=True)
    print(summary(engine.meters), file=sys.stderr, flush=True)
    return 0


def summary(meters: DiffusionMeters) -> str:
    """One line on what a call took."""
    return (
        f"{meters.forwards} forwards, {meters.tokens_per_forward:.2f} tokens per forward; "
        f"{meters.canvas_tokens_per_second:,.1f} tokens/s of the canvas, {meters.tokens_per_second:,.1f} of the text"
    )


def _watched(engine: DiffusionGenerator, ids: list[int], seed: int):
    """The result; the canvas is shown after each pass, and taken away at the end."""
    from rich.live import Live

    mask_id, tokenizer = engine.plan.mask_id, engine.tokenizer
    shown = [mask_id] * engine.options.canvas
    with Live(view(tokenizer, shown, shown, mask_id), transient=True, auto_refresh=False) as live:

        def show(_: int, canvas: list[int]) -> None:
            nonlocal shown
            live.update(view(tokenizer, shown, canvas, mask_id), refresh=True)
            shown = canvas

        return engine.generate([ids], [seed], show)[0]


def view(tokenizer, before: list[int], canvas: list[int], mask_id: int):
    """A canvas as rich.text.Text: masks dim, what was a mask in `before` bright."""
    from rich.text import Text

    def state(pair: tuple[int, int]) -> str:
        was, now = pair
        return "mask" if now == mask_id else "new" if was == mask_id else "old"

    text = Text()
    for kind, run in groupby(zip(before, canvas, strict=True), key=state):
        tokens = [now for _, now in run]
        text.append(_MASK * len(tokens) if kind == "mask" else tokenizer.decode(tokens), style=_STYLES[kind])
    return text
