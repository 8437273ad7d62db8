"""Table and plot of bench.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from ..shared.curves_plot import save
from ..shared.metrics import table

NAMES = {
    "kernel": "this kernel, norm inside",
    "sdpa": "norm, then torch's flash attention",
    "regular": "regular attention, torch's flash",
    "chunked": "this package without CUDA kernels",
    "plain": "plain, n x n stored",
}
COLORS = {"kernel": "C3", "sdpa": "C0", "regular": "black", "chunked": "C2", "plain": "C1"}

Record = dict[str, Any]


def write_report(path: Path) -> str:
    """Markdown; the plot lies beside the JSON."""
    run = json.loads(path.read_text(encoding="utf-8"))
    draw(run, path.with_suffix(".png"))
    return summary(run)


def summary(run: dict[str, Any]) -> str:
    """A row an arm, a column a length: milliseconds of a step and GiB at its peak."""
    meta = run["meta"]
    limit = f", at most {meta['memory_limit']:g} GiB" if meta["memory_limit"] else ""
    head = (
        f"{meta['gpu'] or meta['machine'] + ' CPU'}{limit}, PyTorch {meta['torch']}; one sequence a step, "
        f"{meta['depth']} layers of width {meta['dim']}, {meta['heads']} heads, {meta['dtype']}"
    )
    rows = []
    lengths = sorted({record["length"] for record in run["records"]})
    for arm in dict.fromkeys(record["arm"] for record in run["records"]):
        mine = {record["length"]: record for record in run["records"] if record["arm"] == arm}
        rows.append({"ms (peak GiB)": NAMES[arm], **{f"{length:,}": _cell(mine.get(length)) for length in lengths}})
    return f"{head}\n\n{table(rows)}"


def _cell(record: Record | None) -> str:
    if record is None:
        return "-"
    if record["status"] != "ok":
        return "out of memory"
    return f"{record['ms']:.1f} ({record['peak_bytes'] / 2**30:.1f})"


def draw(run: dict[str, Any], path: Path) -> None:
    """Tokens a second and peak memory over the length; a line ends where memory did."""
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.6), layout="constrained")
    for arm in dict.fromkeys(record["arm"] for record in run["records"]):
        mine = [record for record in run["records"] if record["arm"] == arm and record["status"] == "ok"]
        lengths = [record["length"] for record in mine]
        style = {"color": COLORS[arm], "marker": "o", "label": NAMES[arm]}
        panels[0].plot(lengths, [record["tokens_per_s"] / 1e3 for record in mine], **style)
        panels[1].plot(lengths, [record["peak_bytes"] / 2**30 for record in mine], **style)
    lengths = sorted({record["length"] for record in run["records"]})
    for axes, title in zip(panels, ("thousand tokens a second", "peak memory of a step, GiB"), strict=True):
        axes.set(title=title, xlabel="sequence length", xscale="log", yscale="log")
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    save(figure, path)
