"""Is the gain of cosine-sim attention the ability to use post-norm? See README.md.

python -m experiments.norm_placement --device cuda --cuda-graph --together 8 --data FILE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from ..shared.answer import Finals, arm_table, finals, interval, pair_table
from ..shared.curves_plot import plot_curves, rate_axis, save
from ..shared.question import Question, main


def report(question: Question, content: dict[str, Any], out: Path) -> str:
    results = finals(content)
    plot_curves(out / f"loss{content['suffix']}.png", content, list(question.arms), reference="pre regular")
    if len({rate for rates in results.values() for rate in rates}) > 1:
        plot_rates(out / f"rates{content['suffix']}.png", question, results)
    return f"{arm_table(results, list(question.arms))}\n\n{pair_table(results, question.compare)}\n"


def plot_rates(path: Path, question: Question, results: Finals) -> None:
    """Bits per byte over the learning rate, a panel a placement; a run that diverged has no point."""
    norms = list(dict.fromkeys(str(arm["norm"]) for name, arm in question.arms.items() if name in results))
    every = sorted({rate for found in results.values() for rate in found})
    figure, panels = plt.subplots(
        1, len(norms), figsize=(3.4 * len(norms), 4), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    for panel, norm in zip(panels[0], norms, strict=True):
        for arm, differences in question.arms.items():
            if differences["norm"] != norm or arm not in results:
                continue
            rates = sorted(results[arm])
            points = [interval(list(results[arm][rate].values())) for rate in rates]
            means, halves = zip(*points, strict=True)
            panel.errorbar(rates, means, yerr=halves, marker="o", capsize=3, label=differences["attention"])
        panel.set(title=f"{norm}-norm")
        rate_axis(panel, every)
        if panel.get_legend_handles_labels()[0]:
            panel.legend()
    panels[0, 0].set_ylabel("held-out bits per byte")
    save(figure, path)


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, report))
