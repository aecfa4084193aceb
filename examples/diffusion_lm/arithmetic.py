"""Writes OUTPUT/train.jsonl and OUTPUT/test.jsonl: sums worked out step by step, none of the test's among the others.

A line is {"prompt": "37+48-12=", "completion": "85-12=73"}: each step takes the first two numbers together. No number
is negative or above --largest. With --tiny, OUTPUT/model gets the config.json of a small model
and a tokenizer of single characters, with an end and a mask token.
"""

import argparse
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


def write_problems(output: Path, options: argparse.Namespace) -> None:
    draw, seen = random.Random(options.seed), set()
    low, high = options.terms
    for name, count in (("test", options.test), ("train", options.train)):
        lines = []
        for _ in range(100 * count):
            prompt, completion = problem(draw, draw.randint(low, high), options.largest)
            if prompt not in seen:
                seen.add(prompt)
                lines.append(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
            if len(lines) == count:
                break
        else:
            raise SystemExit(f"there are fewer than {options.test + options.train:,} such sums: ask for more terms")
        (output / f"{name}.jsonl").write_text("".join(lines))


def write_tiny_model(folder: Path) -> None:
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--train", type=int, default=200_000, help="sums to learn from")
    parser.add_argument("--test", type=int, default=1_000, help="sums held out")
    parser.add_argument("--terms", type=int, nargs=2, default=(2, 6), metavar=("LEAST", "MOST"))
    parser.add_argument("--largest", type=int, default=99, help="number in a sum or its result")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiny", action="store_true", help="also write a small model's config and tokenizer")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} is there already")
    if not 2 <= options.terms[0] <= options.terms[1]:
        parser.error(f"--terms: expected 2 or more, the least first, got {options.terms}")
    options.output.mkdir(parents=True)
    write_problems(options.output, options)
    if options.tiny:
        write_tiny_model(options.output / "model")


if __name__ == "__main__":
    main()
