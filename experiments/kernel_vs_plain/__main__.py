"""Does training with the fused CUDA kernel differ from training with plain PyTorch? See README.md.

python -m experiments.kernel_vs_plain --device cuda --cuda-graph --together 8 --data FILE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..shared.answer import arm_table, finals, pair_table
from ..shared.curves_plot import plot_curves
from ..shared.question import Question, main


def report(question: Question, content: dict[str, Any], out: Path) -> str:
    results = finals(content)
    plot_curves(out / "loss.png", content, list(question.arms), reference="kernel")
    return f"{arm_table(results, list(question.arms))}\n\n{pair_table(results, question.compare)}\n"


if __name__ == "__main__":
    sys.exit(main(Path(__file__).parent, report))
