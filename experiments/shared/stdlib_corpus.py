"""Real text that every machine already has: documentation and sources of the Python standard library.

Held out are whole top-level modules (`email/` with all its files, `argparse.py`): a file, or a neighbour that it was
copied from, is never on both sides. Names are ordered by their hash: the same interpreter always gives the same bytes,
another Python version a slightly different corpus, which `Corpus.sha256` tells apart.
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from pathlib import Path

from .download import DataUnavailableError

MAX_BYTES = 6_000_000
MIN_BYTES = 200_000
HELD_OUT_SHARE = 0.1
SKIPPED = {
    *("site-packages", "dist-packages"),  # not the standard library
    *("test", "tests", "encodings"),  # repetitive: tables and cases made from one template
    *("lib2to3", "distutils"),  # gone since Python 3.12
    *("idlelib", "tkinter", "turtledemo"),  # many Linux distributions package them separately
}


def stdlib_text(max_bytes: int = MAX_BYTES) -> tuple[bytes, bytes]:
    """(training text, held-out text), together at most `max_bytes` and a file."""
    root = Path(sysconfig.get_paths()["stdlib"])
    train, held_out = split_files(root, max_bytes)
    texts = b"".join(path.read_bytes() for path in train), b"".join(path.read_bytes() for path in held_out)
    if len(texts[0]) < MIN_BYTES or not texts[1]:
        raise DataUnavailableError(
            f"expected at least {MIN_BYTES} bytes of Python sources in {root}, got {len(texts[0]) + len(texts[1])}; "
            "give --data PATH of a text file"
        )
    return texts


def split_files(root: Path, max_bytes: int) -> tuple[list[Path], list[Path]]:
    """(training files, held-out files) below `root`, in the order of their names' hashes."""
    train: list[Path] = []
    held_out: list[Path] = []
    total = 0
    for name in sorted(_source_names(root), key=_rank):
        if total >= max_bytes:
            break
        (held_out if _is_held_out(name) else train).append(root / name)
        total += (root / name).stat().st_size
    return train, held_out


def _source_names(root: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in SKIPPED]
        names += [(Path(folder, file).relative_to(root)).as_posix() for file in files if file.endswith(".py")]
    return names


def _is_held_out(name: str) -> bool:
    return _rank(name.split("/")[0]) < HELD_OUT_SHARE


def _rank(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:6], "big") / 2**48
