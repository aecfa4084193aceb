"""What a run leaves behind: a line per step on the terminal, ``log.jsonl``, TensorBoard events, the loss curve."""

import json
import sys
from pathlib import Path
from typing import Any

import torch


def memory_bytes(device: torch.device) -> int:
    """Peak memory so far: allocated on a GPU, resident on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class RunLog:
    """Writes the records of one run into ``output``; on a resume, records after ``start_step`` are dropped first.

    A record is a dict with ``step`` and numbers. ``quiet`` (every process but the first) writes nothing.
    """

    def __init__(
        self, output: str | Path, steps: int, start_step: int, *, tensorboard: bool, quiet: bool, name: str = ""
    ) -> None:
        self.path = Path(output) / "log.jsonl"
        self.name = name
        self._steps = steps
        self._file = self._events = self._bar = None
        if quiet:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [record for record in read_log(self.path) if record["step"] <= start_step] if start_step else []
        self._file = open(self.path, "w", buffering=1)  # noqa: SIM115
        for record in kept:
            self._file.write(json.dumps(record) + "\n")
        if tensorboard:
            self._events = _tensorboard(self.path.parent / "tensorboard", start_step)
        if sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=steps, initial=start_step, desc=name or "train", unit="step", dynamic_ncols=True)

    def write(self, record: dict[str, Any]) -> None:
        """One record into all logs."""
        if self._file is None:
            return
        self._file.write(json.dumps(record) + "\n")
        if self._events is not None:
            for key, value in record.items():
                if key != "step":
                    self._events.add_scalar(f"train/{key}", value, record["step"])
        if "loss" in record:
            figures = _figures(record)
            if self._bar is not None:
                self._bar.set_postfix_str(figures, refresh=False)
                self._bar.update(record["step"] - self._bar.n)
            else:
                self.say(f"step {record['step']}/{self._steps}: {figures}")
        elif "held_out_loss" in record:
            self.say(f"step {record['step']}/{self._steps}: held-out loss {record['held_out_loss']:.4f}")

    def say(self, text: str) -> None:
        """A line on the terminal, above the progress bar."""
        if self._file is None:
            return
        line = f"{self.name + ': ' if self.name else ''}{text}"
        if self._bar is not None:
            self._bar.write(line, file=sys.stderr)
        else:
            print(line, file=sys.stderr, flush=True)

    def close(self) -> None:
        for part in (self._bar, self._events, self._file):
            if part is not None:
                part.close()


def _figures(record: dict[str, Any]) -> str:
    """What the terminal shows of an optimizer step: of reinforcement learning the reward and how far rollout and
    training are apart."""
    memory = f"{record['memory_bytes'] / 1e9:.2f} GB"
    if "images_per_second" in record:
        return f"loss {record['loss']:.4f}, {record['images_per_second']:,.1f} images/s, {memory}"
    if "reward_mean" not in record:
        return f"loss {record['loss']:.4f}, {record['tokens_per_second']:,.0f} tokens/s, {memory}"
    speeds = (record["rollout_tokens_per_second"], record["training_tokens_per_second"])
    return (
        f"reward {record['reward_mean']:.3f}, max |delta log p| {record.get('delta_logp_max', 0.0):.3g}, "
        f"{record['length_mean']:.1f} tokens, {speeds[0]:,.0f} drawn and {speeds[1]:,.0f} trained tokens/s, {memory}"
    )


def _tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=start_step + 1)


def read_log(path: str | Path) -> list[dict[str, Any]]:
    """Records of a log.jsonl; a last line cut off by a crash is left out."""
    records: list[dict[str, Any]] = []
    if Path(path).exists():
        for line in Path(path).read_text().splitlines():
            try:
                records.append(json.loads(line))
            except ValueError:
                break
    return records


def plot_curves(
    path: str | Path,
    runs: dict[str, list[dict[str, Any]]],
    title: str,
    baseline: str | None = None,
    unit: str = "nats per token",
) -> None:
    """PNG of training loss (thin) and held-out loss (marked) against the step, for each named run's records.

    baseline: a run; a panel below draws how far the others' losses lie above its own, where both hold a step.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5 if baseline is None else 7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    heights = [1] if baseline is None else [2, 1]
    upper, *lower = figure.subplots(len(heights), sharex=True, squeeze=False, height_ratios=heights)[:, 0]
    styles = {
        "loss": ("training", {"linewidth": 0.9, "alpha": 0.55}),
        "held_out_loss": ("held out", {"linewidth": 1.8, "marker": "o", "markersize": 4}),
    }
    curves = {(name, key): _curve(records, key) for name, records in runs.items() for key in styles}
    for number, name in enumerate(runs):
        for key, (label, style) in styles.items():
            curve = curves[name, key]
            if curve:
                upper.plot(*zip(*curve.items(), strict=True), color=f"C{number}", label=f"{name}, {label}", **style)
            known = curves[baseline, key] if baseline not in (None, name) else {}
            gap = {step: loss - known[step] for step, loss in curve.items() if step in known}
            if gap:
                lower[0].plot(*zip(*gap.items(), strict=True), color=f"C{number}", **style)
    upper.set_ylabel(f"loss ({unit})")
    upper.set_title(title)
    for axes in lower:
        axes.axhline(0, color="C0", linewidth=1)
        axes.set_ylabel(f"minus {baseline}'s (nats)")
    for axes in (upper, *lower):
        axes.grid(alpha=0.25)
    (lower or [upper])[-1].set_xlabel("optimizer step")
    if upper.has_data():
        upper.legend()
    figure.savefig(path)


def _curve(records: list[dict[str, Any]], key: str) -> dict[int, float]:
    return {record["step"]: record[key] for record in records if key in record}
