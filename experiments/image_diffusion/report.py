"""Tables and plots of all runs in a folder: summary.md, quality.png, levels.png, samples.png."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ..shared.metrics import table
from ..shared.waves import Result, by_arm, interval, paired, read_results
from .config import load_arms
from .data import SIDE

METRICS = ("held-out loss", "Frechet, held-out", "Frechet, training", "pixel Frechet, held-out", "class accuracy")
SCORES = dict(zip(METRICS[1:], ("fd_test", "fd_train", "pixel_fd_test", "class_accuracy"), strict=True))
DIGITS = {"held-out loss": 5, "class accuracy": 4}
SHOWN = 20  # images an arm in samples.png


def write_report(folder: Path) -> str:
    """The summary of the runs in `folder`, written there with the plots. ValueError if there is no run."""
    results = read_results(folder)
    if not results:
        raise ValueError(f"{folder}: expected results of runs, found none")
    if any(abs(run["baseline"]["fd_test"] - results[0]["baseline"]["fd_test"]) > 1e-3 for run in results):
        raise ValueError(f"{folder}: expected runs whose distances are in the same features, got different baselines")
    arms = by_arm(results, load_arms())
    parts = [_heading(results), _table(arms, results[0]["baseline"]), _differences(arms)]
    summary = "\n\n".join(parts) + "\n"
    (folder / "summary.md").write_text(summary, encoding="utf-8")
    _plot_quality(folder / "quality.png", arms, results[0]["baseline"])
    _plot_levels(folder / "levels.png", arms)
    _plot_samples(folder / "samples.png", arms)
    return summary


def measure(evaluation: Result, metric: str) -> float:
    """Of one evaluation of one run: the mean over noise levels, or over sample seeds."""
    if metric == "held-out loss":
        return fmean(evaluation["level_losses"])
    return fmean(score[SCORES[metric]] for score in evaluation["scores"])


def _final(runs: Sequence[Result], metric: str) -> list[float]:
    return [measure(run["evaluations"][-1], metric) for run in runs]


def _heading(results: Sequence[Result]) -> str:
    config, environment = results[0]["config"], results[0]["environment"]
    seeds = sorted({run["seed"] for run in results})
    return (
        f"{results[0]['parameters']:,} parameters, {config['steps']} steps of {config['batch_size']} images, "
        f"{config['sample_seeds']} sample seeds a run; training seeds {seeds[0]} to {seeds[-1]}; "
        f"{environment['gpu'] or 'CPU'}, torch {environment['torch']}. +- is a 95 % interval over training seeds."
    )


def _table(arms: dict[str, list[Result]], baseline: dict[str, float]) -> str:
    rows = [
        {
            "attention": name,
            "seeds": str(len(runs)),
            **{m: interval(_final(runs, m), DIGITS.get(m, 3)) for m in METRICS},
        }
        for name, runs in arms.items()
    ]
    real = {m: f"{baseline[SCORES[m]]:.{DIGITS.get(m, 3)}f}" for m in METRICS[1:]}
    return table([*rows, {"attention": "the training images", "seeds": "-", "held-out loss": "-", **real}])


def _differences(arms: dict[str, list[Result]]) -> str:
    (reference, held_to), *others = arms.items()
    rows = [
        {f"minus {reference}, same seed": name, **{m: _difference(runs, held_to, m) for m in METRICS}}
        for name, runs in others
    ]
    return table(rows) if rows else ""


def _difference(runs: Sequence[Result], reference: Sequence[Result], metric: str) -> str:
    pairs = paired(runs, reference)
    differences = [
        measure(one["evaluations"][-1], metric) - measure(other["evaluations"][-1], metric) for one, other in pairs
    ]
    return interval(differences, DIGITS.get(metric, 3), sign=True) if differences else "-"


def _plot_quality(path: Path, arms: dict[str, list[Result]], baseline: dict[str, float]) -> None:
    """Loss and Frechet distance over training, and the one against the other at the end, a point a run."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.3), layout="constrained")
    for index, (name, runs) in enumerate(arms.items()):
        for panel, metric in zip(axes[:2], METRICS[:2], strict=True):
            _draw_over_steps(panel, runs, metric, f"C{index}", name)
        losses, distances = (_final(runs, metric) for metric in METRICS[:2])
        axes[2].plot(losses, distances, "o", color=f"C{index}", label=name)
    for panel, metric in zip(axes[:2], METRICS[:2], strict=True):
        panel.set(xlabel="steps", ylabel=metric, yscale="log")
    axes[2].set(xlabel=METRICS[0], ylabel=METRICS[1], title="each run at the end")
    for panel in axes[1:]:
        panel.axhline(baseline["fd_test"], color="grey", linestyle=":", label="the training images")
    axes[2].legend(fontsize=8)
    _finish(figure, axes, path)


def _draw_over_steps(panel: Axes, runs: Sequence[Result], metric: str, color: str, name: str) -> None:
    steps = [evaluation["step"] for evaluation in runs[0]["evaluations"]]
    curves = [[measure(evaluation, metric) for evaluation in run["evaluations"]] for run in runs]
    for curve in curves:
        panel.plot(steps, curve, color=color, linewidth=0.6, alpha=0.5)
    panel.plot(steps, [fmean(values) for values in zip(*curves, strict=True)], color=color, linewidth=2, label=name)


def _plot_levels(path: Path, arms: dict[str, list[Result]]) -> None:
    """The held-out loss by noise level, and each arm's difference from the first in per cent of it."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    first = next(iter(arms.values()))
    reference = _by_level(first)
    stride = first[0]["config"]["noise_levels"] // len(reference)
    levels = range(stride // 2, stride * len(reference), stride)
    for index, (name, runs) in enumerate(arms.items()):
        axes[0].plot(levels, _by_level(runs), color=f"C{index}", label=name)
        for run in runs:
            difference = [
                100 * (mine / other - 1)
                for mine, other in zip(run["evaluations"][-1]["level_losses"], reference, strict=True)
            ]
            axes[1].plot(levels, difference, color=f"C{index}", linewidth=0.8, alpha=0.7)
    axes[0].set(xlabel="noise level", ylabel="held-out loss", yscale="log")
    axes[1].set(xlabel="noise level", ylabel=f"% above the mean of {next(iter(arms))}, a line a run")
    axes[0].legend(fontsize=8)
    _finish(figure, axes, path)


def _by_level(runs: Sequence[Result]) -> list[float]:
    return [fmean(values) for values in zip(*(run["evaluations"][-1]["level_losses"] for run in runs), strict=True)]


def _plot_samples(path: Path, arms: dict[str, list[Result]]) -> None:
    """A row an arm: samples of its first seed, all from the same noise and of the same classes."""
    figure, axes = plt.subplots(len(arms), 1, figsize=(10, 0.8 * len(arms)), layout="constrained", squeeze=False)
    for panel, (name, runs) in zip(axes[:, 0], arms.items(), strict=True):
        images = [_image(text) for text in runs[0]["grid"][:SHOWN]]
        panel.imshow([list(chain(*rows)) for rows in zip(*images, strict=True)], cmap="gray_r", vmin=0, vmax=16)
        panel.set_xticks([])
        panel.set_yticks([])
        panel.set_ylabel(name, rotation=0, ha="right", va="center", fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _image(text: str) -> list[list[int]]:
    """One image as run.py writes it: rows of levels, a white column at the end."""
    levels = ["0123456789abcdefg".index(character) for character in text]
    return [[*levels[SIDE * row : SIDE * (row + 1)], 0] for row in range(SIDE)]


def _finish(figure: Any, axes: Sequence[Axes], path: Path) -> None:
    for panel in axes:
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=130)
    plt.close(figure)
