"""`eightfold generate`: text on standard output as it is drawn."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch

from eightfold.generate.text import SamplingOptions, generate
from eightfold.models.loading import load_decoder


def run(args: argparse.Namespace) -> int:
    """Continues `args.prompt` (None: standard input) with `args.model`; see the command line's help for the rest."""
    options = SamplingOptions(args.temperature, args.top_k or 0, 1.0 if args.top_p is None else args.top_p)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, tokenizer = load_decoder(args.model, precision=args.precision, device=device)
    if tokenizer is None:
        raise ValueError(f"{args.model}: has no tokenizer")
    prompt = sys.stdin.read() if args.prompt is None else args.prompt
    ids = torch.tensor([encode(tokenizer, prompt, args.chat)], device=device)
    printer = TextPrinter(tokenizer, sys.stdout.write)
    stops = stop_ids(model.config.eos_token_id, tokenizer.eos_token_id)

    def show(step: torch.Tensor) -> None:
        if step.item() not in stops:
            printer.put(step.item())
            sys.stdout.flush()

    generate(model.eval(), ids, args.max_tokens, options, stops, args.seed, show)
    printer.end()
    print(flush=True)
    return 0


def encode(tokenizer, prompt: str, chat: bool) -> list[int]:
    """Token ids of a prompt, put through the chat template as a user's message with `chat`."""
    if not chat:
        ids = tokenizer.encode(prompt)
    elif tokenizer.chat_template is None:
        raise ValueError("--chat: the model's tokenizer has no chat template")
    else:
        message = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
        ids = tokenizer.encode(text, add_special_tokens=False)
    if not ids:
        raise ValueError("prompt: expected some text, got none")
    return ids


def stop_ids(*sources: int | list[int] | None) -> list[int]:
    """The distinct ids among ids, lists of ids and None."""
    lists = [source if isinstance(source, list) else [source] for source in sources]
    return sorted({i for ids in lists for i in ids if i is not None})


class TextPrinter:
    """Writes the text of tokens as soon as it is certain: a character may be spread over several tokens."""

    def __init__(self, tokenizer, write: Callable[[str], object]):
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._shown = ""

    def put(self, token: int) -> None:
        self._ids.append(token)
        text = self._tokenizer.decode(self._ids)
        if not text.endswith("\ufffd"):
            self._show(text)

    def end(self) -> None:
        """Writes what is still held back."""
        self._show(self._tokenizer.decode(self._ids))

    def _show(self, text: str) -> None:
        self._write(text[len(self._shown) :])
        self._shown = text
