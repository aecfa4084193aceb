"""Sums worked out step by step, lines with a prompt and a completion, and a model small enough to learn them on a CPU.

A line is {"prompt": "37+48-12=", "completion": "85-12=73"}: each step takes the first two numbers together. No number
is negative or above the largest asked for.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

END, MASK = "<end>", "<mask>"
TINY = {
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "initializer_range": 0.06,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


def problem(draw: random.Random, terms: int, largest: int) -> tuple[str, str]:
    """(prompt, completion) of a sum of so many terms."""
    total = draw.randint(0, largest)
    numbers, rests = [str(total)], []
    for _ in range(terms - 1):
        term = draw.randint(0, max(total, largest - total))
        signs = [sign for sign in (1, -1) if 0 <= total + sign * term <= largest]
        sign = draw.choice(signs)
        total += sign * term
        numbers.append(("+" if sign > 0 else "-") + str(term))
        rests.append(str(total))
    steps = [rest + "".join(numbers[place + 2 :]) for place, rest in enumerate(rests)]
    return "".join(numbers) + "=", "=".join(steps)


def write_problems(output: Path, train: int, test: int, terms: tuple[int, int], largest: int, seed: int = 0) -> None:
    """Writes output/train.jsonl and output/test.jsonl, no sum of the one in the other; terms: the fewest and the most.
    ValueError where there are not so many sums."""
    draw, seen = random.Random(seed), set()
    for name, count in (("test", test), ("train", train)):
        lines = []
        for _ in range(100 * count):
            prompt, completion = problem(draw, draw.randint(*terms), largest)
            if prompt not in seen:
                seen.add(prompt)
                lines.append(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
            if len(lines) == count:
                break
        else:
            raise ValueError(f"there are fewer than {train + test:,} such sums: ask for more terms")
        (output / f"{name}.jsonl").write_text("".join(lines))


def write_tiny_model(folder: Path) -> None:
    """The config.json of a bidirectional decoder of 0.8 M parameters, and its tokenizer of single characters."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers
    from tokenizers.decoders import Fuse
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: i for i, letter in enumerate([END, MASK, *"0123456789+-="])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=MASK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = Fuse()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, mask_token=MASK).save_pretrained(folder)
    config = TINY | {"eos_token_id": vocabulary[END], "mask_token_id": vocabulary[MASK], "attention_block": 0}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
