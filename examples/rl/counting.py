"""The task of counting.yaml, a user's own verifier: numbers one after the other, some hundred of them.

The lines of counting.jsonl are what `python examples/rl/counting.py` prints.
"""

import json
import random
import re

LINES, FIRST, COUNT = 512, (1, 100), (120, 200)  # questions; from which number; how many numbers


def reward(item: dict, completion: str, finish_reason: str) -> float:
    """The share of the numbers asked for that come in order from the start."""
    wanted = range(item["first"] + 1, item["last"] + 1)
    right = 0
    for number, drawn in zip(wanted, re.findall(r"\d+", completion), strict=False):
        if drawn != str(number):
            break
        right += 1
    return right / len(wanted)


def main() -> None:
    generator = random.Random(0)
    for _ in range(LINES):
        first = generator.randint(*FIRST)
        last = first + generator.randint(*COUNT)
        question = f"Numbers from {first} to {last}, one after the other: {first},"
        print(json.dumps({"question": question, "first": first, "last": last}))


if __name__ == "__main__":
    main()
