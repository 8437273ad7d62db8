"""Table and plot of bench_training_step.py.

`python training_report.py RUN.json` writes RUN.txt and RUN.png again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

BASELINE = "qk-norm, flash"
FLOOR = "no attention"
COLOURS = {
    "plugin, convert": "#d62728",
    "plugin, accelerate": "#000000",
    "plugin, norm apart": "#ff9896",
    BASELINE: "#1f77b4",
    "softmax, flash": "#2ca02c",
}
COLOURS |= {FLOOR: "#7f7f7f", "qk-norm, plain": "#9467bd", "softmax, plain": "#8c564b"}

COLUMNS = ("ms a step", "tokens/s", "x native", "attention", "peak GiB", "fused / stock calls")

Record = dict[str, Any]


def label(record: Record) -> str:
    return record["arm"] + (", compiled" if record["compiled"] else "")


def table(run: dict[str, Any]) -> str:
    """Markdown: one table a length. x native: speed over x-transformers' attn_qk_norm=True, attn_flash=True."""
    meta = run["meta"]
    lines = [
        f"{meta['device']}, torch {meta['torch']}, x-transformers {meta['x_transformers']}.",
        f"Model: {meta['model']}.",
        f"{meta['tokens']} tokens a step, {meta['dtype']}, {meta['optimizer']}; forward + backward + optimiser.",
    ]
    if meta["copy_tb_per_s"]:
        lines[0] += f" A copy runs at {meta['copy_tb_per_s']:.2f} TB/s."
    for seq_len in dict.fromkeys(record["seq_len"] for record in run["records"]):
        records = [record for record in run["records"] if record["seq_len"] == seq_len]
        lines += ["", f"{seq_len} tokens x {records[0]['batch']}", ""]
        lines += ["| arm | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
        lines += [_row(record, records) for record in records]
    return "\n".join(lines)


def _row(record: Record, records: list[Record]) -> str:
    if record["status"] != "ok":
        what = "out of memory" if record["status"] == "oom" else record["status"]
        return f"| {label(record)} | {what}" + " |" * len(COLUMNS)
    baseline, floor = (_find(records, name, record["compiled"]) for name in (BASELINE, FLOOR))
    ratio = f"{baseline['ms'] / record['ms']:.2f}" if baseline else ""
    share = f"{1 - floor['ms'] / record['ms']:.0%}" if floor and not record["compiled"] else ""
    peak = f"{record['peak_bytes'] / 2**30:.1f}" if record["peak_bytes"] else ""
    calls = f"{record['fused_calls']} / {record['stock_calls']}" if record["fused_calls"] else ""
    cells = (f"{record['ms']:.1f}", f"{record['tokens_per_s']:,.0f}", ratio, share, peak, calls)
    return f"| {label(record)} | " + " | ".join(cells) + " |"


def _find(records: list[Record], arm: str, compiled: bool) -> Record | None:
    found = (r for r in records if r["arm"] == arm and r["compiled"] == compiled and r["status"] == "ok")
    return next(found, None)


def draw(run: dict[str, Any], path: Path) -> None:
    """Tokens per second and peak memory over the length; arms that ran out of memory end."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    records = [record for record in run["records"] if record["status"] == "ok"]
    for name in dict.fromkeys(map(label, records)):
        own = [record for record in records if label(record) == name]
        dashes = "--" if own[0]["compiled"] else ":" if name == "plugin, accelerate" else "-"  # lies on convert
        style = {
            "color": COLOURS[own[0]["arm"]],
            "ls": dashes,
            "marker": "o",
            "label": name,
        }
        lengths = [record["seq_len"] for record in own]
        axes[0].plot(lengths, [record["tokens_per_s"] / 1000 for record in own], **style)
        axes[1].plot(lengths, [(record["peak_bytes"] or 0) / 2**30 for record in own], **style)
    lengths = sorted({record["seq_len"] for record in run["records"]})
    for axis, title in zip(axes, ("thousand tokens per second", "peak memory of a step, GiB"), strict=True):
        axis.set(title=title, xlabel="sequence length", xscale="log")
        axis.set_ylim(bottom=0)
        axis.set_xticks(lengths, [str(n) for n in lengths])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=8)
    figure.suptitle(f"Training step on {run['meta']['device']}, {run['meta']['tokens']} tokens", fontsize=11)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(paths: list[str]) -> int:
    for path in map(Path, paths):
        run = json.loads(path.read_text())
        path.with_suffix(".txt").write_text(table(run) + "\n")
        draw(run, path.with_suffix(".png"))
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
