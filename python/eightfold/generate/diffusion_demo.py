"""`eightfold generate --diffusion --demo`: a tiny diffusion language model learns sums on a CPU, then works out others.

It learns for some minutes the first time, and is read from the output folder from then on. Every figure is measured in
this run, on sums that it has not seen.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

from eightfold.generate.diffusion_console import view
from eightfold.generate.diffusion_lm import DiffusionGenerator
from eightfold.generate.diffusion_options import DiffusionOptions
from eightfold.generate.diffusion_scores import read_problems, score
from eightfold.models.loading import load_decoder
from eightfold.train import checkpoint
from eightfold.train.config import TrainConfig, parse_config
from eightfold.train.loop import train
from eightfold.train.sums import write_problems, write_tiny_model

STEPS = 2000
SUMS, TEST, SHOWN = 40_000, 100, 2
CANVAS, BLOCK = 24, 8
CACHES = ("none", "prefix", "dual")


def run(output: Path, steps: int | None = None, sums: int = SUMS) -> int:
    """Trains a model in ``output`` where there is none, shows how it answers, and prints what each cache mode takes;
    returns an exit code."""
    if not checkpoint.complete(str(output / "run")):
        print("A diffusion language model of 0.8 M parameters learns sums such as 3+5+1-9+3= by uncovering masks.\n")
        _prepare(output, sums)
        train(demo_config(output, steps or STEPS))
        print()
    model, tokenizer = load_decoder(checkpoint.complete(str(output / "run"))[-1], precision="fp32")
    problems = read_problems(output / "test.jsonl")
    figures = {
        cache: _answer(model.eval(), tokenizer, problems, cache, shown=cache == "dual") for cache in CACHES[::-1]
    }
    (output / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    print_table(figures, len(problems))
    return 0


def _prepare(output: Path, sums: int) -> None:
    shutil.rmtree(output / "run", ignore_errors=True)
    output.mkdir(parents=True, exist_ok=True)
    write_problems(output, sums, TEST, (5, 5), 9)
    write_tiny_model(output / "model")


def demo_config(output: Path, steps: int) -> TrainConfig:
    """What examples/diffusion_lm/tiny.yaml says."""
    return parse_config(
        {
            "model": {"path": str(output / "model"), "init": "random", "precision": "fp32"},
            "data": {
                "path": str(output / "train.jsonl"),
                "sequence_length": 136,
                "fill_answers": CANVAS,
                "whole_documents": True,
                "held_out": 0.01,
            },
            "objective": "masked-diffusion",
            "diffusion": {"average": "answers"},
            "optimizer": {
                "lr": 2e-3,
                "betas": [0.9, 0.98],
                "weight_decay": 0.01,
                "warmup_steps": min(50, steps // 2),
                "min_lr_ratio": 0.02,
            },
            "output": str(output / "run"),
            "steps": steps,
            "batch_size": 16,
            "device": "cpu",
            "deterministic": False,
            "eval_every": 500,
            "eval_sequences": 64,
            "log_every": max(1, steps // 20),
            "checkpoint_every": 0,
            "tensorboard": False,
        }
    )


def _answer(model, tokenizer, problems: list[dict], cache: str, shown: bool) -> dict[str, float]:
    """What a cache mode makes of the problems; with ``shown`` the first of them are watched, pass by pass."""
    engine = DiffusionGenerator(model, tokenizer, DiffusionOptions(canvas=CANVAS, block_length=BLOCK, cache=cache))
    for problem in problems[:SHOWN] if shown else []:
        print(f"{problem['prompt']}  each line is a pass of the model: cache {cache}, blocks of {BLOCK}, threshold 0.9")
        masks = [engine.plan.mask_id] * CANVAS

        def show(_: int, canvas: list[int], masks=masks) -> None:
            print(f"  {view(tokenizer, masks, canvas, masks[0]).plain}")

        engine.generate([problem["prompt"]], on_pass=show)
        print(f"  {problem['completion']} would be right\n")
    return dataclasses.asdict(score(engine, problems))


def print_table(figures: dict[str, dict[str, float]], problems: int) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("cache", *(f"{cache}" for cache in CACHES))
    for label, key, form in (
        (f"sums right, of {problems} not seen", "right", "{:.0f}"),
        ("forwards", "forwards", "{:,.0f}"),
        ("tokens per forward", "tokens_per_forward", "{:.2f}"),
        ("tokens/s", "tokens_per_second", "{:,.0f}"),
    ):
        table.add_row(label, *(form.format(figures[cache][key]) for cache in CACHES))
    Console().print(table)
