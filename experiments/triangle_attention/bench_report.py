"""Table and plot of bench.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..shared.metrics import table

COLOURS = {
    "fused": "#d62728",
    "sdpa": "#1f77b4",
    "plain": "#9467bd",
    "plain, compiled": "#2ca02c",
    "no attention": "#7f7f7f",
}

Record = dict[str, Any]


def summary(run: dict[str, Any]) -> str:
    """A table a dtype. Attention: the time beyond the module without it; error: of the gradient of the bias weights."""
    meta = run["meta"]
    sizes = f"{meta['batch']} x (N, N, {meta['dim']}), {meta['heads']} heads of {meta['dim_head']}"
    lines = [f"{meta['device']}, torch {meta['torch']}; {sizes}; one node, forward + backward."]
    if meta["copy_tb_per_s"]:
        lines[0] += f" A copy runs at {meta['copy_tb_per_s']:.2f} TB/s."
    for dtype in dict.fromkeys(record["dtype"] for record in run["records"]):
        records = [record for record in run["records"] if record["dtype"] == dtype]
        lines.append(dtype + "\n\n" + table([_row(record, records) for record in records]))
    return "\n\n".join(lines)


def _row(record: Record, records: list[Record]) -> dict[str, str]:
    cells = {"N": str(record["size"]), "attention": record["variant"]}
    if record["status"] != "ok":
        return cells | {"ms": record["status"]} | dict.fromkeys(("fused is faster", "attention ms", "peak MiB"), "") | {
            "error out / dpair / dbias": ""
        }  # fmt: skip
    same = {r["variant"]: r for r in records if r["size"] == record["size"] and r["status"] == "ok"}
    floor, fused = same.get("no attention"), same.get("fused")
    errors = record.get("errors")
    return cells | {
        "ms": f"{record['ms']:.3f}",
        "fused is faster": f"{record['ms'] / fused['ms']:.2f} x"
        if fused and record["variant"] not in ("fused", "no attention")
        else "",
        "attention ms": f"{record['ms'] - floor['ms']:.3f}" if floor and floor is not record else "",
        "peak MiB": f"{record['peak_bytes'] / 2**20:,.0f}" if record["peak_bytes"] else "",
        "error out / dpair / dbias": " / ".join(f"{errors[x]:.1e}" for x in ("out", "pair", "bias")) if errors else "",
    }


def draw(run: dict[str, Any], path: Path) -> None:
    """A row a dtype: time and memory over N, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    dtypes = list(dict.fromkeys(record["dtype"] for record in run["records"]))
    figure, axes = pyplot.subplots(len(dtypes), 2, figsize=(9, 3.4 * len(dtypes)), squeeze=False, layout="constrained")
    for row, dtype in zip(axes, dtypes, strict=True):
        records = [r for r in run["records"] if r["dtype"] == dtype and r["status"] == "ok"]
        for name in dict.fromkeys(r["variant"] for r in records):
            own = [r for r in records if r["variant"] == name]
            sizes = [r["size"] for r in own]
            style = {"color": COLOURS[name], "marker": "o", "ms": 4, "label": name}
            row[0].plot(sizes, [r["ms"] for r in own], **style)
            row[1].plot(sizes, [(r["peak_bytes"] or 2**20) / 2**20 for r in own], **style)  # not measured on a CPU
        for axis, title in zip(row, ("ms, forward + backward", "peak memory, MiB"), strict=True):
            axis.set(title=f"{dtype}: {title}", xlabel="N", xscale="log", yscale="log")
            ticks = sorted({r["size"] for r in records})
            axis.set_xticks(ticks, [str(n) for n in ticks])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=8)
    figure.suptitle(f"TriangleAttention on {run['meta']['device']}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
