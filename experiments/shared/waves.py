"""Experiments of many short runs: one JSON file a run, finished ones are kept, missing ones train at once."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .metrics import mean_and_spread

Result = dict[str, Any]
LOG_FILE_INTERVAL_S = 15  # where nobody watches the bar
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 12: 2.20}
"""Number of values -> Student's t of a two-sided 95 % interval."""


def write_result(folder: Path, name: str, result: Result) -> None:
    """Whole or not there; one line a value of a list would make the file a thousand lines."""
    folder.mkdir(parents=True, exist_ok=True)
    aside = folder / f"{name}.tmp"
    aside.write_text(json.dumps(result, separators=(",", ":")) + "\n", encoding="utf-8")
    aside.replace(folder / f"{name}.json")


def read_results(folder: Path) -> list[Result]:
    """All runs in `folder`, in the order of their names."""
    return [json.loads(path.read_text("utf-8")) for path in sorted(folder.glob("*.json"))]


def is_done(folder: Path, name: str, identity: Result) -> bool:
    """Whether the run is there. ValueError if there is another one under its name."""
    path = folder / f"{name}.json"
    if not path.is_file():
        return False
    found = json.loads(path.read_text("utf-8"))
    for field, value in identity.items():
        if found.get(field) != value:
            raise ValueError(f"{path}: expected {field} = {value!r}, got {found.get(field)!r}; use another --out")
    return True


def waves(missing: Mapping[str, tuple[int, ...]], together: int) -> list[tuple[list[str], tuple[int, ...]]]:
    """missing: arm -> seeds. Arms that train at once, at most `together` of them, all with the same seeds."""
    found = []
    for seeds in dict.fromkeys(seeds for seeds in missing.values() if seeds):
        names = [name for name, mine in missing.items() if mine == seeds]
        found += [(names[first : first + together], seeds) for first in range(0, len(names), together)]
    return found


def by_arm(results: Iterable[Result], arms: Iterable[str]) -> dict[str, list[Result]]:
    """Runs of each arm that has any, in the order of `arms`, by seed."""
    found: dict[str, list[Result]] = {name: [] for name in arms}
    for run in sorted(results, key=lambda run: run["seed"]):
        found[run["arm"]].append(run)
    return {name: runs for name, runs in found.items() if runs}


def paired(runs: Iterable[Result], reference: Iterable[Result]) -> list[tuple[Result, Result]]:
    """Runs of the same seed: they share data, and what of the first weights they have in common."""
    others = {run["seed"]: run for run in reference}
    return [(run, others[run["seed"]]) for run in runs if run["seed"] in others]


def interval(values: Sequence[float], digits: int = 3, sign: bool = False) -> str:
    """Mean and half width of the 95 % interval over seeds (Student's t)."""
    mean, spread = mean_and_spread(values)
    first = f"{mean:+.{digits}f}" if sign else f"{mean:.{digits}f}"
    if len(values) < 2:
        return first
    return f"{first} +- {T_95.get(len(values), 2.1) * spread / len(values) ** 0.5:.{digits}f}"


def deadline(seconds: float, asked: Callable[[], bool]) -> Callable[[], bool]:
    """Whether to stop: a signal asked for it, or `seconds` (0: any number) have passed since this call."""
    began = time.monotonic()
    return lambda: asked() or (seconds > 0 and time.monotonic() - began > seconds)


def bar(total: int) -> tqdm:
    """Over steps of single runs."""
    seconds = 0.2 if sys.stderr.isatty() else LOG_FILE_INTERVAL_S
    return tqdm(total=total, unit="step", mininterval=seconds, maxinterval=seconds, dynamic_ncols=True)


def add_wave_flags(parser: argparse.ArgumentParser, arms: Iterable[str], out: Path) -> None:
    """--out, --arms, --seeds, --together, --device, --seconds, --report."""
    names = list(arms)
    parser.add_argument("--out", type=Path, default=out, help=f"runs that are there are kept (default: {out})")
    parser.add_argument("--arms", nargs="+", choices=names, default=names, help="(default: all of arms.toml)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="training seeds (default: 0 1 2)")
    parser.add_argument("--together", type=int, default=3, help="arms that train at once (default: 3)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: cpu)")
    parser.add_argument("--seconds", type=float, default=0, help="stop after so long; 0: never (default)")
    parser.add_argument("--report", action="store_true", help="train nothing: table and plots of the results in git")
