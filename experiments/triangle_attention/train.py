"""Trains every arm on distance completion, several seeds each; writes results.json, summary.md and rmse.png.

    python -m experiments.triangle_attention.train                              minutes on a GPU
    python -m experiments.triangle_attention.train --tiny --device cpu --dtype fp32     a minute on the CPU
    python -m experiments.triangle_attention.train --resume                     goes on where it was stopped
    python -m experiments.triangle_attention.train --report                     table and plot of the results in git

The arms of a seed start from the same weights and see the same batches.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from tqdm import tqdm

from ..shared.config import require_device, usage_errors
from ..shared.interrupt import INTERRUPTED, stop_requested
from ..shared.metrics import write_json
from .network import ARMS
from .report import read_json, rewrite_report, write_report
from .task import Task, constant_rmse, triangle_bounds_rmse
from .training import Setting, Training, held_out_batch

RESULTS = Path(__file__).parent / "results"
TINY = Setting(Task(points=16, fewest=8), dim=32, depth=2, heads=2, batch_size=4, steps=60, eval_every=20, eval_size=16)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.report:
        print(rewrite_report(RESULTS))
        return 0
    with usage_errors(parser):
        require_device(options.device)
    setting = replace(TINY if options.tiny else Setting(), dtype=options.dtype, device=options.device)
    setting = replace(setting, steps=options.steps or setting.steps)
    with stop_requested() as asked:
        deadline = time.monotonic() + options.seconds
        finished = run_all(setting, options, lambda: asked() or time.monotonic() > deadline)
    if not finished:
        print(f"Stopped; saved in {options.out}. The same command with --resume goes on.")
        return INTERRUPTED
    print(write_report(options.out, reference(setting)))
    return 0


def run_all(setting: Setting, options: argparse.Namespace, should_stop: Callable[[], bool]) -> bool:
    """One file for each (arm, seed) in out/runs; False if stopped before the last."""
    runs: Path = options.out / "runs"
    runs.mkdir(parents=True, exist_ok=True)
    jobs = [(name, seed) for seed in options.seeds for name in options.arms]
    for name, seed in tqdm(jobs, desc="runs", mininterval=5):
        path = runs / f"{name.replace(', ', '-')}-seed{seed}.json"
        if options.resume and path.exists() and read_json(path)["setting"] == asdict(setting):
            continue
        if not run_one(Training(name, setting, seed), path, options.resume, should_stop):
            return False
    return True


def run_one(training: Training, path: Path, resume: bool, should_stop: Callable[[], bool]) -> bool:
    """Trains to the end and writes the result to `path`; a checkpoint lies beside it meanwhile. False if stopped."""
    checkpoint = path.with_suffix(".pt")
    if resume and checkpoint.exists():
        training.load(checkpoint)
    while not training.finished:
        if should_stop():
            return False
        training.run_to_next_row()
        training.save(checkpoint)
    write_json(path, training.result())
    checkpoint.unlink(missing_ok=True)
    return True


def reference(setting: Setting) -> dict[str, float]:
    """RMSE without learning: of the best constant, and of the middle between the triangle inequality's bounds."""
    batch = held_out_batch(setting)
    return {"constant": constant_rmse(batch), "middle of the triangle bounds": triangle_bounds_rmse(batch)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.triangle_attention.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS), metavar="ARM")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help=f"(default: {Setting.steps})")
    parser.add_argument("--tiny", action="store_true", help="16 points, two small blocks: a minute on the CPU")
    parser.add_argument("--dtype", choices=("bf16", "fp32"), default="bf16", help="bf16: autocast")
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="stop after so long, to go on with --resume"
    )
    parser.add_argument("--resume", action="store_true", help="keep finished runs, go on with a stopped one")
    parser.add_argument(
        "--report", action="store_true", help="no training: table and plot of results/results.json again"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/triangle_attention"))
    return parser


if __name__ == "__main__":
    sys.exit(main())
