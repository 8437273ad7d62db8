from __future__ import annotations

import hashlib
import io
import random
import urllib.error
import zipfile
from pathlib import Path

import pytest

from experiments.shared import data, download
from experiments.shared.data import load_corpus
from experiments.shared.download import SOURCES, DataUnavailableError, Source, cached


@pytest.fixture
def content() -> bytes:
    return random.randbytes(500)


@pytest.fixture
def source(tmp_path: Path, content: bytes) -> Source:
    """A file served by its file:// address, with its true checksum."""
    path = tmp_path / "served.txt"
    path.write_bytes(content)
    return Source("copy.txt", path.as_uri(), hashlib.sha256(content).hexdigest())


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(download.urllib.request, "urlopen", refuse)


def test_fetched_once_then_read_from_the_cache(source: Source, content: bytes, tmp_path: Path):
    path = cached(source, tmp_path / "cache")
    assert path.read_bytes() == content
    (tmp_path / "served.txt").unlink()
    assert cached(source, tmp_path / "cache") == path
    assert [entry.name for entry in (tmp_path / "cache").iterdir()] == ["copy.txt"]


def test_a_wrong_download_is_refused_and_not_kept(source: Source, content: bytes, tmp_path: Path):
    (tmp_path / "served.txt").write_bytes(content + b"!")
    with pytest.raises(DataUnavailableError, match=f"expected SHA-256 {source.sha256}, got .* of 501 bytes"):
        cached(source, tmp_path / "cache")
    assert not (tmp_path / "cache" / "copy.txt").exists()


def test_a_spoilt_cache_is_noticed(source: Source, tmp_path: Path):
    cached(source, tmp_path / "cache").write_bytes(b"spoilt")
    with pytest.raises(DataUnavailableError, match=r"copy\.txt: expected SHA-256 .* delete it"):
        cached(source, tmp_path / "cache")


@pytest.mark.parametrize("name", SOURCES)
@pytest.mark.usefixtures("no_network")
def test_offline_says_what_to_do(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("FLASH_COSINE_SIM_DATA", str(tmp_path))
    with pytest.raises(DataUnavailableError) as failure:
        load_corpus(name)
    message = str(failure.value)
    assert SOURCES[name].url in message
    assert "no route to host" in message
    assert "--data PATH" in message
    assert str(tmp_path / SOURCES[name].file_name) in message


@pytest.mark.usefixtures("no_network")
def test_enwik8_is_unpacked_and_split_as_usual(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("enwik8", b"0" * 900 + b"1" * 50 + b"2" * 50)
    (tmp_path / "enwik8.zip").write_bytes(packed.getvalue())
    monkeypatch.setattr(data, "ENWIK8_TRAIN", 900)
    monkeypatch.setattr(data, "ENWIK8_VAL", 50)
    source = Source("enwik8.zip", SOURCES["enwik8"].url, hashlib.sha256(packed.getvalue()).hexdigest())
    monkeypatch.setenv("FLASH_COSINE_SIM_DATA", str(tmp_path))
    monkeypatch.setitem(data.SOURCES, "enwik8", source)
    corpus = load_corpus("enwik8")
    assert (bytes(corpus.train.tolist()), bytes(corpus.val.tolist())) == (b"0" * 900, b"1" * 50)


def test_the_checksums_are_whole():
    assert all(len(bytes.fromhex(source.sha256)) == 32 for source in SOURCES.values())
