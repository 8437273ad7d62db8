"""The compiled launchers: from the library inside the package, else from the cache, else compiled now.

A launcher is known by its address, which the operators of csrc/torch_binding.cpp take as a plain number.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import torch

from ._build import BuildError, cache
from ._build.spec import LIBRARY, LIBRARY_FOLDER, Target, binding_target, source_hash, variant_target
from ._build.toolchain import find_toolchain
from .variants import Variant

_lock = threading.RLock()
_addresses: dict[tuple[str, str], int] = {}  # (variant name, compute capability)
_binding: Path | None = None


def jit_arch(capability: tuple[int, int]) -> str:
    """What to compile for on first use: exactly the GPU at hand, (9, 0) with Hopper's own instructions."""
    return "90a" if capability == (9, 0) else f"{capability[0]}{capability[1]}"


def covers(archs: Sequence[str], capability: tuple[int, int]) -> bool:
    """Whether a library built for `archs` holds code that this GPU runs."""
    major, minor = capability
    for arch in archs:
        number = int(arch.rstrip("a+"))
        if arch.endswith("a"):
            found = (major, minor) == divmod(number, 10)
        else:
            found = major == number // 10 and minor >= number % 10  # machine code runs on later minor versions
        if found or (arch.endswith("+") and major * 10 + minor >= number):
            return True
    return False


def packaged() -> dict | None:
    """The record of the library in the package, {"archs": [...], "sources": {name: hash}}; None where there is none."""
    try:
        return json.loads((LIBRARY_FOLDER / "library.json").read_text())
    except FileNotFoundError:
        return None


def in_package(target: Target, capability: tuple[int, int] | None) -> bool:
    """Whether the packaged library holds the target, built from today's sources, for the GPU."""
    record = packaged()
    if record is None or not (LIBRARY_FOLDER / LIBRARY).exists():
        return False
    if capability is not None and not covers(record["archs"], capability):
        return False
    return record["sources"].get(target.name) == source_hash(target)


def address(variant: Variant, capability: tuple[int, int], also: Sequence[Variant] = ()) -> int:
    """The launcher of `variant`, loaded, and compiled if need be, `also` with it (in parallel). Raises BuildError."""
    key = (variant.name, jit_arch(capability))
    with _lock:
        if key not in _addresses:
            _load([variant, *also], capability)
        return _addresses[key]


def _load(variants: Sequence[Variant], capability: tuple[int, int]) -> None:
    arch = jit_arch(capability)
    targets = [variant_target(variant, (arch,)) for variant in variants]
    paths = {target.name: LIBRARY_FOLDER / LIBRARY for target in targets if in_package(target, capability)}
    binding = binding_target()
    if _binding is None and in_package(binding, None):
        paths[binding.name] = LIBRARY_FOLDER / LIBRARY
    wanted = [target for target in targets if target.name not in paths]
    if _binding is None and binding.name not in paths:
        wanted.append(binding)
    if wanted:
        paths |= cache.ensure(wanted, find_toolchain())
    if _binding is None:
        load_binding(paths[binding.name])
    for variant in variants:
        _addresses[variant.name, arch] = exported(paths[variant.name], variant.name)


def load_binding(path: Path) -> None:
    """Defines the operators launch_forward and launch_backward; once a process."""
    global _binding
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise BuildError(f"{path} does not load beside torch {torch.__version__}: {error}") from error
    _binding = path


def exported(path: Path, symbol: str) -> int:
    """The address of an exported function."""
    try:
        function = getattr(ctypes.CDLL(str(path)), symbol)
    except (OSError, AttributeError) as error:
        raise BuildError(f"{path} does not load: {error}") from error
    value = ctypes.cast(function, ctypes.c_void_p).value
    assert value is not None
    return value
