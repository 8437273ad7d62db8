"""Does training with the fused CUDA kernel differ from training with plain PyTorch? See README.md.

python -m experiments.kernel_vs_plain --device cuda --cuda-graph --together 8 --data FILE
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean, variance
from typing import Any

from ..shared.answer import arm_table, finals, pair_table
from ..shared.curves_plot import plot_curves
from ..shared.metrics import table
from ..shared.question import Question, main
from ..shared.results_file import config_of

Curves = dict[int, list[float]]  # seed -> held-out bits per byte at each validation


def report(question: Question, content: dict[str, Any], out: Path) -> str:
    results = finals(content)
    half = [arm for arm in question.arms if "fp32" not in arm]
    plot_curves(out / f"loss{content['suffix']}.png", content, half, reference="kernel")
    plot_curves(
        out / f"loss-fp32{content['suffix']}.png",
        content,
        [*sorted(set(question.arms) - set(half))],
        reference="kernel fp32",
    )
    tables = (
        arm_table(results, list(question.arms)),
        pair_table(results, question.compare),
        curve_table(content, question),
    )
    return "\n\n".join(tables) + "\n"


def curve_table(content: Mapping[str, Any], question: Question) -> str:
    """Over the whole curve: how far two arms of one seed are apart, and how far seeds of one arm are."""
    curves = _curves(content)
    rows = []
    for one, other in question.compare:
        if one not in curves or other not in curves:
            continue
        seeds = sorted(set(curves[one]) & set(curves[other]))
        differences = [a - b for seed in seeds for a, b in zip(curves[one][seed], curves[other][seed], strict=True)]
        at_each = zip(*(curves[one][seed] for seed in seeds), strict=True)
        rows.append(
            {
                "all validations of all seeds": f"{one} - {other}",
                "mean difference": f"{fmean(differences):+.5f}",
                "rms difference": f"{math.sqrt(fmean(x * x for x in differences)):.5f}",
                "largest": f"{max(map(abs, differences)):.5f}",
                "standard deviation over seeds": f"{math.sqrt(fmean(map(variance, at_each))):.5f}"
                if len(seeds) > 1
                else "-",
            }
        )
    return table(rows)


def _curves(content: Mapping[str, Any]) -> dict[str, Curves]:
    found: dict[str, Curves] = {}
    for run in content["runs"]:
        found.setdefault(run["arm"], {})[config_of(content, run)["seed"]] = run["curves"]["val_bpb"]
    return found


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, report))
