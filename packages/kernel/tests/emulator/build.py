"""Builds launchers for the emulator: csrc is copied, a few words of CUDA are rewritten, g++ does the rest."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flash_cosine_sim_attention._build.spec import CSRC
from flash_cosine_sim_attention._build.toolchain import Toolchain, cuda_includes
from flash_cosine_sim_attention.variants import Variant

HERE = Path(__file__).parent
REPLACED = {"sm80/ptx.cuh": "sm80_ptx.cuh", "sm90/ptx.cuh": "sm90_ptx.cuh", "sm90/wgmma.cuh": "sm90_wgmma.cuh"}
"""The instructions of csrc -> their definitions here."""
LAUNCH = re.compile(r"([\w:]+(?:<[^<>;]*>)?)\s*<<<([^,]+),\s*([^,]+),\s*([^,]+),\s*([^>]+?)>>>\((.*?)\);", re.DOTALL)


def for_the_host(source: str) -> str:
    """CUDA C++ -> C++ for emulator.h. Shared arrays of a kernel become static: one block runs at a time."""
    source = re.sub(
        r"extern __shared__ .*?(\w+)\[\];", r"char (&\1)[emulator::kSharedBytes] = emulator::shared_memory;", source
    )
    source = source.replace("__shared__", "static").replace("cudaFuncSetAttribute(", "emulated_attribute(")
    source = source.replace("#include <cuda_runtime.h>", "#include <cuda_runtime_api.h>")
    return LAUNCH.sub(r"emulator::launch(\2, \3, \4, [&] { \1(\6); });", source)


def build(folder: Path, variants: Sequence[Variant], tools: Toolchain) -> Path:
    """-> a shared library that exports the launchers of `variants`, on host memory."""
    sources = folder / "csrc"
    shutil.copytree(CSRC, sources)
    for path in sources.rglob("*.cuh"):
        path.write_text(for_the_host(path.read_text()))
    for instructions, definitions in REPLACED.items():
        shutil.copyfile(HERE / definitions, sources / instructions)
    includes = [f"-I{sources}", f"-I{HERE}", *(f"-isystem{path}" for path in cuda_includes(tools.nvcc))]
    options = [
        "-std=c++17",
        "-O2",
        "-fPIC",
        "-fno-strict-aliasing",
        "-w",
        "-Wno-psabi",
        "-include",
        "emulator.h",
        *includes,
    ]

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        subprocess.run([tools.cxx, *options, "-c", str(source), "-o", str(target)], check=True)
        return target

    stubs = [HERE / "emulator.cpp", HERE / "hopper.cpp"]
    for variant in variants:
        stubs.append(folder / f"{variant.name}.cpp")
        stubs[-1].write_text(variant.source)
    with ThreadPoolExecutor(2) as pool:
        objects = [str(path) for path in pool.map(compile_one, stubs)]
    library = folder / "emulated.so"
    subprocess.run([tools.cxx, "-shared", *objects, "-o", str(library)], check=True)
    return library
