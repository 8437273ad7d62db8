"""Which scale does cosine-sim attention want, and do groups of the norm help? See README.md.

python -m experiments.scale_and_groups --device cuda --cuda-graph --together 8 --data FILE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from ..shared.answer import Finals, arm_table, best_rate, finals, interval, pair_table
from ..shared.curves_plot import plot_curves, save
from ..shared.question import Question, main


def report(question: Question, content: dict[str, Any], out: Path) -> str:
    results = finals(content)
    plot_curves(out / f"loss{content['suffix']}.png", content, list(question.arms), reference="regular")
    plot_bound(out / f"bound{content['suffix']}.png", question, results)
    return f"{arm_table(results, list(question.arms))}\n\n{pair_table(results, question.compare)}\n{_scales(content)}"


def plot_bound(path: Path, question: Question, results: Finals) -> None:
    """Bits per byte over the bound of the logits, scale * groups: one line a number of groups."""
    figure, axes = plt.subplots(figsize=(7, 4.6), layout="constrained")
    lines: dict[int, list[tuple[float, float, float]]] = {}
    for arm, rates in results.items():
        mean, half = interval(list(rates[best_rate(rates)].values()))
        differences = question.arms[arm]
        if differences.get("attention") == "regular" or differences.get("learned_scale"):
            color = "black" if arm == "regular" else "C3"
            axes.axhline(mean, color=color, linestyle="--", linewidth=1.2, label=arm)
            axes.axhspan(mean - half, mean + half, color=color, alpha=0.1, linewidth=0)
        else:
            groups = int(differences.get("groups", 1))
            lines.setdefault(groups, []).append((differences.get("scale", 8.0) * groups, mean, half))
    for groups, points in sorted(lines.items()):
        bounds, means, halves = zip(*sorted(points), strict=True)
        axes.errorbar(bounds, means, yerr=halves, marker="o", capsize=3, label=f"{groups} group{'s' * (groups > 1)}")
    axes.set(xscale="log", xlabel="bound of the logits: scale * groups", ylabel="held-out bits per byte")
    axes.legend()
    axes.grid(alpha=0.3)
    save(figure, path)


def _scales(content: dict[str, Any]) -> str:
    """What the learned scales became."""
    found = [run["learned_scales"] for run in content["runs"] if run.get("learned_scales")]
    if not found:
        return ""
    values = sorted(scale for layers in found for heads in layers for scale in heads)
    by_layer = [sum(map(sum, layers)) / sum(map(len, layers)) for layers in zip(*found, strict=True)]
    return (
        f"\nLearned scales: {values[0]:.1f} to {values[-1]:.1f}, median {values[len(values) // 2]:.1f}; "
        f"mean by layer {', '.join(f'{scale:.1f}' for scale in by_layer)}\n"
    )


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, report))
