from __future__ import annotations

import gzip
import math
import random
from pathlib import Path

import pytest
import torch

from experiments.shared.data import Corpus, load_corpus, train_batch, unigram_entropy, val_batches
from experiments.shared.download import DataUnavailableError


def test_a_file_and_its_gzip_are_the_same_corpus(text_file: Path):
    packed = text_file.with_suffix(".txt.gz")
    packed.write_bytes(gzip.compress(text_file.read_bytes()))
    assert load_corpus(str(packed)).sha256 == load_corpus(str(text_file)).sha256


def test_the_last_tenth_is_held_out_and_nothing_is_in_both(text_file: Path):
    corpus = load_corpus(str(text_file))
    assert bytes(torch.cat([corpus.train, corpus.val]).tolist()) == text_file.read_bytes()
    assert len(corpus.val) == math.ceil(0.1 * text_file.stat().st_size)


def test_a_batch_is_windows_of_the_training_text(corpus: Corpus):
    text = bytes(corpus.train.tolist())
    batch = train_batch(corpus, batch_size=5, seq_len=17, seed=random.randrange(100), step=random.randrange(100))
    assert batch.shape == (5, 18)
    assert all(bytes(window.tolist()) in text for window in batch)


def test_a_batch_follows_from_seed_and_step_alone(corpus: Corpus):
    torch.manual_seed(1)
    first = train_batch(corpus, 4, 32, seed=3, step=7)
    torch.manual_seed(2)
    assert torch.equal(first, train_batch(corpus, 4, 32, seed=3, step=7))
    assert not torch.equal(first, train_batch(corpus, 4, 32, seed=3, step=8))
    assert not torch.equal(first, train_batch(corpus, 4, 32, seed=4, step=7))


@pytest.mark.parametrize("seq_len", [32, 1000, 3000])
def test_validation_windows_do_not_overlap_in_what_is_predicted(seq_len: int):
    positions = torch.arange(10_000) % 256
    corpus = Corpus("positions", positions.byte(), positions.byte(), "")
    batches = val_batches(corpus, batch_size=3, seq_len=seq_len, batches=2)
    count = sum(map(len, batches))
    assert count == min(6, (10_000 - seq_len - 1) // seq_len + 1)
    assert all((batch[:, 1:] - batch[:, :-1]).remainder(256).eq(1).all() for batch in batches)


def test_a_window_that_does_not_fit_is_an_error():
    corpus = Corpus("short", torch.zeros(90_000, dtype=torch.uint8), torch.zeros(10_000, dtype=torch.uint8), "")
    with pytest.raises(DataUnavailableError, match=r"more than seq_len = 20000 bytes of held-out text, got 10000"):
        val_batches(corpus, 2, 20_000, 1)
    with pytest.raises(DataUnavailableError, match="training text, got 90000"):
        train_batch(corpus, 2, 90_000, seed=0, step=0)


def test_missing_and_broken_files_are_named(tmp_path: Path):
    with pytest.raises(DataUnavailableError, match=r"expected stdlib, .*enwik8 or a file, got '.*nothing.txt'"):
        load_corpus(str(tmp_path / "nothing.txt"))
    broken = tmp_path / "broken.gz"
    broken.write_bytes(b"no gzip")
    with pytest.raises(DataUnavailableError, match="expected a gzip file"):
        load_corpus(str(broken))


def test_unigram_entropy_of_even_and_of_constant_bytes():
    even = torch.arange(256).repeat(400).byte()
    assert unigram_entropy(Corpus("even", even, even[:2560], "")) == pytest.approx(8, abs=1e-6)
    constant = torch.full((100_000,), 65, dtype=torch.uint8)
    assert unigram_entropy(Corpus("constant", constant, constant, "")) < 0.01
