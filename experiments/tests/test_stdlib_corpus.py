from __future__ import annotations

import random
import sysconfig
from pathlib import Path

import pytest

from experiments.shared import stdlib_corpus
from experiments.shared.data import load_corpus
from experiments.shared.download import DataUnavailableError
from experiments.shared.stdlib_corpus import MAX_BYTES, split_files, stdlib_text

ROOT = Path(sysconfig.get_paths()["stdlib"])


def test_the_default_corpus_is_the_same_each_time_and_large_enough():
    first, second = load_corpus("stdlib"), load_corpus("stdlib")
    assert first.sha256 == second.sha256
    assert 1_000_000 < len(first.train) + len(first.val) < 1.3 * MAX_BYTES
    assert 0.03 < len(first.val) / len(first.train) < 0.5


def test_no_module_is_on_both_sides():
    train, held_out = split_files(ROOT, MAX_BYTES)
    modules = [{path.relative_to(ROOT).parts[0] for path in side} for side in (train, held_out)]
    assert not modules[0] & modules[1]
    assert all(modules)


def test_the_order_of_the_file_system_does_not_matter(monkeypatch: pytest.MonkeyPatch):
    before = stdlib_text()
    names = stdlib_corpus._source_names(ROOT)
    random.shuffle(names)
    monkeypatch.setattr(stdlib_corpus, "_source_names", lambda root: names)
    assert stdlib_text() == before


def test_capped_and_without_tests_and_foreign_packages(tmp_path: Path):
    for folder in ("json", "test", "site-packages/thing", "ctypes/test"):
        (tmp_path / folder).mkdir(parents=True)
        for index in range(20):
            (tmp_path / folder / f"m{index}.py").write_bytes(random.randbytes(100))
    train, held_out = split_files(tmp_path, max_bytes=1000)
    assert len(train) + len(held_out) == 10
    assert {path.parent.name for path in train + held_out} == {"json"}


def test_an_interpreter_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stdlib_corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(DataUnavailableError, match=r"of Python sources in .*, got 0; give --data PATH"):
        stdlib_text()
