"""Plots of a run: speed over the peers, and TFLOP/s under what the GPU can do, over sequence length.

`python plot.py RUN.json...` draws again what benchmark.py wrote; PNG files go beside each RUN.json.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measure import Record
from presets import Case, case_of
from report import on_equal_terms

COLOURS = {"ours": "#d62728", "plain": "#7f7f7f", "fa2": "#1f77b4", "cudnn": "#2ca02c", "fa3": "#17becf"}
COLOURS |= {"fa4": "#9467bd", "efficient": "#8c564b", "flex": "#ff7f0e"}
COLOURS |= {"ours:sm80": "#e7969c", "ours:sm90": "#843c39", "ours:chunked": "#f7b6d2"}  # forced paths

Lines = dict[str, list[tuple[int, float]]]
"""{peer: [(seq_len, value)]}"""


def draw(run: dict[str, Any], folder: Path, name: str) -> list[Path]:
    """Two figures for each dtype: folder/NAME-DTYPE-{speed,tflops}.png. [] if nothing could be timed."""
    paths = []
    timed = [record for record in on_equal_terms(run["records"]) if record["status"] == "ok"]
    norm = "without the norm" if timed and timed[0]["norm"] == "none" else "norm included"
    for dtype in dict.fromkeys(record["dtype"] for record in timed):
        records = [record for record in timed if record["dtype"] == dtype]
        title = f"{run['meta']['gpu']}, {dtype}, {norm}"
        for kind, panel in (("speed", speed_panel), ("tflops", tflops_panel)):
            paths.append(folder / f"{name}-{dtype}-{kind}.png")
            draw_figure(records, run.get("ceilings", {}), title, panel, paths[-1])
    return paths


def draw_figure(
    records: list[Record], ceilings: dict[str, float], title: str, panel: Callable[..., None], path: Path
) -> None:
    """A grid of panels: a row for each pass, a column for each family of cases."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    modes = list(dict.fromkeys(record["mode"] for record in records))
    families = list(dict.fromkeys(case_of(record).family() for record in records))
    size = (4 * len(families) + 1.5, 3.2 * len(modes) + 0.6)
    figure, axes = pyplot.subplots(len(modes), len(families), figsize=size, squeeze=False, layout="constrained")
    for i, mode in enumerate(modes):
        for j, family in enumerate(families):
            chosen = [r for r in records if r["mode"] == mode and case_of(r).family() == family]
            panel(axes[i, j], chosen, ceilings)
            axes[i, j].set(title=f"{family}, {mode}", xlabel="sequence length", xscale="log")
            lengths = sorted({r["seq_len"] for r in chosen})
            axes[i, j].set_xticks(lengths, [str(n) for n in lengths], minor=False)
            axes[i, j].minorticks_off()
            axes[i, j].grid(alpha=0.3)
    handles = {text: line for axis in axes.flat for line, text in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center")
    figure.suptitle(title)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def lines_of(records: list[Record], value: Callable[[Record], float]) -> Lines:
    lines: Lines = {}
    for record in sorted(records, key=lambda r: r["seq_len"]):
        lines.setdefault(record["peer"], []).append((record["seq_len"], value(record)))
    return lines


def plot_lines(axis: Any, lines: Lines) -> None:
    for name, points in lines.items():
        width = 2.5 if name == "ours" else 1.5
        axis.plot(*zip(*points, strict=True), marker="o", ms=3, lw=width, color=COLOURS.get(name), label=name)


def speed_panel(axis: Any, records: list[Record], ceilings: dict[str, float]) -> None:
    """Each peer's time over ours: above 1 ours is faster."""
    ours = {r["seq_len"]: r["ms"] for r in records if r["peer"] == "ours"}
    peers = [r for r in records if r["peer"] != "ours" and r["seq_len"] in ours]
    plot_lines(axis, lines_of(peers, lambda r: r["ms"] / ours[r["seq_len"]]))
    axis.axhline(1.0, color=COLOURS["ours"], lw=2, label="ours")
    axis.set(ylabel="speed of ours over the peer's", yscale="log")
    low, high = axis.get_ylim()
    ticks = [2.0**i for i in range(-6, 9) if low <= 2.0**i <= high] + [x for x in (0.75, 1.5) if high / low < 6]
    axis.set_yticks(ticks, [f"{tick:g}x" for tick in ticks])


def tflops_panel(axis: Any, records: list[Record], ceilings: dict[str, float]) -> None:
    """TFLOP/s, and for half precision the roof: the slower of matrix products at their rate and bytes at copy speed."""
    plot_lines(axis, lines_of(records, lambda r: r["tflops"]))
    if ceilings and records[0]["dtype"] != "fp32":
        cells: dict[int, tuple[Case, str]] = {r["seq_len"]: (case_of(r), r["mode"]) for r in records}
        roof = [(n, min(ceilings["tflops"], tflops_of_copy(*cells[n], ceilings))) for n in sorted(cells)]
        axis.plot(*zip(*roof, strict=True), "k:", label="roof")
    axis.set(ylabel="TFLOP/s", ylim=(0, None))


def tflops_of_copy(case: Case, mode: str, ceilings: dict[str, float]) -> float:
    return case.flops(mode) / (case.min_bytes(mode) / ceilings["tb_per_s"])


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        source = Path(argument)
        print(*draw(json.loads(source.read_text()), source.parent, source.stem), sep="\n")
