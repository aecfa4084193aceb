"""Curves of two runs of `eightfold train` in one picture, and the gap of their last held-out losses in nats."""

import argparse
import json
from pathlib import Path

from eightfold.train.report import plot_curves, read_log


def last(records: list[dict], key: str) -> float:
    values = [record[key] for record in records if key in record]
    if not values:
        raise SystemExit(f"compare: a log without {key}")
    return values[-1]


def tail_mean(records: list[dict], share: float = 0.05) -> float:
    """Mean training loss of the last steps: less noisy than the last alone."""
    losses = [record["loss"] for record in records if "loss" in record]
    return sum(losses[-max(1, round(len(losses) * share)) :]) / max(1, round(len(losses) * share))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs=2, type=Path, help="output folders: the reference first")
    parser.add_argument("--output", type=Path, default=Path("curves.png"))
    parser.add_argument("--title", default="SmolLM2-135M's shape from random weights")
    options = parser.parse_args()
    records = {run.name: read_log(run / "log.jsonl") for run in options.runs}
    plot_curves(options.output, records, options.title, baseline=options.runs[0].name)
    figures = {}
    for name, log in records.items():
        speeds = sorted(record["tokens_per_second"] for record in log if "tokens_per_second" in record)
        figures[name] = {
            "held_out_loss": last(log, "held_out_loss"),
            "training_loss": tail_mean(log),
            "tokens_per_second": speeds[len(speeds) // 2],
            "memory_bytes": last(log, "memory_bytes"),
            "steps": last(log, "step"),
        }
    one, other = figures.values()
    gaps = {key: other[key] - one[key] for key in ("held_out_loss", "training_loss")}
    options.output.with_suffix(".json").write_text(json.dumps({"runs": figures, "gap": gaps}, indent=2) + "\n")
    for name, row in figures.items():
        print(f"{name}: held out {row['held_out_loss']:.4f}, training {row['training_loss']:.4f} nats a token, "
              f"{row['tokens_per_second']:,.0f} tokens/s, {row['memory_bytes'] / 1e9:.2f} GB")  # fmt: skip
    print(f"gap: held out {gaps['held_out_loss']:+.4f}, training {gaps['training_loss']:+.4f} nats a token")


if __name__ == "__main__":
    main()
