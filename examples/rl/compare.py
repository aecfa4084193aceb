"""One configuration in several modes of precision and with several seeds: curves with their spread, and a table.

    python examples/rl/compare.py examples/rl/products.yaml steps=50 --seeds 0 1 2 --jobs 3 --output out

Modes: bf16 (training and rollout in bf16), mixed (bf16 training, FP8 rollout), unified (FP8 both). Each run is a
process with a folder of its own, OUTPUT/MODE-SEED, that holds its config.yaml, log.jsonl and output.txt. The same
command again skips runs that have ended and goes on with the others, from their checkpoints. All modes take the same
optimizer: where the configuration leaves it open, torch's AdamW.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from eightfold.train import checkpoint
from eightfold.train.report import read_log
from eightfold.train.rl.config import RlConfig, load_rl_config
from eightfold.train.rl.demo import MODES

LAST = 10  # steps at the end whose mean reward is compared
KEPT = {  # of a step's record, under the names of the summary
    "reward_mean": "reward",
    "delta_logp_max": "delta_logp_max",
    "delta_logp_mean": "delta_logp_mean",
    "rollout_kl": "k3",
    "length_mean": "length",
    "entropy": "entropy",
    "tokens_per_second": "tokens_per_second",
}


@dataclass(frozen=True, eq=False)
class Run:
    mode: str
    seed: int
    folder: Path
    config: RlConfig

    @property
    def name(self) -> str:
        return self.folder.name

    def records(self) -> list[dict]:
        return read_log(self.folder / "log.jsonl")

    def ended(self) -> bool:
        records = self.records()
        return bool(records) and records[-1]["step"] >= self.config.steps

    def prepare(self) -> None:
        """Writes config.yaml. ValueError where the folder holds a run of other settings."""
        file, text = self.folder / "config.yaml", yaml.safe_dump(self.config.model_dump(mode="json"))
        if file.exists() and file.read_text() != text:
            raise ValueError(f"{self.folder}: holds a run of other settings; choose another --output")
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    def start(self, threads: int) -> subprocess.Popen:
        command = [sys.executable, "-m", "eightfold.cli", "rl", str(self.folder / "config.yaml")]
        if checkpoint.complete(self.folder):
            command.append("resume=latest")
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        with open(self.folder / "output.txt", "a") as out:
            # A session of its own: an interrupt from the terminal reaches it once, through `run_all`.
            return subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)


def plan(config: str, overrides: list[str], output: Path, modes: Sequence[str], seeds: Sequence[int]) -> list[Run]:
    """All runs, those of a seed side by side. ValueError as `load_rl_config`'s."""
    runs = []
    for seed in seeds:
        for mode in modes:
            training, rollout = MODES[mode]
            folder = output / f"{mode}-{seed}"
            own = [f"model.precision={training}", f"rollout.precision={rollout}", f"seed={seed}"]
            own += ["tensorboard=false", "checkpoint_at_end=false", "resume=null"]
            loaded = load_rl_config(config, [*overrides, *own])
            if loaded.optimizer.name == "auto":
                loaded.optimizer.name = "adamw"
            loaded.output = str(folder)
            runs.append(Run(mode, seed, folder, loaded))
    return runs


def run_all(runs: Sequence[Run], jobs: int) -> list[str]:
    """Runs what has not ended, ``jobs`` at once; a line for each that failed. KeyboardInterrupt once all have stopped,
    with checkpoints."""
    waiting, running, failed = [run for run in runs if not run.ended()], {}, []
    threads = max(1, (os.cpu_count() or 1) // jobs)
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop(0)
                running[run] = (run.start(threads), time.perf_counter())
                print(f"{run.name}: started", flush=True)
            for run, (process, begin) in list(running.items()):
                if process.poll() is None:
                    continue
                del running[run]
                if process.returncode == 0 and run.ended():
                    shutil.rmtree(run.folder / "checkpoints", ignore_errors=True)
                    print(f"{run.name}: ended after {time.perf_counter() - begin:.0f} s", flush=True)
                else:
                    failed.append(f"{run.name}: failed: {_last_line(run.folder / 'output.txt')}")
                    print(failed[-1], flush=True)
            time.sleep(0.1)
    except BaseException:
        for process, _ in running.values():
            process.send_signal(signal.SIGINT)
        for process, _ in running.values():
            process.wait()
        raise
    return failed


def _last_line(file: Path) -> str:
    lines = file.read_text().strip().splitlines()
    return lines[-1] if lines else "no output"


def rows(runs: Sequence[Run]) -> list[dict]:
    """The summary's lines: mode, seed, step and what is ``KEPT``, in four digits."""
    return [
        {"mode": run.mode, "seed": run.seed, "step": record["step"]}
        | {short: float(f"{record[key]:.4g}") for key, short in KEPT.items() if key in record}
        for run in runs
        for record in run.records()
    ]


def figures(found: list[dict], modes: Sequence[str]) -> dict[str, dict[str, float]]:
    """Of each mode, over its seeds: reward of the first step, which nothing has been learned for, and of the last
    steps (mean and standard deviation of the seeds' means), the mismatch of all steps."""
    table = {}
    for mode in modes:
        of_mode = [row for row in found if row["mode"] == mode]
        if not of_mode:
            continue
        steps = max(row["step"] for row in of_mode)
        seeds = sorted({row["seed"] for row in of_mode})
        last = [
            statistics.fmean(r["reward"] for r in of_mode if r["seed"] == seed and r["step"] > steps - LAST)
            for seed in seeds
        ]
        table[mode] = {
            "seeds": len(seeds),
            "steps": steps,
            "reward_start": statistics.fmean(row["reward"] for row in of_mode if row["step"] == 1),
            "reward_last": statistics.fmean(last),
            "reward_last_std": statistics.stdev(last) if len(last) > 1 else None,
            "delta_logp_max": max(row.get("delta_logp_max", 0.0) for row in of_mode),
        }
        for key in ("delta_logp_mean", "k3", "length", "tokens_per_second"):
            table[mode][key] = statistics.fmean(row.get(key, 0.0) for row in of_mode)
    return table


def plot(path: Path, found: list[dict], modes: Sequence[str], title: str) -> None:
    """PNG: reward of each mode, mean of the seeds and a standard deviation on both sides; the mismatch below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[3, 2])
    for number, mode in enumerate(modes):
        by_step: dict[int, list[dict]] = {}
        for row in found:
            if row["mode"] == mode:
                by_step.setdefault(row["step"], []).append(row)
        steps = sorted(by_step)
        rewards = [[row["reward"] for row in by_step[step]] for step in steps]
        means = [statistics.fmean(values) for values in rewards]
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in rewards]
        style = {"color": f"C{number}", "linewidth": 1.6}
        upper.plot(steps, means, label=mode, **style)
        low, high = ([m + sign * s for m, s in zip(means, spread, strict=True)] for sign in (-1, 1))
        upper.fill_between(steps, low, high, color=style["color"], alpha=0.2, linewidth=0)
        for key, dashes in (("delta_logp_max", "-"), ("delta_logp_mean", "--")):
            take = max if key.endswith("max") else statistics.fmean
            lower.plot(steps, [take([row.get(key, 0.0) for row in by_step[s]]) for s in steps], dashes, **style)
    upper.set_ylabel("mean reward (band: one standard deviation over seeds)")
    upper.set_title(title)
    lower.set_yscale("symlog", linthresh=1e-4)  # a mismatch of 0 has its place
    lower.set_ylabel("|log p, rollout - training| (nats)\nlargest, and mean (dashed)")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
    upper.legend()
    figure.savefig(path)


def print_table(table: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown = Table(
        "mode", "seeds", "steps", "reward, step 1", f"last {LAST} steps", "max, mean |delta log p|", "tokens/s"
    )
    for mode, found in table.items():
        spread = "" if found["reward_last_std"] is None else f" ± {found['reward_last_std']:.3f}"
        shown.add_row(
            mode,
            str(found["seeds"]),
            str(found["steps"]),
            f"{found['reward_start']:.3f}",
            f"{found['reward_last']:.3f}{spread}",
            f"{found['delta_logp_max']:.3g}, {found['delta_logp_mean']:.3g}",
            f"{found['tokens_per_second']:,.0f}",
        )
    Console(width=None if sys.stdout.isatty() else 120).print(shown)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="YAML file, as of `eightfold rl`")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="e.g. steps=50")
    parser.add_argument("--output", type=Path, default=Path("rl-compare"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--modes", nargs="+", choices=sorted(MODES), default=["bf16", "mixed", "unified"])
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    args = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.jobs < 1:
            raise ValueError(f"--jobs: expected 1 or more, got {args.jobs}")
        runs = plan(args.config, args.overrides, args.output, args.modes, args.seeds)
        runs[0].config.model.resolved()  # fetched once, not by every run
        for run in runs:
            run.prepare()
        failed = run_all(runs, args.jobs)
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("compare: interrupted; the same command goes on", file=sys.stderr)
        return 130
    ended = [run for run in runs if run.ended()]
    if not ended:
        return 1
    found = rows(ended)
    table = figures(found, args.modes)
    (args.output / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    settings = {"config": runs[0].config.model_dump(mode="json"), "modes": table}
    settings["config"] = {key: value for key, value in settings["config"].items() if key not in ("output", "seed")}
    (args.output / "summary.json").write_text(json.dumps(settings, indent=1) + "\n")
    plot(args.output / "rewards.png", found, args.modes, f"{Path(args.config).stem}, {len(args.seeds)} seeds")
    print_table(table)
    print(f"steps.jsonl, summary.json and rewards.png are in {args.output}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
