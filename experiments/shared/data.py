"""Bytes in, batches out. A batch is a pure function of (seed, step): a resumed run sees exactly what it would have."""

from __future__ import annotations

import gzip
import hashlib
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .download import SOURCES, DataUnavailableError, cached
from .stdlib_corpus import stdlib_text

HELD_OUT_SHARE = 0.1
ENWIK8_TRAIN, ENWIK8_VAL = 90_000_000, 5_000_000  # the usual split; the last five million bytes are for tests

_on_devices: dict[tuple[str, str], Tensor] = {}  # (sha256, device) -> training text


@dataclass(frozen=True)
class Corpus:
    """Byte-level text. `train`, `val`: (n,) uint8; `sha256` is of both and tells two corpora apart."""

    name: str
    train: Tensor
    val: Tensor
    sha256: str

    def train_on(self, device: torch.device) -> Tensor:
        """`train` on a device, where all runs share one copy."""
        key = (self.sha256, str(device))
        if device.type == "cpu":
            return self.train
        if key not in _on_devices:
            _on_devices[key] = self.train.to(device)
        return _on_devices[key]

    def describe(self) -> str:
        return f"{self.name}: {len(self.train):,} bytes to train, {len(self.val):,} held out, sha256 {self.sha256[:12]}"


def load_corpus(data: str) -> Corpus:
    """`data` as in RunConfig.data; DataUnavailableError says what to do where it cannot be had."""
    if data == "stdlib":
        return _corpus(data, *stdlib_text())
    if data == "tinyshakespeare":
        return _corpus(data, *_split(cached(SOURCES[data]).read_bytes()))
    if data == "enwik8":
        return _corpus(data, *_enwik8(cached(SOURCES[data])))
    return _corpus(Path(data).name, *_split(_read(Path(data))))


def _read(path: Path) -> bytes:
    if not path.is_file():
        raise DataUnavailableError(f"--data: expected stdlib, {', '.join(SOURCES)} or a file, got {str(path)!r}")
    content = path.read_bytes()
    try:
        return gzip.decompress(content) if path.suffix == ".gz" else content
    except (OSError, EOFError) as error:
        raise DataUnavailableError(f"--data: expected a gzip file, got {str(path)!r} ({error})") from error


def _enwik8(path: Path) -> tuple[bytes, bytes]:
    with zipfile.ZipFile(path) as archive:
        content = archive.read("enwik8")
    return content[:ENWIK8_TRAIN], content[ENWIK8_TRAIN : ENWIK8_TRAIN + ENWIK8_VAL]


def _split(content: bytes) -> tuple[bytes, bytes]:
    """The last tenth is held out."""
    cut = len(content) - math.ceil(len(content) * HELD_OUT_SHARE)
    return content[:cut], content[cut:]


def _corpus(name: str, train: bytes, val: bytes) -> Corpus:
    digest = hashlib.sha256(train + b"\0" + val).hexdigest()
    return Corpus(name, _tensor(train), _tensor(val), digest)


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8) if text else torch.empty(0, dtype=torch.uint8)


def train_starts(corpus: Corpus, batch_size: int, seq_len: int, seed: int, step: int) -> Tensor:
    """(batch_size,) int64: where the windows of a batch start, random places that seed and step alone decide."""
    digest = hashlib.sha256(f"{seed}/{step}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:6], "big"))
    return torch.randint(_last_start(corpus.train, seq_len, "training") + 1, (batch_size,), generator=generator)


def train_batch(corpus: Corpus, batch_size: int, seq_len: int, seed: int, step: int) -> Tensor:
    """(batch_size, seq_len + 1) int64, on the CPU. Training reads the same through step_inputs.py, on its device."""
    return _windows(corpus.train, train_starts(corpus, batch_size, seq_len, seed, step), seq_len)


def val_batches(corpus: Corpus, batch_size: int, seq_len: int, batches: int) -> list[Tensor]:
    """The same windows for every arm and seed, evenly spaced over the held-out text, none twice."""
    last = _last_start(corpus.val, seq_len, "held-out")
    count = min(batches * batch_size, last // seq_len + 1)
    starts = torch.linspace(0, last, count).long()
    return [_windows(corpus.val, chunk, seq_len) for chunk in starts.split(batch_size)]


def _last_start(text: Tensor, seq_len: int, what: str) -> int:
    if len(text) <= seq_len:
        raise DataUnavailableError(f"expected more than seq_len = {seq_len} bytes of {what} text, got {len(text)}")
    return len(text) - seq_len - 1


def _windows(text: Tensor, starts: Tensor, seq_len: int) -> Tensor:
    return text[starts[:, None] + torch.arange(seq_len + 1)].long()


def unigram_entropy(corpus: Corpus) -> float:
    """Bits per byte of the held-out text under the training text's byte frequencies: what knowing no context costs."""
    counts = torch.bincount(corpus.train.long(), minlength=256).double() + 1
    frequencies = torch.bincount(corpus.val.long(), minlength=256).double() / len(corpus.val)
    return float(-(frequencies * (counts / counts.sum()).log2()).sum())
