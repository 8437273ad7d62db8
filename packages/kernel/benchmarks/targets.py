"""The figures that the kernels are to reach on an H200, each computed from the records of a run.

The norm is included on both sides: ours is one call, the peers have a compiled F.normalize in front.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from measure import Record, geometric_mean
from presets import PRESETS, Case, case_of

Cell = tuple[Case, str]
"""A case and a mode."""


@dataclass(frozen=True)
class Verdict:
    """status: "holds", "does not hold", "incomplete" (what was measured holds, some is missing) or "not measured"."""

    target: str
    status: str
    measured: str


class Table:
    """The records of a run by cell and the way of normalising."""

    def __init__(self, records: list[Record]) -> None:
        self._cells: dict[tuple[Cell, str], dict[str, Record]] = {}
        for record in records:
            cell = (case_of(record), record["mode"])
            self._cells.setdefault((cell, record["norm"]), {})[record["peer"]] = record

    def ours(self, cell: Cell) -> Record | None:
        """With the norm inside the call."""
        return self._cells.get((cell, "fused"), {}).get("ours")

    def peers(self, cell: Cell, names: tuple[str, ...] = (), norm: str = "compiled") -> list[Record]:
        """Those of `names` (all but ours if none are named) that could be timed."""
        found = self._cells.get((cell, norm), {})
        names = names or tuple(name for name in found if not name.startswith("ours"))
        return [found[name] for name in names if name in found and found[name]["status"] == "ok"]


Measure = Callable[[Table, Cell], "float | None"]
"""The figure of one cell, None if it cannot be known from this run."""


@dataclass(frozen=True)
class Target:
    """`measure` of every cell is at least (or at most) `bound`."""

    text: str
    cells: tuple[Cell, ...]
    measure: Measure
    bound: float
    at_most: bool = False
    unit: str = "x"

    def judge(self, table: Table) -> Verdict:
        """A cell in which our own call failed does not hold, whatever the others did."""
        failed = [cell for cell in self.cells if (ours := table.ours(cell)) and ours["status"] != "ok"]
        values = {cell: self.measure(table, cell) for cell in self.cells if cell not in failed}
        known = {cell: value for cell, value in values.items() if value is not None}
        measured = self.describe(known)
        if failed:
            reason = (table.ours(failed[0]) or {}).get("reason")
            return Verdict(self.text, "does not hold", f"{measured}; ours failed in {len(failed)}: {reason}")
        if not known:
            return Verdict(self.text, "not measured", "")
        if not all(self.holds(value) for value in known.values()):
            return Verdict(self.text, "does not hold", measured)
        return Verdict(self.text, "holds" if len(known) == len(self.cells) else "incomplete", measured)

    def holds(self, value: float) -> bool:
        return value <= self.bound if self.at_most else value >= self.bound

    def describe(self, known: dict[Cell, float]) -> str:
        if not known:
            return f"0 of {len(self.cells)} cells"
        worst = (max if self.at_most else min)(known, key=lambda cell: known[cell])
        held = sum(map(self.holds, known.values()))
        mean = f"mean {geometric_mean(list(known.values())):.2f}x, " if self.unit == "x" else ""
        value = f"{known[worst]:.2f}x" if self.unit == "x" else f"{known[worst]:.1e}"
        where = f"{worst[0]} {worst[1]}"
        return f"worst {value} ({where}), {mean}{held} of {len(known)} cells; {len(self.cells) - len(known)} missing"


def speed_over(*names: str, norm: str = "compiled") -> Measure:
    """Time of the fastest of the named peers (of all peers) over ours; None unless all that are named were timed.

    norm: how the peers normalise; with "none" theirs is attention alone, while the norm is in our time."""

    def measure(table: Table, cell: Cell) -> float | None:
        ours, peers = table.ours(cell), table.peers(cell, names, norm)
        if ours is None or not peers or len(peers) < len(names):
            return None
        return min(peer["ms"] for peer in peers) / ours["ms"]

    return measure


def memory_over(name: str) -> Measure:
    """Our peak extra memory over that of the named peer."""

    def measure(table: Table, cell: Cell) -> float | None:
        ours, peers = table.ours(cell), table.peers(cell, (name,))
        if ours is None or not peers or not ours["peak_bytes"] or not peers[0]["peak_bytes"]:
            return None
        return ours["peak_bytes"] / peers[0]["peak_bytes"]

    return measure


def largest_error(table: Table, cell: Cell) -> float | None:
    """Of our out, dq, dk, dv, relative, against float64."""
    ours = table.ours(cell)
    return max(ours["errors"].values()) if ours is not None and ours["errors"] else None


def cells(preset: str, modes: tuple[str, ...], **wanted: Any) -> tuple[Cell, ...]:
    """The preset's cells whose case has one of the `wanted` values in each field named."""
    assert set(wanted) <= {field.name for field in fields(Case)}
    chosen = [c for c in PRESETS[preset].cases() if all(getattr(c, name) in wanted[name] for name in wanted)]
    return tuple((case, mode) for case in chosen for mode in modes)


BOTH = ("fwd", "fwd+bwd")
CHECKED = (1024, 2048, 4096, 8192)  # what `inputs.CHECKED_LENGTH` lets be compared with float64


def pair_cells(mode: str) -> tuple[Cell, ...]:
    return cells("pair_bias", (mode,), dtype=("bf16",), seq_len=(128, 256, 384))


TARGETS = (
    Target(
        "fp16/bf16 d64/d128 1k-16k full/causal, fwd >= 1.1x FA2", cells("long16k", ("fwd",)), speed_over("fa2"), 1.1
    ),
    Target("the same, fwd+bwd >= 1.05x FA2", cells("long16k", ("fwd+bwd",)), speed_over("fa2"), 1.05),
    Target("classic n 512, fwd >= best peer", cells("classic", ("fwd",), seq_len=(512,)), speed_over(), 1.0),
    Target("classic n 512, fwd+bwd >= best peer", cells("classic", ("fwd+bwd",), seq_len=(512,)), speed_over(), 1.0),
    Target("fp32 d64 n 2048, 8192 >= 2.5x SDPA efficient", cells("fp32", BOTH), speed_over("efficient"), 2.5),
    Target("fp32 relative error <= 2e-6", cells("fp32", BOTH), largest_error, 2e-6, at_most=True, unit=""),
    Target("key mask 25 %, n 2048, > cuDNN and FlexAttention", cells("mask", BOTH), speed_over("cudnn", "flex"), 1.0),
    Target(
        "peak memory fwd+bwd, n 16384 <= 1.2x FA2", cells("memory", ("fwd+bwd",)), memory_over("fa2"), 1.2, at_most=True
    ),
    Target("pair bias fwd >= 1.2x best peer without norm", pair_cells("fwd"), speed_over(norm="none"), 1.2),
    Target("pair bias fwd+bwd >= 1.3x best peer without norm", pair_cells("fwd+bwd"), speed_over(norm="none"), 1.3),
    Target("pair bias fwd+bwd >= 3x best peer with eager norm", pair_cells("fwd+bwd"), speed_over(norm="eager"), 3.0),
    Target(
        "pair bias fp32 fwd+bwd n 384 >= 3x best peer without norm",
        cells("pair_bias", ("fwd+bwd",), dtype=("fp32",), seq_len=(384,)),
        speed_over(norm="none"),
        3.0,
    ),
    Target(
        "dense bias fwd <= 1.5x the time of FlexAttention",
        cells("dense_bias", ("fwd",), bias=("hij",)),
        speed_over("flex"),
        1 / 1.5,
    ),
    Target(
        "dense bias fwd+bwd <= 1.5x the time of FlexAttention",
        cells("dense_bias", ("fwd+bwd",), bias=("hij",)),
        speed_over("flex"),
        1 / 1.5,
    ),
    Target(
        "dense bias fwd+bwd <= 1.5x the time of FlexAttention without norm",
        cells("dense_bias", ("fwd+bwd",), bias=("hij",)),
        speed_over("flex", norm="none"),
        1 / 1.5,
    ),
    Target(
        "bf16 relative error with norm <= 30e-4",
        cells("long16k", BOTH, dtype=("bf16",), seq_len=CHECKED),
        largest_error,
        30e-4,
        at_most=True,
        unit="",
    ),
)


def judge(records: list[Record]) -> list[Verdict]:
    """A verdict for each target, from whatever cells the records hold."""
    table = Table(records)
    return [target.judge(table) for target in TARGETS]
