"""Packs a wheel with the compiled library in it: py3-none-<platform>, for every Python and every torch from 2.10 on.

python -m flash_cosine_sim_attention._build.wheel [--arch 80+ 90a] [--only forward d64 ...] [--out dist]
"""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from . import BuildError
from .__main__ import add_options, build
from .spec import CSRC

PROJECT = CSRC.parents[2]


def platform_tag() -> str:
    """The library needs the C library of the machine that it was linked on, or a later one."""
    name, version = platform.libc_ver()
    machine = platform.machine()
    if name != "glibc":
        return f"linux_{machine}"
    return f"manylinux_{version.replace('.', '_')}_{machine}"


def pack(out: Path) -> Path:
    """The wheel of the source tree as it is, library included. Raises BuildError."""
    if not (PROJECT / "pyproject.toml").exists():
        raise BuildError(
            f"{PROJECT}: expected the source tree with pyproject.toml; an installed package packs no wheel"
        )
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", str(out), str(PROJECT)]
    options = f"--config-settings=--build-option=--plat-name={platform_tag()}"
    shutil.rmtree(PROJECT / "build", ignore_errors=True)  # what an earlier build left there would go into this wheel
    result = subprocess.run([*command, options], capture_output=True, text=True)
    shutil.rmtree(PROJECT / "build", ignore_errors=True)
    if result.returncode != 0:
        raise BuildError(f"pip wheel failed:\n{result.stdout[-2000:]}\n{result.stderr[-2000:]}")
    wheels = sorted(out.glob(f"*-py3-none-{platform_tag()}.whl"), key=lambda path: path.stat().st_mtime)
    if not wheels:
        raise BuildError(f"{out}: no wheel tagged py3-none-{platform_tag()} came out of:\n{result.stdout[-2000:]}")
    return wheels[-1]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    add_options(parser)
    parser.add_argument("--out", type=Path, default=Path("dist"), help="folder of the wheel")
    options = parser.parse_args(arguments)
    try:
        build(parser, options)
        wheel = pack(options.out.resolve())
    except BuildError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{wheel}: {wheel.stat().st_size / 2**20:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
