"""The main job: the same small model trained with regular and with cosine-sim attention, on real text.

    python -m experiments.compare                                                  five minutes on two CPU cores
    python -m experiments.compare --device cuda --dtype bf16 --dim 512 --depth 8 --seq-len 4096 --steps 2000

Both arms start from the same weights and see the same bytes in the same order; only the attention differs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .shared.config import ARMS, RunConfig, add_flags, given, usage_errors
from .shared.data import load_corpus
from .shared.grid import require_fused, run_grid
from .shared.interrupt import INTERRUPTED, stop_requested
from .shared.report import write_report


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    out: Path = options.out
    with usage_errors(parser):
        base = RunConfig(**given(options))
        corpus = load_corpus(base.data)
    out.mkdir(parents=True, exist_ok=True)
    print(corpus.describe())
    with stop_requested() as should_stop:
        arms = {name: ARMS[name] for name in options.arms}
        results = run_grid(base, arms, range(options.seeds), corpus, out, should_stop, options.resume)
    if results is None:
        print(f"Stopped; saved in {out}. The same command with --resume goes on.")
        return INTERRUPTED
    require_fused(results)
    print("\n" + write_report(results, corpus, out))
    for arm, seeds in results.items():
        print(f"--- {arm} writes ---\n{seeds[0]['sample']}")
    print(f"Written to {out}: summary.md, results.json, metrics.csv, loss.png, sample-ARM.txt")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.compare",
        usage="%(prog)s [flags]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        choices=list(ARMS),
        default=["regular", "cosine"],
        help="the first is what others are held to",
    )
    parser.add_argument("--seeds", type=_at_least_one, default=2, help="runs an arm (default: 2)")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"), help="(default: runs/compare)")
    parser.add_argument("--resume", action="store_true", help="keep finished runs in --out, go on with a stopped one")
    add_flags(parser, skip=("model", "attention", "seed"))
    return parser


def _at_least_one(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


if __name__ == "__main__":
    sys.exit(main())
