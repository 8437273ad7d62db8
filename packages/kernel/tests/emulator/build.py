"""Builds launchers for the emulator: csrc is copied, a few words of CUDA are rewritten, g++ does the rest."""

from __future__ import annotations

import atexit
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

from flash_cosine_sim_attention import launchers
from flash_cosine_sim_attention._build.spec import CSRC
from flash_cosine_sim_attention._build.toolchain import Toolchain, cuda_includes
from flash_cosine_sim_attention.variants import Variant

HERE = Path(__file__).parent
REPLACED = {"sm80/ptx.cuh": "sm80_ptx.cuh", "sm90/ptx.cuh": "sm90_ptx.cuh", "sm90/wgmma.cuh": "sm90_wgmma.cuh"}
"""The instructions of csrc -> their definitions here."""
ALIGNMENT = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")  # as strict as a GPU
LAUNCH = re.compile(r"([\w:]+(?:<[^<>;]*>)?)\s*<<<([^,]+),\s*([^,]+),\s*([^,]+),\s*([^>]+?)>>>\((.*?)\);", re.DOTALL)


def for_the_host(source: str) -> str:
    """CUDA C++ -> C++ for emulator.h. Shared arrays of a kernel become static: one block runs at a time."""
    source = re.sub(
        r"extern __shared__ .*?(\w+)\[\];", r"char (&\1)[emulator::kSharedBytes] = emulator::shared_memory;", source
    )
    source = source.replace("__shared__", "static").replace("cudaFuncSetAttribute(", "emulated_attribute(")
    source = source.replace("#include <cuda_runtime.h>", "#include <cuda_runtime_api.h>")
    return LAUNCH.sub(r"emulator::launch(\2, \3, \4, [&] { \1(\6); });", source)


def compile_all(folder: Path, sources: Sequence[Path], tools: Toolchain, *options: str) -> list[Path]:
    """-> object files in `folder`."""
    includes = [f"-I{HERE}", *(f"-isystem{path}" for path in cuda_includes(tools.nvcc))]
    options = ("-std=c++17", "-O2", "-fPIC", "-fno-strict-aliasing", "-w", "-Wno-psabi", *options, *includes)

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([tools.cxx, *options, "-include", "emulator.h", "-c", source, "-o", target], check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


@cache
def emulator_objects(tools: Toolchain) -> list[Path]:
    """The emulator itself, compiled once a process."""
    folder = Path(tempfile.mkdtemp(prefix="emulator"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return compile_all(folder, [HERE / "emulator.cpp", HERE / "hopper.cpp"], tools)


def build(
    folder: Path,
    variants: Sequence[Variant],
    tools: Toolchain,
    sources_beside: Sequence[Path] = (),
    change: Callable[[str], str] = lambda source: source,
) -> Path:
    """-> a shared library that exports the launchers of `variants`, on host memory, and what `sources_beside` export.

    change: applied to the text of every header of csrc first (a test that breaks a kernel).
    """
    sources = folder / "csrc"
    shutil.copytree(CSRC, sources)
    for path in sources.rglob("*.cuh"):
        path.write_text(for_the_host(change(path.read_text())))
    for instructions, definitions in REPLACED.items():
        shutil.copyfile(HERE / definitions, sources / instructions)
    texts = {source.stem: for_the_host(source.read_text()) for source in sources_beside}
    texts |= {variant.name: variant.source for variant in variants}
    stubs = [folder / f"{name}.cpp" for name in texts]
    for stub in stubs:
        stub.write_text(texts[stub.stem])
    objects = [*emulator_objects(tools), *compile_all(folder, stubs, tools, f"-I{sources}", *ALIGNMENT)]
    library = folder / "emulated.so"
    subprocess.run([tools.cxx, "-shared", *objects, "-o", library], check=True)
    return library


def launchers_of(library: Path) -> Callable[..., int]:
    """What stands in for `launchers.address`: the emulated launcher of a variant."""

    def address(variant: Variant, *_: object) -> int:
        return launchers.exported(library, variant.name)

    return address
