"""Tables that answer a question: each arm with its interval over seeds, and the paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from .metrics import table
from .results_file import config_of

STUDENT_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % quantiles for 1 to 10 degrees of freedom: a 95 % interval on both sides."""

Seeds = dict[int, float]  # seed -> bits per byte; nan for a run that diverged
Finals = dict[str, dict[float, Seeds]]  # arm -> learning rate -> seeds


def described(content: Mapping[str, Any]) -> str:
    """What all runs of a results file have in common."""
    base, place = content["base"], content["environment"]
    sizes = sorted({run["parameters"] for run in content["runs"]})
    kind = "decoder.py, seeds as one" if base["model"] == "ensemble" else "x-transformers"
    return (
        f"{content['corpus']['name']}, {kind}: {base['depth']} layers of width {base['dim']}, {base['heads']} heads, "
        f"{sizes[0]:,} parameters; {base['steps']} steps of {base['batch_size']} x {base['seq_len']} bytes, "
        f"{base['dtype']}, {place['gpu'] or place['machine'] + ' CPU'}, PyTorch {place['torch']}"
    )


def finals(content: Mapping[str, Any]) -> Finals:
    """Held-out bits per byte at the last step of every run."""
    found: Finals = {}
    for run in content["runs"]:
        config = config_of(content, run)
        value = run.get("val_bpb")
        rate = found.setdefault(run["arm"], {}).setdefault(config["lr"], {})
        rate[config["seed"]] = math.nan if value is None else value
    return found


def best_rate(rates: Mapping[float, Seeds]) -> float:
    """The learning rate with the lowest mean, one at which no run diverged if there is one."""
    means = {rate: fmean(seeds.values()) for rate, seeds in rates.items()}
    return min(means, key=lambda rate: math.inf if math.isnan(means[rate]) else means[rate])


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its 95 % interval over seeds (Student's t); nan for one value."""
    count = len(values)
    if count < 2:
        return fmean(values), math.nan
    quantile = STUDENT_T[min(count - 1, len(STUDENT_T)) - 1]
    return fmean(values), quantile * stdev(values) / math.sqrt(count)


def paired(one: Seeds, other: Seeds) -> list[float]:
    """Differences of the runs that share a seed, and with it data order and, as far as they go, initial weights."""
    return [one[seed] - other[seed] for seed in sorted(one) if seed in other]


def arm_table(results: Finals, order: Sequence[str]) -> str:
    """One row an arm, one column a learning rate."""
    rates = sorted({rate for rates in results.values() for rate in rates})
    rows = []
    for arm in order:
        if arm not in results:
            continue
        mine = results[arm]
        best = best_rate(mine)
        cells = {f"lr {rate:g}": _cell(mine.get(rate), bold=len(rates) > 1 and rate == best) for rate in rates}
        rows.append({"arm": arm, **cells, "seeds": str(max(map(len, mine.values())))})
    return table(rows)


def pair_table(results: Finals, pairs: Sequence[tuple[str, str]]) -> str:
    """Differences of the pairs, each arm at its best of the learning rates that both have and, of several, at each."""
    rates = sorted({rate for rates in results.values() for rate in rates})
    rows = []
    for one, other in pairs:
        if one not in results or other not in results:
            continue
        first, second = (
            {rate: results[arm][rate] for rate in rates if rate in results[one] and rate in results[other]}
            for arm in (one, other)
        )
        best = paired(first[best_rate(first)], second[best_rate(second)]) if first else []
        row = {"difference, bits per byte": f"{one} - {other}", "each at its best lr": _difference(best)}
        if len(rates) > 1:
            for rate in rates:
                row[f"both at lr {rate:g}"] = _difference(
                    paired(results[one].get(rate, {}), results[other].get(rate, {}))
                )
        rows.append(row)
    return table(rows)


def _cell(seeds: Seeds | None, bold: bool) -> str:
    if not seeds:
        return "-"
    finite = [value for value in seeds.values() if math.isfinite(value)]
    if len(finite) < len(seeds):
        return f"{len(seeds) - len(finite)} of {len(seeds)} diverged"
    mean, half = interval(finite)
    text = f"{mean:.4f}" if math.isnan(half) else f"{mean:.4f} +- {half:.4f}"
    return f"**{text}**" if bold else text


def _difference(values: Sequence[float]) -> str:
    """With its interval; bold where that excludes 0."""
    if not values:
        return "-"
    if not all(map(math.isfinite, values)):
        return "diverged"
    mean, half = interval(values)
    if math.isnan(half):
        return f"{mean:+.4f}"
    text = f"{mean:+.4f} +- {half:.4f}"
    return f"**{text}**" if abs(mean) > half else text
