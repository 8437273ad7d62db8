"""Time and peak memory on the CPU: our call, F.normalize + scaled_dot_product_attention, and plain attention.

    bench_cpu.py                        lengths 512 to 8192, every kind: about ten minutes on two cores
    bench_cpu.py --lengths 512,2048 --kinds full,causal --seconds 1

All variants of a case take turns in one process, so that whatever else the machine does meets them alike. A ratio is
the median over the rounds of one round's ratio. "chunked" forces the path that serves what torch's kernel does not.
Peak memory is what a run allocates beyond its inputs. Writes NAME.json, NAME.txt and NAME.png.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from cpu_cases import KINDS, LENGTHS, PASSES, VARIANTS, Case, Inputs, run_of
from flash_cosine_sim_attention.peak_memory import peak_memory
from tqdm import tqdm

RESULTS = Path(__file__).parent / "results" / "cpu"
MIN_ROUNDS = 3
Record = dict[str, Any]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    def words(text: str) -> list[str]:
        return text.split(",")

    def numbers(text: str) -> list[int]:
        return [int(word) for word in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--lengths", type=numbers, default=list(LENGTHS), help="default: 512,1024,2048,4096,8192")
    add("--kinds", type=words, default=list(KINDS), help=f"of {','.join(KINDS)}; default: all")
    add("--passes", type=words, default=list(PASSES), help=f"of {','.join(PASSES)}; default: all")
    add("--variants", type=words, default=list(VARIANTS), help=f"of {','.join(VARIANTS)}; default: all")
    add("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    add("--rounds", type=int, default=15, help="timed runs of each variant (%(default)s)")
    add("--seconds", type=float, default=6.0, help=f"of a cell; it ends early, but not before {MIN_ROUNDS} rounds")
    add("--threads", type=int, default=torch.get_num_threads(), help="of torch (%(default)s)")
    add("--out", type=Path, default=RESULTS, help="folder (%(default)s)")
    add("--name", help="of the files; default: the dtype")
    parsed = parser.parse_args(arguments)
    for option, allowed in (("kinds", KINDS), ("passes", PASSES), ("variants", tuple(VARIANTS))):
        unknown = set(getattr(parsed, option)) - set(allowed)
        if unknown:
            parser.error(f"--{option}: expected some of {', '.join(allowed)}; got {', '.join(sorted(unknown))}")
    return parsed


def take_turns(runs: dict[str, Callable[[], object]], rounds: int, seconds: float) -> dict[str, list[float]]:
    """{variant: milliseconds of each round}; each round starts with another variant."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    start = time.monotonic()
    for turn in range(rounds):
        names = list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]
        for name in names:
            before = time.perf_counter()
            runs[name]()
            times[name].append((time.perf_counter() - before) * 1e3)
        if turn + 1 >= MIN_ROUNDS and time.monotonic() - start > seconds:
            break
    return times


def measure(inputs: Inputs, which: str, variants: list[str], rounds: int, seconds: float) -> list[Record]:
    """One record for each variant of a cell. Measuring its memory is each variant's warm-up."""
    runs = {name: run_of(VARIANTS[name], inputs, which) for name in variants}
    peaks = {name: peak_memory(run).peak for name, run in runs.items()}
    times = take_turns(runs, rounds, seconds)
    case = inputs.case
    return [
        {"length": case.length, "heads": case.heads, "kind": case.kind, "dtype": case.dtype, "pass": which}
        | {"variant": name, "times_ms": times[name], "ms": statistics.median(times[name]), "peak_bytes": peaks[name]}
        for name in variants
    ]


def ratio(records: list[Record], variant: str, to: str, value: str) -> float | None:
    """Of two variants of one cell: "time" (the median of each round's ratio) or "memory"."""
    cell = {record["variant"]: record for record in records}
    if variant not in cell or to not in cell:
        return None
    if value == "memory":
        return cell[variant]["peak_bytes"] / cell[to]["peak_bytes"]
    pairs = zip(cell[variant]["times_ms"], cell[to]["times_ms"], strict=True)
    return statistics.median(own / other for own, other in pairs)


COLUMNS = {
    "ours / sdpa": ("ours", "normalize + sdpa", "time"),
    "chunked / sdpa": ("chunked", "normalize + sdpa", "time"),
    "ours / plain": ("ours", "plain", "time"),
    "memory: ours / sdpa": ("ours", "normalize + sdpa", "memory"),
    "memory: ours / plain": ("ours", "plain", "memory"),
}


def cells(records: list[Record]) -> list[list[Record]]:
    """Records by case and pass."""
    found: dict[tuple, list[Record]] = {}
    for record in records:
        found.setdefault((record["kind"], record["pass"], record["length"]), []).append(record)
    return list(found.values())


def table(records: list[Record]) -> str:
    head = f"{'kind':14} {'pass':19} {'length':>6} {'ours ms':>9} {'ours MB':>8}  " + "  ".join(COLUMNS)
    lines = [head, "-" * len(head)]
    for cell in cells(records):
        first = cell[0]
        own = next((record for record in cell if record["variant"] == "ours"), first)
        line = f"{first['kind']:14} {first['pass']:19} {first['length']:6} {own['ms']:9.1f} "
        line += f"{own['peak_bytes'] / 2**20:8.1f}  "
        values = [ratio(cell, *column) for column in COLUMNS.values()]
        widths = map(len, COLUMNS)
        line += "  ".join((f"{x:.3f}" if x else "-").rjust(w) for x, w in zip(values, widths, strict=True))
        lines.append(line)
    return "\n".join(lines)


def plot(records: list[Record], title: str, path: Path) -> None:
    """A row of panels for the time and one for the memory of each kind, forward + backward if it was measured."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    which = records[-1]["pass"]
    chosen = [record for record in records if record["pass"] == which]
    kinds = list(dict.fromkeys(record["kind"] for record in chosen))
    figure, axes = pyplot.subplots(2, len(kinds), figsize=(3.4 * len(kinds), 6), squeeze=False, layout="constrained")
    for column, kind in enumerate(kinds):
        for row, (key, unit, factor) in enumerate(
            (("ms", "ms per head", 1.0), ("peak_bytes", "MB per head", 2.0**-20))
        ):
            axis = axes[row, column]
            for variant in dict.fromkeys(record["variant"] for record in chosen):
                own = [r for r in chosen if r["kind"] == kind and r["variant"] == variant]
                points = [(r["length"], r[key] * factor / r["heads"]) for r in own]
                axis.plot(*zip(*points, strict=True), marker="o", ms=3, label=variant)
            axis.set(title=kind, xlabel="length", ylabel=unit, xscale="log", yscale="log")
            axis.set_xticks([r["length"] for r in own], [str(r["length"]) for r in own])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    figure.suptitle(f"{title}: {which}")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    records: list[Record] = []
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / (options.name or options.dtype)
    machine = {"processor": platform.processor() or platform.machine(), "threads": options.threads}
    machine |= {"capability": torch.backends.cpu.get_cpu_capability(), "torch": torch.__version__}
    plan = list(product(options.kinds, options.lengths))
    with tqdm(total=len(plan) * len(options.passes), unit="cell") as progress:
        for kind, length in plan:
            inputs = Inputs.of(Case(length, kind, options.dtype))
            for which in options.passes:
                progress.set_description(f"{inputs.case}, {which}")
                records += measure(inputs, which, options.variants, options.rounds, options.seconds)
                path.with_suffix(".json").write_text(json.dumps({"machine": machine, "records": records}, indent=1))
                progress.update()
    text = "\n".join([", ".join(f"{name} {value}" for name, value in machine.items()), "", table(records)])
    path.with_suffix(".txt").write_text(text + "\n")
    plot(records, f"{options.dtype}, {machine['capability']}, {options.threads} threads", path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
