"""Builds the kernels ahead of time, into the package.

python -m flash_cosine_sim_attention._build [--arch 80+ 90a] [--only forward d64 ...] [--remove]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..variants import VARIANTS
from . import BuildError
from .aot import build_library, remove_library
from .spec import DEFAULT_ARCHS


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--arch", nargs="+", default=DEFAULT_ARCHS, help="compute capabilities; 80+ adds PTX")
    parser.add_argument("--only", nargs="+", default=(), help="variants whose names contain all of these; default: all")
    parser.add_argument("--jobs", type=int, help="compilers at once; default: the number of CPU cores")


def build(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Path:
    """The library that the options ask for. Raises BuildError."""
    variants = [variant for variant in VARIANTS if all(part in variant.name for part in options.only)]
    if not variants:
        parser.error(f"--only {' '.join(options.only)}: no variant is called so")
    library = build_library(options.arch, variants, jobs=options.jobs)
    print(f"{library}: {len(variants)} launchers, {library.stat().st_size / 2**20:.1f} MB")
    return library


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_options(parser)
    parser.add_argument("--remove", action="store_true", help="remove the library from the package and build nothing")
    options = parser.parse_args(arguments)
    if options.remove:
        remove_library()
        return 0
    try:
        build(parser, options)
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
