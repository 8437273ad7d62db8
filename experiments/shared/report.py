"""What a comparison says: the table, the difference against the spread over seeds, and the files that hold them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .data import Corpus, unigram_entropy
from .environment import environment
from .grid import Results
from .metrics import mean_and_spread, table, write_csv, write_json
from .plot import plot_losses


def write_report(results: Results, corpus: Corpus, out: Path) -> str:
    """Writes summary.md, results.json, metrics.csv, loss.png and sample-ARM.txt into `out`; returns the summary."""
    unigram = unigram_entropy(corpus)
    summary = "\n\n".join([_heading(results, corpus, unigram), _table(results), *_differences(results)]) + "\n"
    (out / "summary.md").write_text(summary, encoding="utf-8")
    write_json(out / "results.json", {"environment": environment(), "unigram_bpb": unigram, "arms": results})
    rows = [
        {"arm": arm, "seed": result["config"]["seed"], **row}
        for arm, seeds in results.items()
        for result in seeds
        for row in result["rows"]
    ]
    write_csv(out / "metrics.csv", rows)
    curves = {arm: [result["rows"] for result in seeds] for arm, seeds in results.items()}
    plot_losses(out / "loss.png", curves, corpus.name, unigram)
    for arm, seeds in results.items():
        (out / f"sample-{arm}.txt").write_text(seeds[0]["sample"], encoding="utf-8")
    return summary


def _heading(results: Results, corpus: Corpus, unigram: float) -> str:
    first = next(iter(results.values()))[0]
    config = first["config"]
    return (
        f"{corpus.describe()}\n"
        f"{first['parameters']:,} parameters, {config['steps']} steps of {config['batch_size']} x {config['seq_len']} "
        f"bytes, {config['dtype']} on {config['device']}\n"
        f"unigram entropy {unigram:.3f} bits per byte: what a model without context would reach"
    )


def _table(results: Results) -> str:
    return table([_table_row(arm, seeds) for arm, seeds in results.items()])


def _table_row(arm: str, seeds: list[dict[str, Any]]) -> dict[str, str]:
    fused = seeds[0]["config"]["attention"] == "cosine"
    return {
        "attention": arm,
        "bits per byte": _plus_minus([result["val_bpb"] for result in seeds]),
        "each seed": ", ".join(f"{result['val_bpb']:.3f}" for result in seeds),
        "ms per step": _average(seeds, "ms_per_step", "{:.1f}"),
        "tokens/s": _average(seeds, "tokens_per_s", "{:,.0f}"),
        "peak memory": _average([{"MB": result["peak_memory"] / 1e6} for result in seeds], "MB", "{:.1f} MB"),
        "fused calls": f"{sum(result['fused_calls'] for result in seeds):,}" if fused else "-",
        "stock calls": f"{sum(result['stock_calls'] for result in seeds):,}" if fused else "all",
    }


def _average(results: list[dict[str, Any]], name: str, form: str) -> str:
    values = [result[name] for result in results if result[name] is not None]
    return form.format(mean_and_spread(values)[0]) if values else "-"


def _plus_minus(values: list[float]) -> str:
    mean, spread = mean_and_spread(values)
    return f"{mean:.3f}" if math.isnan(spread) else f"{mean:.3f} +- {spread:.3f}"


def _differences(results: Results) -> list[str]:
    """Each arm against the first, seed by seed: the pairs share data order and initial weights."""
    (reference, reference_seeds), *others = results.items()
    lines = []
    for arm, seeds in others:
        pairs = zip(seeds, reference_seeds, strict=True)
        mean, spread = mean_and_spread([one["val_bpb"] - other["val_bpb"] for one, other in pairs])
        lines.append(f"{arm} - {reference}: {mean:+.4f} bits per byte. {_verdict(mean, spread, len(seeds))}")
    return lines


def _verdict(mean: float, spread: float, seeds: int) -> str:
    """A difference is called one only beyond twice its standard error; two seeds can only hint."""
    if math.isnan(spread):
        return "One seed says nothing about the spread."
    error = spread / math.sqrt(seeds)
    inside = "within" if abs(mean) <= 2 * error else "beyond"
    few = " With so few seeds this is a hint; --seeds 5 tells more." if seeds < 4 else ""
    return f"Paired by seed its standard error is {error:.4f}: {inside} twice that.{few}"
