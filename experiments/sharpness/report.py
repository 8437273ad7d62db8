"""Tables and plots of all runs in a folder: summary.md, theory.png, lengths.png."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import matplotlib

matplotlib.use("Agg")  # no display needed
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from ..shared.metrics import table
from ..shared.waves import Result, by_arm, interval, read_results
from .config import load_arms
from .tasks import TASKS
from .theory import opposite, orthogonal, random_directions

THEORY_LENGTHS = (256, 1024, 8192, 65_536, 1_048_576)
THEORY_BOUNDS = (1, 8, 10, 16, 64)
THEORY_DIM = 64
MEASURES = {
    "accuracy": "accuracy",
    "loss": "loss, nats an answer",
    "top": "largest attention probability",
}


def write_report(folder: Path) -> str:
    """The summary of the runs in `folder`, written there with the plots. ValueError if there is no run."""
    results = read_results(folder)
    if not results:
        raise ValueError(f"{folder}: expected results of runs, found none")
    tasks = {task: [run for run in results if run["task"] == task] for task in TASKS}
    found = {task: by_arm(runs, load_arms()) for task, runs in tasks.items() if runs}
    parts = [_heading(results), theory_table()]
    for task, arms in found.items():
        parts += [f"{task}: {text}\n\n{_table(arms, name)}" for name, text in MEASURES.items()]
    parts.append(_scales(found))
    summary = "\n\n".join(part for part in parts if part) + "\n"
    (folder / "summary.md").write_text(summary, encoding="utf-8")
    plot_theory(folder / "theory.png")
    _plot_lengths(folder / "lengths.png", found)
    return summary


def theory_table() -> str:
    """The best probability of one key among n, for distractors opposite / orthogonal / in random directions."""
    return table(
        [
            {"n": f"{n:,}"}
            | {
                f"B = {bound}": " / ".join(
                    f"{value:.2g}" if value < 0.0995 else f"{value:.3f}"
                    for value in (
                        opposite(n, bound),
                        orthogonal(n, bound),
                        random_directions(n, bound, THEORY_DIM),
                    )
                )
                for bound in THEORY_BOUNDS
            }
            for n in THEORY_LENGTHS
        ]
    )


def _heading(results: Sequence[Result]) -> str:
    config, environment = results[0]["config"], results[0]["environment"]
    return (
        f"{results[0]['parameters']:,} parameters, {config['steps']} steps of {config['batch_size']} x "
        f"{config['train_length']} tokens; {environment['gpu'] or 'CPU'}, torch {environment['torch']}. "
        "+- is a 95 % interval over training seeds."
    )


def _table(arms: dict[str, list[Result]], measure: str) -> str:
    """A row an arm and scaling, a column a length."""
    lengths = sorted({row["length"] for runs in arms.values() for run in runs for row in run["evaluations"]})
    return table(
        [
            {"attention": name, "scale": scaling, "seeds": str(len(runs))}
            | {str(length): _cell(runs, scaling, length, measure) for length in lengths}
            for name, runs in arms.items()
            for scaling in ("fixed", "log n")
        ]
    )


def _cell(runs: Sequence[Result], scaling: str, length: int, measure: str) -> str:
    values = [_value(run, scaling, length, measure) for run in runs]
    present = [value for value in values if value is not None]
    return interval(present) if present else "-"


def _value(run: Result, scaling: str, length: int, measure: str) -> float | None:
    rows = (row for row in run["evaluations"] if (row["scaling"], row["length"]) == (scaling, length))
    return next((row[measure] for row in rows), None)


def _scales(found: dict[str, dict[str, list[Result]]]) -> str:
    """What the learned scales became: a line a task, the mean over seeds and heads of each layer."""
    lines = []
    for task, arms in found.items():
        for name, runs in arms.items():
            if runs[0]["scales"]:
                layers = [fmean(fmean(run["scales"][layer]) for run in runs) for layer in range(len(runs[0]["scales"]))]
                largest = max(max(heads) for run in runs for heads in run["scales"])
                values = ", ".join(f"{value:.1f}" for value in layers)
                lines.append(f"- {task}, {name}: scales of the layers {values} in the mean, {largest:.1f} the largest")
    return "\n".join(lines)


def plot_theory(path: Path) -> None:
    """The best probability over the number of keys: lines a bound, styles a way for the distractors to lie."""
    figure, panel = plt.subplots(figsize=(7.5, 4.6), layout="constrained")
    lengths = [2.0 ** (power / 4) for power in range(16, 85)]
    for index, bound in enumerate(THEORY_BOUNDS):
        color = f"C{index}"
        panel.plot(lengths, [opposite(round(n), bound) for n in lengths], "--", color=color, linewidth=1)
        panel.plot(lengths, [orthogonal(round(n), bound) for n in lengths], color=color, label=f"B = {bound}")
        random = [random_directions(round(n), bound, THEORY_DIM) for n in lengths]
        panel.plot(lengths, random, ":", color=color, linewidth=1)
    panel.set(xscale="log", xlabel="keys", ylabel="best probability of one key")
    panel.set_title(f"distractors: -- opposite, - orthogonal, .. random in {THEORY_DIM} dims", fontsize=9)
    panel.axvspan(256, 8192, color="grey", alpha=0.12)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _plot_lengths(path: Path, found: dict[str, dict[str, list[Result]]]) -> None:
    """A column a task, a row a measure: solid with the scale of training, dashed with one that grows as log n.

    Dotted: the largest probability that the scale of training allows against orthogonal distractors.
    """
    shape = (len(MEASURES), len(found))
    figure, axes = plt.subplots(*shape, figsize=(4.6 * shape[1], 9.5), layout="constrained", squeeze=False)
    for column, (task, arms) in enumerate(found.items()):
        for panel, (measure, text) in zip(axes[:, column], MEASURES.items(), strict=True):
            for index, (name, runs) in enumerate(arms.items()):
                _draw(panel, runs, measure, f"C{index}", name)
                if measure == "top" and runs[0]["scales"] == [] and math.isfinite(bound := load_arms()[name].bound):
                    lengths = runs[0]["config"]["train_length"], runs[0]["config"]["longest"]
                    _draw_bound(panel, bound, *lengths, f"C{index}")
            panel.set(ylabel=text if column == 0 else "", yscale="log" if measure == "loss" else "linear")
            panel.set_xscale("log", base=2)
            panel.xaxis.set_major_formatter("{x:.0f}")
            panel.grid(alpha=0.3)
        axes[0, column].set_title(task)
        axes[-1, column].set_xlabel("length (solid: scale of training, dashed: growing as log n)", fontsize=8)
    fullest = max(range(len(found)), key=lambda column: len(list(found.values())[column]))
    axes[0, fullest].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _draw_bound(panel: Axes, bound: float, shortest: int, longest: int, color: str) -> None:
    """The best for orthogonal distractors, dotted."""
    lengths = [shortest * 2 ** (step / 4) for step in range(4 * int(math.log2(longest / shortest)) + 1)]
    panel.plot(lengths, [orthogonal(round(n), bound) for n in lengths], ":", color=color, linewidth=1.5)


def _draw(panel: Axes, runs: Sequence[Result], measure: str, color: str, name: str) -> None:
    for scaling, style, label in (("fixed", "o-", name), ("log n", "x--", None)):
        points: dict[int, list[float]] = {}
        for row in (row for run in runs for row in run["evaluations"] if row["scaling"] == scaling):
            points.setdefault(row["length"], []).append(row[measure])
        if points:
            panel.plot(list(points), [fmean(values) for values in points.values()], style, color=color, label=label)
            for length, values in points.items():
                panel.plot([length, length], [min(values), max(values)], color=color, linewidth=1)
