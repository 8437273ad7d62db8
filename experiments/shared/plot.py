"""Loss curves as PNG: seeds as thin lines, their mean bold, one colour an arm."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

Runs = Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]  # arm -> seed -> rows


def plot_losses(path: Path, runs: Runs, title: str, unigram: float | None = None) -> None:
    """Training and held-out bits per byte over the bytes seen, side by side."""
    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained", sharey=True)
    for axes, column, label in zip(panels, ("train_bpb", "val_bpb"), ("training", "held out"), strict=True):
        _panel(axes, runs, column)
        if unigram is not None:
            axes.axhline(unigram, color="grey", linestyle=":", linewidth=1, label="unigram entropy")
        axes.set(xlabel="bytes seen", title=label)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("bits per byte")
    panels[1].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _panel(axes: Axes, runs: Runs, column: str) -> None:
    for index, (arm, seeds) in enumerate(runs.items()):
        values: dict[int, list[float]] = defaultdict(list)
        for rows in seeds:
            points = [(row["tokens"], row[column]) for row in rows if column in row]
            axes.plot(*zip(*points, strict=True), color=f"C{index}", linewidth=0.7, alpha=0.5)
            for tokens, value in points:
                values[tokens].append(value)
        means = [fmean(values[tokens]) for tokens in sorted(values)]
        axes.plot(sorted(values), means, color=f"C{index}", linewidth=2.2, label=f"{arm} (mean of {len(seeds)})")
