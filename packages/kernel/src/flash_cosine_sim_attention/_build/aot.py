"""The ahead-of-time library: every launcher and the torch binding in one file inside the package."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ..variants import VARIANTS, Variant
from . import BuildError, ninja
from .cache import build_timeout, cache_folder
from .objects import compile_objects
from .spec import DEFAULT_ARCHS, LIBRARY, LIBRARY_FOLDER, binding_target, source_hash, variant_target
from .toolchain import Toolchain, find_toolchain


def build_library(
    archs: Sequence[str] = DEFAULT_ARCHS,
    variants: Sequence[Variant] = VARIANTS,
    folder: Path = LIBRARY_FOLDER,
    jobs: int | None = None,
) -> Path:
    """Compiles and links; writes library.json, which says what the library holds, last. Raises BuildError."""
    toolchain = find_toolchain()
    targets = [variant_target(variant, tuple(archs)) for variant in variants]
    targets = [target for target in targets if target.archs] + [binding_target()]
    compiled = compile_objects(targets, toolchain, jobs)
    failed = [unit for unit in compiled if unit.path is None]
    if failed:
        excerpt = ninja.excerpt(failed[0].log.splitlines(keepends=True))
        raise BuildError(f"{', '.join(unit.target.name for unit in failed)}: compiling failed:\n{excerpt}")
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "library.json"
    record.unlink(missing_ok=True)
    _link({unit.target.name: unit.path for unit in compiled if unit.path}, toolchain, folder / LIBRARY)
    sources = {target.name: source_hash(target) for target in targets}
    record.write_text(json.dumps({"archs": list(archs), "sources": sources}, indent=1))
    return folder / LIBRARY


def _link(objects: dict[str, Path], toolchain: Toolchain, library: Path) -> None:
    folder = Path(tempfile.mkdtemp(prefix="tmp-", dir=cache_folder()))
    try:
        (folder / "build.ninja").write_text(ninja.render_link(library.name, list(objects.values()), toolchain))
        ninja.run(folder, toolchain, build_timeout())
        part = library.with_suffix(f".{os.getpid()}")
        shutil.copy(folder / library.name, part)
        os.replace(part, library)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def remove_library(folder: Path = LIBRARY_FOLDER) -> None:
    shutil.rmtree(folder, ignore_errors=True)
