"""Public text corpora: fetched once, verified by SHA-256 each time, kept in a cache folder."""

from __future__ import annotations

import hashlib
import os
import tempfile
import urllib.request
from dataclasses import dataclass
from pathlib import Path

TIMEOUT_S = 60


class DataUnavailableError(RuntimeError):
    """The data cannot be read, fetched, or are not what they should be."""


@dataclass(frozen=True)
class Source:
    """A public file: `file_name` in the cache, and what its bytes hash to."""

    file_name: str
    url: str
    sha256: str


SOURCES = {
    # One text file of 1 115 394 bytes.
    "tinyshakespeare": Source(
        "tinyshakespeare.txt",
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    ),
    # A zip archive of 36 445 475 bytes; its one member is the first 10^8 bytes of English Wikipedia of March 2006.
    "enwik8": Source(
        "enwik8.zip",
        "http://mattmahoney.net/dc/enwik8.zip",
        "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc",
    ),
}


def cache_folder() -> Path:
    """FLASH_COSINE_SIM_DATA, or a folder of the user's cache."""
    folder = os.environ.get("FLASH_COSINE_SIM_DATA")
    if folder:
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flash_cosine_sim_attention" / "data"


def cached(source: Source, folder: Path | None = None) -> Path:
    """The verified local copy of `source`, fetched if it is not there yet; DataUnavailableError otherwise."""
    path = (folder or cache_folder()) / source.file_name
    if not path.exists():
        _store(path, _verified(_fetch(source, path), source, origin=source.url))
    else:
        _verified(path.read_bytes(), source, origin=str(path))
    return path


def _fetch(source: Source, path: Path) -> bytes:
    try:
        with urllib.request.urlopen(source.url, timeout=TIMEOUT_S) as response:
            return response.read()
    except OSError as error:  # URLError and time-outs are OSErrors
        raise DataUnavailableError(
            f"cannot fetch {source.url} ({error}). Without a network: leave --data out (text of the Python standard "
            f"library), give --data PATH of any file, or put the file at {path}."
        ) from error


def _verified(content: bytes, source: Source, origin: str) -> bytes:
    digest = hashlib.sha256(content).hexdigest()
    if digest != source.sha256:
        raise DataUnavailableError(
            f"{origin}: expected SHA-256 {source.sha256}, got {digest} of {len(content)} bytes. "
            "If it is a local file, delete it to fetch it again."
        )
    return content


def _store(path: Path, content: bytes) -> None:
    """Written aside and renamed: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(content)
    os.replace(file.name, path)
