"""Where compiled files lie: one folder, a file per target and key, published atomically under a lock."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from . import BuildError, ninja
from .spec import Target, target_key
from .toolchain import Toolchain

try:
    import fcntl
except ImportError:  # Windows: the package has to import there, where nothing is ever built
    fcntl = None  # type: ignore[assignment]

NO_LOCKS = (95, 37, 38)
"""EOPNOTSUPP, ENOLCK, ENOSYS: a file system without locks. Then processes may build the same twice, harmlessly."""


def cache_folder() -> Path:
    """Raises BuildError where it cannot be made."""
    forced = os.environ.get("FLASH_COSINE_SIM_CACHE")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(forced) if forced else Path(base) / "flash_cosine_sim_attention"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BuildError(f"{folder}: the cache folder cannot be made ({error}); set FLASH_COSINE_SIM_CACHE") from error
    return folder


def build_timeout() -> float:
    text = os.environ.get("FLASH_COSINE_SIM_BUILD_TIMEOUT", "1200")
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise BuildError(f"FLASH_COSINE_SIM_BUILD_TIMEOUT: expected seconds, got {text!r}")
    return seconds


@contextlib.contextmanager
def file_lock(path: Path, timeout: float) -> Iterator[None]:
    """An exclusive lock that the system drops when its process ends, however it ends: no stale locks.

    Raises BuildError after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    with open(path, "a") as file:
        while fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise BuildError(
                        f"{path}: another process has been building the same for more than {timeout:.0f} s "
                        "(FLASH_COSINE_SIM_BUILD_TIMEOUT)"
                    ) from None
                time.sleep(0.05)
            except OSError as error:
                if error.errno not in NO_LOCKS:
                    raise
                break
        yield  # closing the file releases the lock


def published_path(target: Target, toolchain: Toolchain) -> Path:
    return cache_folder() / f"{target.name}-{target_key(target, toolchain)}.so"


def ensure(targets: Sequence[Target], toolchain: Toolchain) -> dict[str, Path]:
    """Target name -> its shared library, compiled now where the cache lacks it. Raises BuildError."""
    paths = {target.name: published_path(target, toolchain) for target in targets}
    missing = [target for target in targets if not paths[target.name].exists()]
    if not missing:
        return paths
    if os.environ.get("FLASH_COSINE_SIM_JIT", "1") == "0":
        raise BuildError(f"not compiled, and FLASH_COSINE_SIM_JIT=0: {', '.join(target.name for target in missing)}")
    timeout = build_timeout()
    with contextlib.ExitStack() as locks:
        for name in sorted(target.name for target in missing):  # one order for all, so that no two wait for each other
            locks.enter_context(file_lock(paths[name].with_suffix(".lock"), timeout))
        missing = [target for target in missing if not paths[target.name].exists()]
        if missing:
            _build(missing, toolchain, paths, timeout)
    return paths


def _build(targets: Sequence[Target], toolchain: Toolchain, paths: dict[str, Path], timeout: float) -> None:
    """In a temporary folder beside the final place; a rename publishes a finished file, never a part of one."""
    archs = sorted({arch for target in targets for arch in target.archs})
    title = f"flash_cosine_sim_attention: compiling {len(targets)} file{'s' if len(targets) > 1 else ''}"
    if archs:
        title += f" for sm_{', sm_'.join(archs)}"
    folder = Path(tempfile.mkdtemp(prefix="tmp-", dir=cache_folder()))
    try:
        ninja.write_build(folder, targets, toolchain)
        ninja.run(folder, toolchain, timeout, ninja.stderr_progress(f"{title} (first use; kept in {cache_folder()})"))
        for target in targets:
            os.replace(folder / f"{target.name}.so", paths[target.name])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
