"""What the runs say: table, paired differences, learning curves."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from ..shared.metrics import mean_and_spread, table, write_json
from .network import ARMS

Results = dict[str, list[dict[str, Any]]]
"""{arm: one result of train.train for each seed}"""


def write_report(out: Path, references: dict[str, float]) -> str:
    """Collects out/runs into results.json, then as `rewrite_report`."""
    write_json(out / "results.json", {"references": references, "arms": collect(out / "runs")})
    return rewrite_report(out)


def rewrite_report(out: Path) -> str:
    """From results.json: writes summary.md and rmse.png, returns the summary."""
    stored = read_json(out / "results.json")
    text = summary(stored["arms"], stored["references"]) + "\n"
    (out / "summary.md").write_text(text)
    draw(stored["arms"], stored["references"], out / "rmse.png")
    return text


def read_json(path: Path) -> Any:
    return json.loads(path.read_text())


def collect(runs: Path) -> Results:
    results: Results = {name: [] for name in ARMS}
    for path in sorted(runs.glob("*.json")):
        result = read_json(path)
        results[result["arm"]].append(result)
    return {name: seeds for name, seeds in results.items() if seeds}


def summary(results: Results, references: dict[str, float]) -> str:
    lines = [table([_row(name, seeds) for name, seeds in results.items()])]
    lines += [f"Without learning: {', '.join(f'{name} {value:.4f}' for name, value in references.items())}."]
    names = [name for name in ("triangle, fused", "triangle, plain") if name in results]
    if len(names) == 2:
        lines.append(_difference(*(results[name] for name in names)))
    return "\n\n".join(lines)


def _row(name: str, seeds: list[dict[str, Any]]) -> dict[str, str]:
    finals = [result["rows"][-1]["rmse"] for result in seeds]
    mean, spread = mean_and_spread(finals)
    return {
        "arm": name,
        "held-out RMSE": f"{mean:.4f}" + ("" if math.isnan(spread) else f" +- {spread:.4f}"),
        "each seed": ", ".join(f"{value:.4f}" for value in finals),
        "parameters": f"{seeds[0]['parameters']:,}",
    }


def _difference(fused: list[dict[str, Any]], plain: list[dict[str, Any]]) -> str:
    """Paired by seed: the same weights at first, the same batches."""
    by_seed = {result["seed"]: result["rows"][-1]["rmse"] for result in plain}
    pairs = [result["rows"][-1]["rmse"] - by_seed[result["seed"]] for result in fused if result["seed"] in by_seed]
    mean, spread = mean_and_spread(pairs)
    noise = mean_and_spread(list(by_seed.values()))[1]
    each = ", ".join(f"{value:+.4f}" for value in pairs)
    return (
        f"Fused minus plain, same seed: {mean:+.4f} +- {spread:.4f} ({each}); spread of plain over seeds {noise:.4f}."
    )


def draw(results: Results, references: dict[str, float], path: Path) -> None:
    """Held-out RMSE over steps: seeds thin, their mean bold."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for index, (name, seeds) in enumerate(results.items()):
        steps = [row["step"] for row in seeds[0]["rows"]]
        curves = [[row["rmse"] for row in result["rows"]] for result in seeds]
        for curve in curves:
            axis.plot(steps, curve, color=f"C{index}", lw=0.7, alpha=0.5)
        mean = [sum(values) / len(values) for values in zip(*curves, strict=True)]
        axis.plot(steps, mean, color=f"C{index}", lw=2, ls="--" if "plain" in name else "-", label=name)
    axis.axhline(references["constant"], color="grey", ls=":", lw=1, label="best constant")
    axis.set(xlabel="step", ylabel="RMSE of missing distances", ylim=(0, None), title="Distance completion, held out")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
