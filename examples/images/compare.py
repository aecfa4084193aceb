"""SANA's claims on real pictures: FP8 against bf16, depth growth, depth pruning, best-of-N; figures, curves, pictures.

    python compare.py cifar10.yaml --data cifar10.zip --output out

PICTURES is what `eightfold sana train` reads: a folder for each class or a .zip of that, CIFAR's python or binary
batches, .npz. Leaves summary.json, curves.png and (of the part frechet) pictures.png in the output folder and prints a
table. The same command again skips what is done, and goes on with what was cut off.
"""

import argparse
import json
import platform
import signal
import sys
import time
from pathlib import Path

import torch
from experiment import CANDIDATES, Experiment, Settings

from eightfold.train import sections
from eightfold.train.image.samples import write_sheet
from eightfold.train.interrupt import Interrupted

PARTS = {
    "precision": Experiment.precision,
    "frechet": Experiment.frechet,
    "growth": Experiment.growth,
    "pruning": Experiment.pruning,
    "best_of": Experiment.best_of,
}
SHOWN = 10  # classes, at most, of pictures.png
_WIDE = 64  # pixels of a picture there, at least


def run(experiment: Experiment, parts: list[str]) -> dict:
    """The summary, with those parts and with what it had before."""
    file = experiment.output / "summary.json"
    summary = json.loads(file.read_text()) if file.exists() else {}
    for name in parts:
        if name in summary:
            print(f"{name}: done before", flush=True)
            continue
        begin = time.perf_counter()
        found = PARTS[name](experiment)
        seconds = time.perf_counter() - begin
        device = torch.cuda.get_device_name() if experiment.device.type == "cuda" else f"CPU, {platform.machine()}"
        summary[name] = {"seconds": seconds, "device": device, "torch": torch.__version__, "found": found}
        work = file.with_suffix(".part")
        work.write_text(json.dumps(summary, indent=1) + "\n")
        work.rename(file)
        summary = json.loads(file.read_text())  # as a later call finds it
        print(f"{name}: {seconds:.0f} s", flush=True)
    return {name: summary[name]["found"] for name in PARTS if name in summary}


def rows(found: dict) -> list[tuple[str, str, str, str]]:
    """(part, figure, value, what the issue of SANA in FP8 wants or the papers say)."""
    lines = []
    for number, (name, each) in enumerate(found.get("precision", {}).items()):
        speed = f"{each['images_per_second']:,.0f} images/s, {each['memory_gb']:.2f} GB"
        lines.append(("precision", f"{name}: held-out loss", f"{each['loss']:.5f} ({speed})", ""))
        if number:
            lines.append(
                ("precision", f"{name}: against the first", f"{each['loss_against_first']:+.2%}", "within 1 %")
            )
    if "frechet" in found:
        part = found["frechet"]
        accuracies = f"{part['judge_accuracy']:.1%}, {part['control_accuracy']:.1%}"
        lines.append(("frechet", "accuracy of both classifiers", accuracies, ""))
        lines.append(("frechet", f"{part['real']} real against {part['real']} real", f"{part['floor']:.4f}", "floor"))
        for number, (name, each) in enumerate(part["modes"].items()):
            what = f"{name}: {part['generated']} against {part['real']} real"
            lines.append(("frechet", what, f"{each['distance']:.4f}", ""))
            if number:
                lines.append(("frechet", f"{name}: against the first", f"{each['against_first']:+.2%}", "within 5 %"))
    if "growth" in found:
        part, layers = found["growth"], "{} to {}".format(*found["growth"]["layers"])
        lines.append(("growth", "scratch: held-out loss", f"{part['scratch_loss']:.5f}", ""))
        lines.append(("growth", f"{layers} blocks: held-out loss", f"{part['grown_loss']:.5f}", "not above scratch's"))
        reached, after = (_percent(part[key], "never") for key in ("share_of_steps", "share_of_steps_after_growth"))
        lines.append(("growth", "share of the steps to scratch's loss", reached, "below 100 %"))
        lines.append(("growth", "of which with the whole depth", after, "paper: 40 %"))
    if "pruning" in found:
        part = found["pruning"]
        lines.append(("pruning", "whole model: held-out loss", f"{part['whole_loss']:.5f}", ""))
        for name, each in part["choices"].items():
            losses = f"{each['pruned_loss']:.5f}, tuned {each['tuned_loss']:.5f}"
            first = name == "importance"
            lines.append(("pruning", f"{name}: held-out loss", losses, "" if first else "tuned: above importance's"))
            recovered = _percent(each["recovered"], "no rise")
            lines.append(("pruning", f"{name}: of the rise recovered", recovered, "75 % or more" if first else ""))
    for candidates, each in found.get("best_of", {}).items():
        value = f"{each['judge_score']:.4f} (other's accuracy {each['control_accuracy']:.1%})"
        wanted = "" if candidates == str(CANDIDATES[0]) else "above fewer candidates"
        lines.append(("best of", f"{candidates}: judge's mean score", value, wanted))
    return lines


def _percent(share: float | None, none: str) -> str:
    return none if share is None else f"{share:.1%}"


def print_table(lines: list[tuple[str, str, str, str]]) -> None:
    from rich.console import Console
    from rich.table import Table

    shown, last = Table("part", "figure", "value", "wanted"), None
    for part, *others in lines:
        shown.add_row(part if part != last else "", *others)
        last = part
    Console(width=None if sys.stdout.isatty() else 120).print(shown)


def plot(path: Path, found: dict) -> None:
    """PNG of four panels: precision, growth, pruning, best-of-N; those of parts that are missing stay empty."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    (precision, growth), (pruning, best) = figure.subplots(2, 2)
    for name, each in found.get("precision", {}).items():
        _curve(precision, each["curve"], name)
    precision.set(title="the same seed and data in each precision", yscale="log")
    if "growth" in found:
        part = found["growth"]
        _curve(growth, part["scratch_curve"], "from scratch")
        small, large = part["layers"]
        _curve(growth, part["half_curve"], f"{small} blocks")
        _curve(growth, part["curve"], f"grown to {large} blocks")
        growth.axhline(part["scratch_loss"], color="C0", linewidth=0.8, linestyle=":")
    growth.set(title="depth growth", yscale="log")
    if "pruning" in found:
        part = found["pruning"]
        for number, (name, each) in enumerate(part["choices"].items()):
            label = name.removesuffix("-0") if number < 3 else None  # one for all random choices
            _curve(pruning, each["curve"], label, f"C{min(number, 2)}")
        pruning.axhline(part["whole_loss"], color="black", linewidth=0.8, linestyle=":", label="whole model")
    pruning.set(title="half of the blocks, and tuning", yscale="log")
    for axes in (precision, growth, pruning):
        axes.set(xlabel="optimizer step", ylabel="held-out flow loss")
    if "best_of" in found:
        counts = [int(count) for count in found["best_of"]]
        for key, label in (("judge_score", "judge's mean score"), ("control_accuracy", "other classifier's accuracy")):
            best.plot(counts, [each[key] for each in found["best_of"].values()], marker="o", label=label)
        best.set_xscale("log", base=2)
        best.set_xticks(counts, [str(count) for count in counts])
    best.set(title="best of N pictures", xlabel="N", ylabel="probability, accuracy")
    for axes in (precision, growth, pruning, best):
        axes.grid(alpha=0.25, which="both")
        if axes.has_data():
            axes.legend(fontsize=8)
    figure.savefig(path)


def _curve(axes, curve: dict[str, float], label: str | None, color: str | None = None) -> None:
    steps = sorted(curve, key=int)
    style = {"marker": "o", "markersize": 3, "linewidth": 1.4, "color": color, "label": label}
    axes.plot([int(step) for step in steps], [curve[step] for step in steps], **style)


def draw_pictures(path: Path, experiment: Experiment, found: dict) -> None:
    """PNG: a column for each class; rows of held-out pictures, of each mode from the same noise, of the best ones."""
    data = experiment.data
    columns, bucket = range(min(SHOWN, len(data.classes))), data.held_out[0]
    rows = {}
    if all(label in bucket.labels for label in columns):
        rows["real"] = bucket.data[[bucket.labels.index(label) for label in columns], 0]
    for mode in experiment.settings.modes:
        pictures = experiment.pictures(mode)
        for number in (0, 1):
            name = mode if number == 0 else f"{mode}, another"
            rows[name] = pictures[[label * experiment.per_class + number for label in columns]]
    for candidates, each in found.get("best_of", {}).items():
        if int(candidates) > 1:
            rows[f"best of {candidates}"] = experiment.pictures(experiment.base)[each["winners"][: len(columns)]]
    shown = {name: pictures.permute(0, 2, 3, 1).numpy() for name, pictures in rows.items()}
    classes = ", ".join(data.classes[label] for label in columns)
    write_sheet(path, shown, max(1, _WIDE // data.held_out[0].data.shape[-1]), title=classes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="cifar10.yaml, tiny.yaml or one like them")
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help="e.g. train.steps=1000")
    parser.add_argument("--data", required=True, metavar="PICTURES")
    parser.add_argument("--output", type=Path, default=Path("image-compare"))
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    args = parser.parse_intermixed_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        overrides = [*args.overrides, f"train.data.path={json.dumps(args.data)}"]
        experiment = Experiment(sections.load(Settings, args.config, overrides), args.output)
        found = run(experiment, [part for part in PARTS if part in args.parts])
        written = ["summary.json", "curves.png"]
        plot(args.output / "curves.png", found)
        if "frechet" in found:
            draw_pictures(args.output / "pictures.png", experiment, found)
            written.append("pictures.png")
    except (ValueError, OSError) as error:
        print(f"compare: {error}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Interrupted):
        print("compare: interrupted; the same command goes on", file=sys.stderr)
        return 130
    print_table(rows(found))
    print(f"{args.output}: {', '.join(written)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
