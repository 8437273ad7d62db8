"""Time and memory of a whole training step of one x-transformers model, with the plugin and without.

    python bench_training_step.py                                   the size of GPT-2 small, on the GPU
    python bench_training_step.py --lengths 4096 --compile          torch.compile of the whole model beside it

Forward, backward and AdamW, bfloat16 autocast, the same number of tokens a step at every length. All arms start from
the same weights and see the same tokens. NAME.json, NAME.txt and NAME.png are written to --out.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from training_arms import ARMS, POSITIONS, Arm, Size, TrainingStep
from training_report import draw, table
from training_timer import Record, copy_rate, measure, measure_memory

RESULTS = Path(__file__).parent / "results" / "h200"
LOSS_TOLERANCE = 0.02
"""Arms of the same function agree in their first loss, of about ln(vocabulary) = 11, to this."""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    size = Size(options.dim, options.depth, options.heads, options.dim_head, options.vocab, options.positions)
    run: dict[str, Any] = {"meta": describe(options, size), "records": []}
    options.out.mkdir(parents=True, exist_ok=True)
    for seq_len in options.lengths:
        for records in measure_length(size, seq_len, options):
            run["records"] += records
            (options.out / f"{options.name}.json").write_text(json.dumps(run, indent=1) + "\n")
    require_equal_losses(run["records"])
    text = table(run)
    (options.out / f"{options.name}.txt").write_text(text + "\n")
    print("\n" + text)
    if options.plot:
        draw(run, options.out / f"{options.name}.png")
    return 0


def measure_length(size: Size, seq_len: int, options: argparse.Namespace) -> Iterator[list[Record]]:
    """One record for each arm: those that fit side by side take turns, the plain ones come after, one by one."""
    batch = max(1, options.tokens // seq_len)
    names = [name for name in ARMS if name in options.arms]
    chosen = [(name, ARMS[name], False) for name in names]
    if options.compile:
        chosen += [(name, ARMS[name], True) for name in names if ARMS[name].worth_compiling]
    together = [arm for arm in chosen if not arm[1].stores_matrix]
    torch._dynamo.reset()  # graphs of another length are of no use, and their number is limited
    yield _measure_together(together, size, seq_len, batch, options)
    for arm in chosen:
        if arm[1].stores_matrix:
            yield _measure_together([arm], size, seq_len, batch, options)


def _measure_together(
    arms: Sequence[tuple[str, Arm, bool]], size: Size, seq_len: int, batch: int, options: argparse.Namespace
) -> list[Record]:
    prepared, records = [], []
    for name, arm, compiled in arms:
        record: Record = {"arm": name, "compiled": compiled, "seq_len": seq_len, "batch": batch}
        records.append(record)
        step = measure_memory(record, lambda arm=arm, compiled=compiled: TrainingStep(  # type: ignore[misc]
            arm, size, seq_len, batch, options.device, compiled
        ))  # fmt: skip
        if step is not None:
            prepared.append((record, step))
    measure(prepared, options.rounds, f"{seq_len} tokens", options.device)
    for record, step in prepared:
        fused, stock = step.calls()
        record |= {"fused_calls": fused, "stock_calls": stock}
        if ARMS[record["arm"]].enable is not None and (stock or not fused):
            raise RuntimeError(f"{record['arm']}: expected fused calls only, got {fused} fused and {stock} stock")
    return records


def require_equal_losses(records: Sequence[Record]) -> None:
    """RuntimeError if an arm computes another function than the others of its kind."""
    kinds: dict[tuple[int, str], list[Record]] = {}
    for record in records:
        if "loss" in record:
            kinds.setdefault((record["seq_len"], ARMS[record["arm"]].function), []).append(record)
    for (seq_len, function), same in kinds.items():
        losses = [record["loss"] for record in same]
        if not max(losses) - min(losses) <= LOSS_TOLERANCE:
            found = ", ".join(f"{record['arm']} {record['loss']:.4f}" for record in same)
            raise RuntimeError(f"{function} at {seq_len} tokens: expected equal first losses, got {found}")


def describe(options: argparse.Namespace, size: Size) -> dict[str, Any]:
    """Where and of what the figures are."""
    cuda = options.device == "cuda"
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "torch": torch.__version__,
        "x_transformers": version("x-transformers"),
        "model": size.describe(),
        "tokens": options.tokens,
        "dtype": "bfloat16 autocast",
        "optimizer": "AdamW, fused",
        "copy_tb_per_s": copy_rate() if cuda else None,
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=_lengths, default=[1024, 4096, 8192], help="(default: 1024,4096,8192)")
    parser.add_argument("--tokens", type=int, default=16384, help="tokens a step: batch = tokens / length")
    parser.add_argument("--rounds", type=int, default=10, help="steps timed of each arm")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM", help="of the table")
    parser.add_argument("--compile", action="store_true", help="torch.compile of the whole model too")
    for name, default in {"dim": 768, "depth": 12, "heads": 12, "dim-head": 64, "vocab": 50257}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--positions", choices=list(POSITIONS), default="absolute")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--name", default="training-step")
    parser.add_argument("--no-plot", dest="plot", action="store_false")
    return parser


def _lengths(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


if __name__ == "__main__":
    raise SystemExit(main())
