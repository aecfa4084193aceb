"""The picture of reinforcement learning runs: reward, and how far rollout and training are apart."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SMOOTHED = 5  # steps of the mean that is drawn over single steps


def plot_rewards(path: str | Path, runs: dict[str, list[dict[str, Any]]], title: str = "") -> None:
    """PNG of each named run's records: mean reward of a step (thin) and of the last few (thick) above, the largest
    difference between a token's log-probability in rollout and in training below."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    upper, lower = figure.subplots(2, sharex=True, height_ratios=[2, 1])
    for number, (name, records) in enumerate(runs.items()):
        records = [record for record in records if "reward_mean" in record]
        steps = [record["step"] for record in records]
        rewards = [record["reward_mean"] for record in records]
        means = [
            sum(part) / len(part) for part in (rewards[max(0, i - SMOOTHED + 1) : i + 1] for i in range(len(rewards)))
        ]
        apart = [record.get("delta_logp_max", 0.0) for record in records]
        upper.plot(steps, rewards, color=f"C{number}", linewidth=0.8, alpha=0.5)
        upper.plot(steps, means, color=f"C{number}", linewidth=1.8, label=name)
        lower.plot(steps, apart, color=f"C{number}", linewidth=1.5, marker="o", markersize=3)
    upper.set_ylabel(f"mean reward (thick: of {SMOOTHED} steps)")
    upper.set_title(title)
    lower.set_ylabel("max |log p, rollout - training| (nats)")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
    if upper.has_data():
        upper.legend()
    figure.savefig(path)
