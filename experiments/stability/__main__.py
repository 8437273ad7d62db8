"""At which learning rates, and in which dtypes, does training stay stable? See README.md.

python -m experiments.stability --device cuda --together 3 --data FILE
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib.pyplot as plt

from ..shared.answer import finals, interval, pair_table
from ..shared.curves_plot import rate_axis, save
from ..shared.metrics import table
from ..shared.question import Question, main
from ..shared.results_file import config_of

LOST = 5.0  # bits per byte: what a model without context reaches, 5.09 for the text of the results in git
COLORS = {"regular": "black", "cosine": "C0", "learned": "C3"}
STYLES = {"fp32": "-", "bf16": "--", "fp16": ":"}

Run = dict[str, Any]
Runs = dict[str, dict[float, list[Run]]]  # arm -> learning rate -> runs, one a seed


def report(question: Question, content: dict[str, Any], out: Path) -> str:
    runs = runs_of(content, list(question.arms))
    plot(out / f"stability{content['suffix']}.png", runs)
    parts = (
        "Held-out bits per byte at the end; *lost*: not a number, or no better than without context.",
        rate_table(runs, bits),
        "Largest |logit| of any validation and seed.",
        rate_table(runs, lambda found: f"{max(map(largest_logit, found)):.0f}"),
        "Norm of the gradient before clipping: the largest of any step after the warmup, median over seeds.",
        rate_table(runs, lambda found: f"{median(map(largest_gradient, found)):.1f}"),
        "Steps that loss scaling left out (fp16), mean over seeds.",
        rate_table(
            {arm: found for arm, found in runs.items() if "fp16" in arm},
            lambda found: f"{fmean(run['skipped_steps'] for run in found):.0f}",
        ),
        pair_table(finals(content), question.compare),
    )
    return "\n\n".join(parts) + "\n"


def runs_of(content: dict[str, Any], order: list[str]) -> Runs:
    found: Runs = {arm: {} for arm in order}
    for run in content["runs"]:
        found[run["arm"]].setdefault(config_of(content, run)["lr"], []).append(run)
    return {arm: rates for arm, rates in found.items() if rates}


def is_lost(run: Run) -> bool:
    return run.get("val_bpb") is None or run["val_bpb"] > LOST


def largest_logit(run: Run) -> float:
    return max((value for value in run["curves"]["max_logit"] if value < 1e30), default=math.nan)


def largest_gradient(run: Run) -> float:
    """After the first row, which holds the warmup."""
    return max(run["curves"]["grad_norm_max"][1:], default=math.nan)


def bits(runs: list[Run]) -> str:
    kept = [run["val_bpb"] for run in runs if not is_lost(run)]
    lost = f"{len(runs) - len(kept)} of {len(runs)} lost" if len(kept) < len(runs) else ""
    if not kept:
        return lost
    mean, half = interval(kept)
    text = f"{mean:.3f}" if math.isnan(half) else f"{mean:.3f} +- {half:.3f}"
    return f"{lost}, {text}" if lost else text


def rate_table(runs: Runs, cell: Callable[[list[Run]], str]) -> str:
    """One row an arm, one column a learning rate."""
    rates = sorted({rate for found in runs.values() for rate in found})
    rows = []
    for arm, found in runs.items():
        cells = {f"lr {rate:g}": cell(found[rate]) if rate in found else "-" for rate in rates}
        rows.append({"arm": arm, **cells})
    return table(rows)


def plot(path: Path, runs: Runs) -> None:
    """Over the learning rate: bits per byte (8 for what was lost), the largest logit, the largest gradient."""
    figure, panels = plt.subplots(1, 3, figsize=(15, 4.6), layout="constrained")
    for arm, found in runs.items():
        kind, dtype = arm.split()
        rates = sorted(found)
        style = {"color": COLORS[kind], "linestyle": STYLES[dtype], "marker": ".", "label": arm}
        finished = [[8.0 if is_lost(run) else run["val_bpb"] for run in found[rate]] for rate in rates]
        panels[0].plot(rates, [fmean(values) for values in finished], **style)
        for rate, values in zip(rates, finished, strict=True):
            panels[0].plot([rate] * len(values), values, ".", color=COLORS[kind], markersize=3, alpha=0.5)
        panels[1].plot(rates, [max(map(largest_logit, found[rate])) for rate in rates], **style)
        panels[2].plot(rates, [median(map(largest_gradient, found[rate])) for rate in rates], **style)
    titles = ("held-out bits per byte", "largest |logit|", "largest gradient norm after the warmup, before clipping")
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title)
        rate_axis(axes, sorted({rate for found in runs.values() for rate in found}))
    panels[1].set_yscale("log")
    panels[2].set_ylim(bottom=0)
    panels[0].legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, report))
