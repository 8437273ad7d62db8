"""Training at lengths where plain attention runs out of memory. See README.md.

python -m experiments.long_context --device cuda --data FILE      the trainings, three seeds each
python -m experiments.long_context.bench                          memory and speed of a step by length
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from ..shared.answer import arm_table, finals, pair_table
from ..shared.curves_plot import save
from ..shared.question import Question, main
from ..shared.results_file import config_of


def report(question: Question, content: dict[str, Any], out: Path) -> str:
    plot(out / f"loss{content['suffix']}.png", question, content)
    results = finals(content)
    return f"{arm_table(results, list(question.arms))}\n\n{pair_table(results, question.compare)}\n"


def plot(path: Path, question: Question, content: dict[str, Any]) -> None:
    """Bits per byte over the bytes that were read, each run a line."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    colors = {arm: f"C{index}" for index, arm in enumerate(question.arms)}
    labelled: set[str] = set()
    for run in content["runs"]:
        config, curves, arm = config_of(content, run), run["curves"], run["arm"]
        size = config["seq_len"] * config["batch_size"] / 1e6
        label = None if arm in labelled else arm
        labelled.add(arm)
        for axes, steps, values in (
            (panels[0], curves["step"], curves["train_bpb"]),
            (panels[1], curves["val_step"], curves["val_bpb"]),
        ):
            axes.plot([step * size for step in steps], values, color=colors[arm], linewidth=1, label=label)
    for axes, title in zip(panels, ("training", "held out"), strict=True):
        axes.set(xlabel="million bytes read, of each seed", ylabel="bits per byte", title=title)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, report))
