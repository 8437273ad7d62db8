"""Regular against cosine-sim attention in a diffusion transformer on scikit-learn's digits: loss and Frechet distance.

    python -m experiments.image_diffusion --device cuda --seeds 0 1 2            all arms, minutes on a large GPU
    python -m experiments.image_diffusion --seeds 0 --steps 300 --dim 48 --depth 2   a look at it on a CPU
    python -m experiments.image_diffusion --report             table and plots of the results in git

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
from .config import ImageConfig, load_arms
from .data import load_digits
from .report import write_report
from .run import run_missing

RESULTS = sorted(Path(__file__).parent.glob("results*"))


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.report:
        for folder in RESULTS:
            print(f"{folder}\n\n{write_report(folder)}")
        return 0
    with usage_errors(parser):
        config = ImageConfig(**{spec.name: getattr(options, spec.name) for spec in fields(ImageConfig)})
        use_device(options.device)
        digits = load_digits()
    arms = {name: load_arms()[name] for name in options.arms}
    with stop_requested() as asked, closing(bar(len(arms) * len(options.seeds) * config.steps)) as progress:
        stop = deadline(options.seconds, asked)
        if not run_missing(
            config, arms, options.seeds, digits, options.together, options.device, options.out, stop, progress
        ):
            print(f"Stopped. Finished runs are in {options.out}; the same command goes on with the others.")
            return INTERRUPTED
    print(write_report(options.out))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.image_diffusion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_wave_flags(parser, load_arms(), Path("runs/image_diffusion"))
    for spec in fields(ImageConfig):
        flag = "--" + spec.name.replace("_", "-")
        parser.add_argument(flag, type=type(spec.default), default=spec.default, help=f"(default: {spec.default})")
    return parser


if __name__ == "__main__":
    sys.exit(main())
