"""Loss curves as PNG: seeds as thin lines, their mean bold, one colour and line style an arm."""

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
from matplotlib.ticker import EngFormatter

Rows = Sequence[Mapping[str, Any]]
Runs = Mapping[str, Sequence[Rows]]  # arm -> seed -> rows
Curve = dict[int, float]  # bytes seen -> bits per byte

STYLES = ("-", "--", "-.", ":")  # arms that agree lie on each other: each stays visible under the next


def plot_losses(path: Path, runs: Runs, title: str, unigram: float) -> None:
    """Bits per byte over the bytes seen: training, held out, and held out as the difference from the first arm."""
    curves = {
        column: {arm: [_curve(rows, column) for rows in seeds] for arm, seeds in runs.items()}
        for column in ("train_bpb", "val_bpb")
    }
    panels = 3 if len(runs) > 1 else 2
    figure, axes = plt.subplots(1, panels, figsize=(4.6 * panels, 4.2), layout="constrained")
    for panel, column, label in zip(axes, curves, ("training", "held out"), strict=False):
        _draw(panel, curves[column])
        panel.axhline(unigram, color="grey", linestyle=":", linewidth=1)
        panel.annotate("unigram entropy", (1, unigram), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        panel.set(title=label, xlabel="bytes seen", ylabel="bits per byte")
    if panels == 3:
        _draw(axes[2], _differences(curves["val_bpb"]))
        axes[2].set(title=f"held out, minus {next(iter(runs))} of the same seed", xlabel="bytes seen")
    axes[0].legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _curve(rows: Rows, column: str) -> Curve:
    return {row["tokens"]: row[column] for row in rows if column in row}


def _differences(arms: Mapping[str, Sequence[Curve]]) -> dict[str, list[Curve]]:
    reference = next(iter(arms.values()))
    return {
        arm: [{at: mine[at] - base[at] for at in mine} for mine, base in zip(seeds, reference, strict=True)]
        for arm, seeds in arms.items()
    }


def _draw(panel: Axes, arms: Mapping[str, Sequence[Curve]]) -> None:
    for index, (arm, seeds) in enumerate(arms.items()):
        values: dict[int, list[float]] = defaultdict(list)
        for curve in seeds:
            panel.plot(list(curve), list(curve.values()), color=f"C{index}", linewidth=0.7, alpha=0.5)
            for at, value in curve.items():
                values[at].append(value)
        mean = [fmean(values[at]) for at in sorted(values)]
        style = STYLES[index % len(STYLES)]
        panel.plot(sorted(values), mean, style, color=f"C{index}", linewidth=2.2, label=f"{arm}, mean of {len(seeds)}")
    panel.xaxis.set_major_formatter(EngFormatter(sep=""))
    panel.grid(alpha=0.3)
