"""Writes OUTPUT/train.jsonl and OUTPUT/test.jsonl: sums worked out step by step (eightfold.train.sums), none of the
test's among the others. With --tiny, OUTPUT/model gets the config.json of a small model and a tokenizer of single
characters, with an end and a mask token."""

import argparse
from pathlib import Path

from eightfold.train.sums import write_problems, write_tiny_model


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
    try:
        write_problems(options.output, options.train, options.test, tuple(options.terms), options.largest, options.seed)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    if options.tiny:
        write_tiny_model(options.output / "model")


if __name__ == "__main__":
    main()
