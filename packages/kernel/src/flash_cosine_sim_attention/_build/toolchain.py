"""Finds the compilers and headers, without importing torch."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from . import BuildError

MIN_CUDA = (12, 0)


@dataclass(frozen=True, slots=True)
class Toolchain:
    nvcc: Path
    nvcc_version: str  # e.g. "13.0.88"
    cxx: Path
    cxx_version: str
    torch: Path  # the installed package's folder
    torch_version: str
    ninja: Path

    @property
    def identity(self) -> str:
        """What of the tools goes into the key of a compiled file."""
        return f"nvcc {self.nvcc_version}; {self.cxx_version}; torch {self.torch_version}"


@cache
def find_toolchain() -> Toolchain:
    """Raises BuildError that names the missing tool and where it was looked for."""
    nvcc = _find_nvcc()
    cxx = _find_cxx()
    torch = _find_torch()
    return Toolchain(
        nvcc=nvcc,
        nvcc_version=_nvcc_version(nvcc),
        cxx=cxx,
        cxx_version=_first_line(cxx, "--version"),
        torch=torch,
        torch_version=_torch_version(torch),
        ninja=_find_ninja(),
    )


@cache
def cuda_root(nvcc: Path) -> Path:
    """The toolkit that nvcc works with: asked from nvcc itself, since the file found may be a wrapper script."""
    result = subprocess.run(
        [str(nvcc), "--dryrun", "-E", "-x", "cu", "/dev/null"], capture_output=True, text=True, timeout=60
    )
    match = re.search(r"^#\$ TOP=(.+)$", result.stderr, re.MULTILINE)
    return Path(match.group(1)).resolve() if match else nvcc.resolve().parent.parent


def cuda_includes(nvcc: Path) -> tuple[Path, ...]:
    return _cuda_folders(nvcc, "include")


def cuda_libraries(nvcc: Path) -> tuple[Path, ...]:
    return _cuda_folders(nvcc, "lib64", "lib")


def _cuda_folders(nvcc: Path, *names: str) -> tuple[Path, ...]:
    roots = (cuda_root(nvcc), *cuda_root(nvcc).glob("targets/*-linux"))
    return tuple(root / name for root in roots for name in names if (root / name).is_dir())


def _nvcc_candidates() -> Iterator[Path]:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(variable):
            yield Path(os.environ[variable]) / "bin" / "nvcc"
    on_path = shutil.which("nvcc")
    if on_path:
        yield Path(on_path)
    yield Path("/usr/local/cuda/bin/nvcc")
    spec = importlib.util.find_spec("nvidia")  # the wheels of the extra [jit]
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        yield from sorted(Path(folder).glob("cu*/bin/nvcc"), reverse=True)


def _find_nvcc() -> Path:
    forced = os.environ.get("FLASH_COSINE_SIM_NVCC")
    if forced:
        if not os.access(forced, os.X_OK):
            raise BuildError(f"FLASH_COSINE_SIM_NVCC: expected the path of nvcc, got {forced}")
        return Path(forced)
    for candidate in _nvcc_candidates():
        if os.access(candidate, os.X_OK):
            return candidate
    raise BuildError(
        "no CUDA compiler: nvcc is neither in $CUDA_HOME/bin, on PATH, in /usr/local/cuda/bin nor among the installed "
        'packages; install a CUDA toolkit, or: pip install "flash-cosine-sim-attention[jit]"'
    )


def _find_cxx() -> Path:
    wanted = os.environ.get("CXX") or "g++"
    found = shutil.which(wanted)
    if found is None:
        raise BuildError(f"no host compiler: {wanted} is not on PATH; install g++ (nvcc needs it), or set CXX")
    return Path(found)


def _find_ninja() -> Path:
    spec = importlib.util.find_spec("ninja")
    for folder in [] if spec is None else spec.submodule_search_locations or []:
        for candidate in (Path(folder) / "data" / "bin" / "ninja", Path(folder).parents[3] / "bin" / "ninja"):
            if os.access(candidate, os.X_OK):
                return candidate
    found = shutil.which("ninja")
    if found is None:
        raise BuildError("no ninja: install it with: pip install ninja")
    return Path(found)


def _find_torch() -> Path:
    spec = importlib.util.find_spec("torch")  # looks for the folder, runs nothing of torch
    if spec is None or not spec.submodule_search_locations:
        raise BuildError("torch is not installed: its headers are needed to build the binding")
    return Path(next(iter(spec.submodule_search_locations)))


def _torch_version(torch: Path) -> str:
    match = re.search(r"__version__ = '([^']+)'", (torch / "version.py").read_text())
    return match.group(1) if match else "unknown"


def _run(*command: str | Path) -> str:
    try:
        result = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=60, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        raise BuildError(f"{command[0]} does not run: {error}") from error
    return result.stdout


def _first_line(tool: Path, *arguments: str) -> str:
    return _run(tool, *arguments).partition("\n")[0].strip()


def _nvcc_version(nvcc: Path) -> str:
    text = _run(nvcc, "--version")
    match = re.search(r"release [\d.]+, V(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise BuildError(f"{nvcc} --version: expected a CUDA release, got {text.strip()[:200]!r}")
    major, minor, patch = (int(part) for part in match.groups())
    if (major, minor) < MIN_CUDA:
        raise BuildError(f"{nvcc}: expected CUDA {MIN_CUDA[0]}.{MIN_CUDA[1]} or newer, got {major}.{minor}")
    return f"{major}.{minor}.{patch}"
