"""Accuracy against speed of a diffusion language model: exact answers and tokens/s for each precision, cache and
threshold.

    python evaluate.py run-sums sums/test.jsonl --canvas 64 --output scores

Leaves scores.json and scores.png in the output folder, and prints a table. Each combination is run twice; the second
run is the one that counts.
"""

import argparse
import dataclasses
import json
from itertools import product
from pathlib import Path

import torch

from eightfold.generate import DiffusionGenerator, DiffusionOptions
from eightfold.generate.diffusion_scores import read_problems, score
from eightfold.models import load_decoder
from eightfold.train.config import ModelConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="Hugging Face folder or a training run's folder")
    parser.add_argument("problems", type=Path, help="lines of prompt and completion")
    parser.add_argument("--precisions", nargs="+", default=["bf16", "fp8"], choices=("fp32", "bf16", "fp8"))
    parser.add_argument("--caches", nargs="+", default=["none", "prefix", "dual"], choices=("none", "prefix", "dual"))
    parser.add_argument("--thresholds", nargs="+", type=float, default=[0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
    parser.add_argument("--refresh-every", nargs="+", type=int, default=[1], help="of the dual cache, in blocks")
    parser.add_argument("--canvas", type=int, default=64)
    parser.add_argument("--block", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1, help="prompts decoded at once")
    parser.add_argument("--most", type=int, help="problems taken, from the first on")
    parser.add_argument("--output", type=Path, default=Path("scores"))
    options = parser.parse_args()
    problems = read_problems(options.problems)[: options.most]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options.output.mkdir(parents=True, exist_ok=True)
    rows = []
    for precision in options.precisions:
        model, tokenizer = load_decoder(ModelConfig(path=options.model).resolved(), precision, device=device)
        caches = [(c, n) for c in options.caches for n in (options.refresh_every if c == "dual" else [1])]
        for (cache, every), threshold in product(caches, options.thresholds):
            settings = {"cache": cache, "refresh_every": every, "threshold": threshold, "canvas": options.canvas}
            engine = DiffusionGenerator(
                model.eval(), tokenizer, DiffusionOptions(**settings, block_length=options.block, batch=options.batch)
            )
            for _ in range(2):
                found = score(engine, problems)
            rows.append({"precision": precision, **settings, **dataclasses.asdict(found)})
            print(
                f"{precision} {label(cache, every):9s} {threshold:.2f}: "
                f"{100 * found.accuracy:5.1f} % of {len(problems)}, {found.tokens_per_forward:.2f} tokens per forward, "
                f"{found.tokens_per_second:,.0f} tokens/s",
                flush=True,
            )
            (options.output / "scores.json").write_text(json.dumps(rows, indent=1) + "\n")
    plot(rows, options.output / "scores.png")


def label(cache: str, every: int) -> str:
    return cache if every == 1 else f"{cache} / {every}"


def plot(rows: list[dict], path: Path) -> None:
    """Accuracy against tokens/s: a line for each precision and cache, a point for each threshold."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5.5), layout="constrained")
    lines: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        lines.setdefault((row["precision"], label(row["cache"], row["refresh_every"])), []).append(row)
    styles, colours = {}, {}
    for (precision, cache), points in lines.items():
        style = styles.setdefault(precision, ("-", "--", ":")[len(styles)])
        colour = colours.setdefault(cache, f"C{len(colours)}")
        speed, right = ([p[key] for p in points] for key in ("tokens_per_second", "right"))
        share = [100 * n / p["problems"] for n, p in zip(right, points, strict=True)]
        axes.plot(speed, share, style, color=colour, marker="o", label=f"{precision}, {cache} cache")
        for x, y, point in zip(speed, share, points, strict=True):
            axes.annotate(f"{point['threshold']:g}", (x, y), textcoords="offset points", xytext=(4, 4), fontsize=7)
    axes.set_xlabel("tokens/s of the canvas")
    axes.set_ylabel("exact answers (%)")
    axes.set_title("Accuracy against speed; at each point its threshold")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    main()
