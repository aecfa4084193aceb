"""`eightfold rl --demo`: SmolLM2-135M-Instruct learns to add, in each mode of precision, on a CPU in minutes.

Every figure is measured in this run. In the unified flow (FP8 training, FP8 rollout) the log-probabilities of rollout
and training have the same bits; an FP8 rollout of a policy that is trained in bf16 is far from it.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from eightfold.train.config import ModelConfig
from eightfold.train.report import read_log
from eightfold.train.rl.config import RlConfig, parse_rl_config
from eightfold.train.rl.loop import train_rl
from eightfold.train.rl.report import plot_rewards

STEPS = 24
COMPARED = 3  # steps of the modes beside the unified one
MODES = {"unified": ("fp8", "same"), "bf16": ("bf16", "same"), "mixed": ("bf16", "fp8")}


def run(output: Path, steps: int | None = None) -> int:
    """Runs the demo into ``output`` and prints its table; returns an exit code."""
    start, steps = time.perf_counter(), steps or STEPS
    source = ModelConfig(path="smollm2").resolved()
    print(f"{source.name} adds two numbers below 100 (reasoning-gym's chain_sum) and is rewarded where it is right.\n")
    records = {}
    for mode in MODES:
        config = demo_config(source, output / mode, mode, steps if mode == "unified" else min(steps, COMPARED))
        shutil.rmtree(config.output, ignore_errors=True)
        train_rl(config, name=mode)
        records[mode] = read_log(Path(config.output) / "log.jsonl")
    plot_rewards(output / "rewards.png", records, f"{source.name} learns sums")
    figures = {mode: summary(found) for mode, found in records.items()}
    (output / "demo.json").write_text(json.dumps(figures, indent=2) + "\n")
    print_table(figures)
    print(f"\nPicture: {output / 'rewards.png'}; {time.perf_counter() - start:.0f} s in all.")
    return 0


def demo_config(source: Path, output: Path, mode: str, steps: int) -> RlConfig:
    """The settings of a mode: only the precisions differ."""
    training, rollout = MODES[mode]
    return parse_rl_config(
        {
            "model": {"path": str(source), "precision": training},
            "task": {
                "name": "chain_sum",
                "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
            },
            "reward": {"extraction": "last_number"},
            "prompts_per_step": 8,
            "samples_per_prompt": 8,
            "max_new_tokens": 5,
            "rollout": {"precision": rollout, "stop": ["\n"], "cache_tokens": 8192, "page_size": 16},
            "optimizer": {"lr": 2e-5, "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0},
            "steps": steps,
            "output": str(output),
            "checkpoint_at_end": False,
            "tensorboard": False,
        }
    )


def summary(records: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of a mode; rewards are means of its first and last steps, as many as the compared modes have."""
    rewards = [record["reward_mean"] for record in records]
    warm = records[1:] or records

    def mean(found: list[dict[str, Any]], key: str) -> float:
        return sum(record[key] for record in found) / len(found)

    return {
        "steps": len(records),
        "reward_first": sum(rewards[:COMPARED]) / len(rewards[:COMPARED]),
        "reward_last": sum(rewards[-COMPARED:]) / len(rewards[-COMPARED:]),
        "delta_logp_max": max(record["delta_logp_max"] for record in records),
        "delta_logp_mean": mean(records, "delta_logp_mean"),
        "rollout_tokens_per_second": mean(warm, "rollout_tokens_per_second"),
        "training_tokens_per_second": mean(warm, "training_tokens_per_second"),
    }


def print_table(figures: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    table.add_column("")
    for mode, (training, rollout) in MODES.items():
        shown = training if rollout == "same" else rollout
        table.add_column(f"{mode}\n{training} training\n{shown} rollout", justify="right")
    for label, key, form in (
        ("steps", "steps", "{:.0f}"),
        (f"mean reward, first {COMPARED} steps", "reward_first", "{:.3f}"),
        (f"mean reward, last {COMPARED} steps", "reward_last", "{:.3f}"),
        ("max |delta log p|", "delta_logp_max", "{:.3g}"),
        ("mean |delta log p|", "delta_logp_mean", "{:.3g}"),
        ("rollout (tokens drawn/s)", "rollout_tokens_per_second", "{:,.0f}"),
        ("training (tokens/s)", "training_tokens_per_second", "{:,.0f}"),
    ):
        table.add_row(label, *(form.format(figures[mode][key]) for mode in MODES))
    Console().print(table)
