"""Sharpness: two-layer models that look up one place among n, by the attention's scale and the length.

    python -m experiments.sharpness --device cuda --seeds 0 1 2 3         all tasks and arms, minutes on a large GPU
    python -m experiments.sharpness --seeds 0 --tasks recall --arms regular cosine-s8 --longest 2048   minutes on a CPU
    python -m experiments.sharpness --report             table and plots of the results in git

Runs whose results are in --out are not repeated.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from contextlib import closing
from dataclasses import fields
from pathlib import Path

from ..shared.captured import use_device
from ..shared.config import usage_errors
from ..shared.interrupt import INTERRUPTED, stop_requested
from ..shared.waves import add_wave_flags, bar, deadline
from .config import SharpnessConfig, load_arms
from .report import write_report
from .run import run_missing
from .tasks import TASKS

RESULTS = sorted(Path(__file__).parent.glob("results*"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.report:
        for folder in RESULTS:
            print(f"{folder}\n\n{write_report(folder)}")
        return 0
    with usage_errors(parser):
        config = SharpnessConfig(**{spec.name: getattr(options, spec.name) for spec in fields(SharpnessConfig)})
        use_device(options.device)
    arms = {name: load_arms()[name] for name in options.arms}
    total = len(options.tasks) * len(arms) * len(options.seeds) * config.steps
    with stop_requested() as asked, closing(bar(total)) as progress:
        stop = deadline(options.seconds, asked)
        if not run_missing(
            config, options.tasks, arms, options.seeds, options.together, options.device, options.out, stop, progress
        ):
            print(f"Stopped. Finished runs are in {options.out}; the same command goes on with the others.")
            return INTERRUPTED
    print(write_report(options.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.sharpness",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_wave_flags(parser, load_arms(), Path("runs/sharpness"))
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), help="(default: all)")
    for spec in fields(SharpnessConfig):
        flag = "--" + spec.name.replace("_", "-")
        parser.add_argument(flag, type=type(spec.default), default=spec.default, help=f"(default: {spec.default})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
