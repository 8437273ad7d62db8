"""A text and a model small enough to train in a moment."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from experiments.shared.config import RunConfig
from experiments.shared.data import Corpus, load_corpus

TINY = RunConfig(
    dim=32, depth=2, heads=2, seq_len=32, batch_size=2, steps=8, warmup=2, eval_every=4, eval_batches=2, log_every=2
)  # fmt: skip


@pytest.fixture
def text_file(tmp_path: Path) -> Path:
    """A hundred kilobytes of real text."""
    path = tmp_path / "text.txt"
    path.write_bytes(Path(argparse.__file__).read_bytes()[:100_000])
    return path


@pytest.fixture
def corpus(text_file: Path) -> Corpus:
    return load_corpus(str(text_file))


@pytest.fixture
def tiny() -> Callable[..., RunConfig]:
    """tiny(attention="native", ...) is the tiny configuration with these differences."""
    return lambda **differences: replace(TINY, **differences)


@pytest.fixture
def tiny_flags(text_file: Path, tmp_path: Path) -> list[str]:
    """The same on a command line, writing to tmp_path / "out"."""
    names = ("dim", "depth", "heads", "seq_len", "batch_size", "steps", "warmup", "eval_every", "eval_batches")
    flags = [part for name in names for part in ("--" + name.replace("_", "-"), str(getattr(TINY, name)))]
    return [*flags, "--log-every", "2", "--data", str(text_file), "--out", str(tmp_path / "out")]
