"""Plots of a question's results: held-out curves of its arms, and points with intervals."""

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

from .answer import best_rate, finals
from .results_file import config_of

STYLES = ("-", "--", "-.", ":")


def plot_curves(path: Path, content: Mapping[str, Any], arms: Sequence[str], reference: str) -> None:
    """Held-out bits per byte over steps, each arm at its best learning rate, and minus `reference` of the same seed."""
    curves = {arm: found for arm, found in _best_curves(content).items() if arm in arms}
    if not curves:
        return
    rates = {rate for rate, _ in curves.values()}
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for index, arm in enumerate(arm for arm in arms if arm in curves):
        color, style = f"C{index % 10}", STYLES[index // 10 % len(STYLES)]
        rate, seeds = curves[arm]
        label = arm if len(rates) == 1 else f"{arm} (lr {rate:g})"
        _draw(left, list(seeds.values()), color, style, label)
        base = curves[reference][1] if reference in curves else {}
        pairs = [_minus(seeds[seed], base[seed]) for seed in seeds if seed in base]
        if pairs:
            _draw(right, pairs, color, style, arm)
    last = [list(curve.values())[-1] for _, seeds in curves.values() for curve in seeds.values() if curve]
    left.set(
        xlabel="step", ylabel="held-out bits per byte", ylim=(min(last) - 0.05, sorted(last)[len(last) // 2] + 1.0)
    )
    right.set(xlabel="step", title=f"minus {reference}, same seed")
    left.legend(fontsize=8)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    save(figure, path)


def rate_axis(axes: Axes, rates: Sequence[float]) -> None:
    """A logarithmic x axis with a tick at each learning rate and nowhere else."""
    axes.set(xscale="log", xlabel="learning rate")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.grid(alpha=0.3)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _best_curves(content: Mapping[str, Any]) -> dict[str, tuple[float, dict[int, dict[int, float]]]]:
    """arm -> (its best learning rate, seed -> step -> bits per byte)."""
    best = {arm: best_rate(rates) for arm, rates in finals(content).items()}
    found: dict[str, tuple[float, dict[int, dict[int, float]]]] = {arm: (rate, {}) for arm, rate in best.items()}
    for run in content["runs"]:
        config = config_of(content, run)
        if config["lr"] == best[run["arm"]]:
            curve = dict(zip(run["curves"]["val_step"], run["curves"]["val_bpb"], strict=True))
            found[run["arm"]][1][config["seed"]] = curve
    return found


def _minus(one: Mapping[int, float], other: Mapping[int, float]) -> dict[int, float]:
    return {step: one[step] - other[step] for step in one if step in other}


def _draw(axes: Axes, curves: Sequence[Mapping[int, float]], color: str, style: str, label: str) -> None:
    values: dict[int, list[float]] = defaultdict(list)
    for curve in curves:
        axes.plot(list(curve), list(curve.values()), color=color, linewidth=0.7, alpha=0.4)
        for step, value in curve.items():
            values[step].append(value)
    steps = sorted(values)
    axes.plot(steps, [fmean(values[step]) for step in steps], style, color=color, linewidth=2, label=label)
