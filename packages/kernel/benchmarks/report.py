"""Text from records: the row of a cell, the tables at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from measure import Record, geometric_mean
from presets import case_of
from targets import judge


def column(record: Record) -> str:
    """The variant's name in tables: the peer, and its norm unless that is inside our call or compiled in front."""
    usual = record["norm"] in ("fused", "compiled")
    return record["peer"] if usual else f"{record['peer']}/{record['norm']}"


def on_equal_terms(records: list[Record]) -> list[Record]:
    """The records that rows and plots compare: the norm inside the timing, compiled rather than eager, if there are
    such; else all on inputs of unit norm."""
    norms = {record["norm"] for record in records}
    chosen = next((norm for norm in ("compiled", "eager", "fused", "none") if norm in norms), "none")
    ours = "none" if chosen == "none" else "fused"
    return [record for record in records if record["norm"] in (chosen, ours)]


def cells_of(records: Iterable[Record]) -> dict[tuple[str, int, str], dict[str, Record]]:
    """{(case, seq_len, mode): {column: record}} in the order of measurement."""
    found: dict[tuple[str, int, str], dict[str, Record]] = {}
    for record in records:
        case = case_of(record)
        found.setdefault((str(case), case.seq_len, record["mode"]), {})[column(record)] = record
    return found


def row(records: list[Record]) -> str:
    """One cell: our time over that of plain attention ("slower"), both times, then each peer's time over ours."""
    by_peer = {record["peer"]: record for record in on_equal_terms(records)}
    case, ours, plain = case_of(records[0]), by_peer.get("ours"), by_peer.get("plain")
    slower = _ratio(ours, plain)
    others = {name: record for name, record in by_peer.items() if name not in ("ours", "plain")}
    return (
        f"{case.family()} {records[0]['mode']}\tseq_len: {case.seq_len}\tslower: {slower}\t"
        f"kernel: {_time(ours)}\tbaseline: {_time(plain)}"
        + "".join(f"\t{name} {_ratio(record, ours)}" for name, record in others.items())
    )


def _ratio(over: Record | None, under: Record | None) -> str:
    if over is not None and over["status"] != "ok":
        return over["status"]
    if over is None or under is None or under["status"] != "ok":
        return "-"
    return f"{over['ms'] / under['ms']:.2f}x"


def _time(record: Record | None) -> str:
    if record is None:
        return "-"
    return f"{record['ms']:.4g} ms" if record["status"] == "ok" else record["status"]


VALUES: dict[str, tuple[str, Callable[[Record], str]]] = {
    "ms": ("median time, ms", lambda r: f"{r['ms']:.4g}"),
    "tflops": (
        "TFLOP/s (4 b h n^2 d forward, 2.5 times that backward, half for causal)",
        lambda r: f"{r['tflops']:.4g}",
    ),
    "memory": (
        "peak extra memory, MiB",
        lambda r: "-" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2**20:.1f}",
    ),
    "errors": (
        "relative error x 1e4 against float64: out, dq, dk, dv",
        lambda r: "/".join(f"{error * 1e4:.2g}" for error in r["errors"].values()) or "-",
    ),
}


def table(records: list[Record], value: str) -> str:
    """Cells down, variants across; what is not there is named by its status. What ran nowhere is in `failures`."""
    title, show = VALUES[value]
    found = cells_of(records)
    names = list(dict.fromkeys(column(record) for record in records if record["status"] == "ok"))
    rows = [["case: batch x heads x seq_len", *names]]
    for (case, _, mode), cell in found.items():
        shown = [cell.get(name) for name in names]
        rows.append([f"{case} {mode}", *(_shown(record, show) for record in shown)])
    return f"-- {title}\n{aligned(rows)}"


def _shown(record: Record | None, show: Callable[[Record], str]) -> str:
    if record is None:
        return "-"
    return show(record) if record["status"] == "ok" else record["status"]


def aligned(rows: list[list[str]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            text.rjust(width) if i else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )


def speedups(records: list[Record]) -> str:
    """Geometric means over the lengths of each peer's time over ours (above 1: ours is faster), and of how many."""
    ratios: dict[str, dict[str, list[float]]] = {}
    for (_, _, mode), cell in cells_of(records).items():
        for name, record in cell.items():
            ours = cell.get("ours/none" if name.endswith("/none") else "ours")
            if ours is None or ours is record or {ours["status"], record["status"]} != {"ok"}:
                continue
            lengths = ratios.setdefault(f"{case_of(record).family()} {mode}", {}).setdefault(name, [])
            lengths.append(record["ms"] / ours["ms"])
    names = list(dict.fromkeys(name for family in ratios.values() for name in family))
    rows = [["cases", *names]]
    for family, found in ratios.items():
        rows.append(
            [family, *(f"{geometric_mean(found[n]):.2f} ({len(found[n])})" if n in found else "-" for n in names)]
        )
    return "-- speed of ours over that of each peer, geometric mean (number of lengths)\n" + aligned(rows)


def failures(records: list[Record]) -> str:
    """What did not run and why, each reason once."""
    counts: dict[tuple[str, str, str], int] = {}
    for record in records:
        if record["status"] != "ok":
            key = (column(record), record["status"], record["reason"])
            counts[key] = counts.get(key, 0) + 1
    if not counts:
        return "-- every variant ran in every cell"
    lines = [f"{name}: {status} in {n} cells: {reason}" for (name, status, reason), n in counts.items()]
    return "\n".join(["-- what did not run", *lines])


def verdicts(records: list[Record]) -> str:
    """The figures to reach."""
    rows = [["figure to reach", "verdict", "measured"]]
    rows += [[v.target, v.status, v.measured] for v in judge(records)]
    widths = [max(len(r[i]) for r in rows) for i in range(2)]
    body = "\n".join("  ".join([r[0].ljust(widths[0]), r[1].ljust(widths[1]), r[2]]) for r in rows)
    return "-- figures to reach (norm included: inside our call, compiled F.normalize in front of the peers)\n" + body
