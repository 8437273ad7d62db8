"""Object files of the ahead-of-time builds, with what their compiler said, kept by key: none is made twice."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from . import BuildError, ninja
from .cache import build_timeout, cache_folder
from .spec import Target, target_key
from .toolchain import Toolchain


@dataclass(frozen=True, slots=True)
class Compiled:
    target: Target
    path: Path | None  # None: the compiler gave up, and `log` says why
    log: str
    seconds: float


def compile_objects(targets: Sequence[Target], toolchain: Toolchain, jobs: int | None = None) -> list[Compiled]:
    """All of them, as far as they compile. Raises BuildError on a time-out."""
    paths = {target: _object_path(target, toolchain) for target in targets}
    missing = [target for target in targets if not _record_path(paths[target]).exists()]
    failed = _compile(missing, paths, toolchain, jobs) if missing else {}
    return [failed[target] if target in failed else _read(target, paths[target]) for target in targets]


def _object_path(target: Target, toolchain: Toolchain) -> Path:
    folder = cache_folder() / "objects"
    folder.mkdir(exist_ok=True)
    return folder / f"{target.name}-{target_key(target, toolchain)}.o"


def _record_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _read(target: Target, path: Path) -> Compiled:
    record = json.loads(_record_path(path).read_text())
    return Compiled(target, path, record["log"], record["seconds"])


def _compile(
    targets: Sequence[Target], paths: dict[Target, Path], toolchain: Toolchain, jobs: int | None
) -> dict[Target, Compiled]:
    """Those that failed; the others are published, each object before its record, as they get ready."""
    folder = Path(tempfile.mkdtemp(prefix="tmp-", dir=cache_folder()))
    by_name = {target.name: target for target in targets}
    timeout, started = build_timeout(), time.monotonic()
    bar = ProgressBar()

    def finished(done: int, steps: int, name: str) -> None:
        bar.show(done, steps, name)
        if name in by_name:
            _publish(folder / f"{name}.o", paths[by_name[name]])

    try:
        ninja.write_build(folder, targets, toolchain, link=False)
        with contextlib.suppress(BuildError):  # what does not compile is told target by target
            ninja.run(folder, toolchain, timeout, finished, jobs, keep_going=True)
        if time.monotonic() - started > timeout:
            raise BuildError(f"compiling took longer than {timeout:.0f} s (FLASH_COSINE_SIM_BUILD_TIMEOUT)")
        unfinished = [target for target in targets if not _record_path(paths[target]).exists()]
        return {target: Compiled(target, None, _log_of(folder / f"{target.name}.o"), 0.0) for target in unfinished}
    finally:
        bar.close()
        shutil.rmtree(folder, ignore_errors=True)


def _log_of(output: Path) -> str:
    log = output.with_suffix(".o.log")
    return log.read_text(errors="replace") if log.exists() else "not compiled"


def _publish(output: Path, path: Path) -> None:
    """Renames within one file system: no other process sees a part of a file."""
    if not output.exists():
        return
    seconds = output.stat().st_mtime - output.with_suffix(".o.start").stat().st_mtime
    record = output.with_suffix(".json")
    record.write_text(json.dumps({"log": _log_of(output), "seconds": seconds}))
    os.replace(output, path)
    os.replace(record, _record_path(path))


class ProgressBar:
    """On stderr: in place on a terminal, else a line for every tenth."""

    def __init__(self) -> None:
        self.started = time.monotonic()
        self.terminal = sys.stderr.isatty()
        self.tenth = 0

    def show(self, finished: int, steps: int, name: str) -> None:
        elapsed = time.monotonic() - self.started
        filled = 30 * finished // steps
        line = f"[{'#' * filled}{'.' * (30 - filled)}] {finished}/{steps} {elapsed:4.0f} s  {name}"
        if self.terminal:
            sys.stderr.write(f"\r\033[K{line}")
        elif 10 * finished // steps > self.tenth:
            self.tenth = 10 * finished // steps
            sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def close(self) -> None:
        if self.terminal:
            sys.stderr.write("\n")
