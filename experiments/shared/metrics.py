"""Bits per byte, their spread over seeds, and the files that numbers are kept in."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

BITS_PER_NAT = 1 / math.log(2)


def mean_and_spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is nan for a single value, which has no spread."""
    return fmean(values), stdev(values) if len(values) > 1 else math.nan


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """One line a row; a column that a row lacks is left empty."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=columns)
        writer.writeheader()
        writer.writerows(rows)


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """A Markdown table with aligned columns, readable as plain text."""
    if not rows:
        return "(nothing to show yet)"
    columns = list(rows[0])
    widths = [max(len(name), *(len(row[name]) for row in rows)) for name in columns]
    lines = [columns, ["-" * width for width in widths], *([row[name] for name in columns] for row in rows)]
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
