"""What to compile: targets with their sources and flags, and the hash of everything that goes into them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path

from ..variants import Variant
from .toolchain import Toolchain, cuda_includes, cuda_libraries

CSRC = Path(__file__).resolve().parent.parent / "csrc"

LIBRARY_FOLDER = CSRC.parent / "lib"
LIBRARY = "libflash_cosine_sim_attention.so"
"""Everything compiled ahead of time lies here, in the package, with library.json that says what it holds."""

TORCH_TARGET_VERSION = "0x020a000000000000"
"""The oldest torch that the binding runs with, 2.10: the stable ABI then holds for every newer one."""

NVCC_FLAGS = (
    "-std=c++17",
    "-O3",
    "-lineinfo",
    "-Xptxas=-v",
    "-Xcompiler=-fPIC,-fvisibility=hidden,-fno-gnu-unique",  # equal templates of two libraries must stay two
    "-Xfatbin=-compress-all",
)
CXX_FLAGS = (
    "-std=c++20",
    "-O2",
    "-fPIC",
    "-fvisibility=hidden",
    "-Wall",
    f"-DTORCH_TARGET_VERSION={TORCH_TARGET_VERSION}",
)
# The symbols of libtorch_cuda are weak in the binding: without --no-as-needed they would stay null beside a CUDA torch.
BINDING_LINK_FLAGS = ("-shared", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu", "-lc10")


@dataclass(frozen=True, slots=True)
class Target:
    """One shared library to be: a stub that is written to the build folder, or a source of csrc/."""

    name: str
    language: str  # "cuda" or "c++"
    archs: tuple[str, ...] = ()  # compute capabilities, e.g. ("80", "90a"); "80+" adds PTX for later GPUs
    stub: str | None = None  # the text of the source, else `source`
    source: Path | None = None

    @property
    def file_name(self) -> str:
        return self.name + (".cu" if self.language == "cuda" else ".cpp")


DEFAULT_ARCHS = ("80+", "90a")
"""Of ahead-of-time builds: machine code for Ampere (Ada runs it too) and for Hopper, and PTX for what came later."""


def variant_target(variant: Variant, archs: tuple[str, ...]) -> Target:
    """Kernels of sm90 exist for Hopper's own instruction set only; for anything else their bodies would be empty."""
    own = tuple(arch for arch in archs if arch == "90a") if variant.arch == "sm90" else archs
    return Target(variant.name, "cuda", own, stub=variant.source)


def binding_target() -> Target:
    return Target("torch_binding", "c++", source=CSRC / "torch_binding.cpp")


def arch_flags(archs: tuple[str, ...]) -> tuple[str, ...]:
    flags = []
    for arch in archs:
        number = arch.removesuffix("+")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if arch.endswith("+"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return tuple(flags)


def compile_flags(target: Target, toolchain: Toolchain) -> tuple[str, ...]:
    """From the source to an object; without the paths of headers and of the files."""
    if target.language == "c++":
        return CXX_FLAGS
    return (*NVCC_FLAGS, f"-ccbin={toolchain.cxx}", *arch_flags(target.archs))


def include_flags(target: Target, toolchain: Toolchain) -> tuple[str, ...]:
    flags = [f"-I{CSRC}"]
    if target.language == "c++":
        flags += [f"-isystem{folder}" for folder in (toolchain.torch / "include", *cuda_includes(toolchain.nvcc))]
    return tuple(flags)


def link_flags(target: Target, toolchain: Toolchain) -> tuple[str, ...]:
    """From an object to a shared library."""
    if target.language == "c++":
        return (f"-L{toolchain.torch / 'lib'}", *BINDING_LINK_FLAGS)
    libraries = cuda_libraries(toolchain.nvcc)
    # static: independent of the CUDA that torch brings along; shared where a toolkit comes without the static library
    static = any((folder / "libcudart_static.a").exists() for folder in libraries)
    runtime = ("-cudart=static", "-Xlinker=--exclude-libs,ALL") if static else ("-cudart=shared",)
    return ("-shared", *runtime, f"-ccbin={toolchain.cxx}", *(f"-L{folder}" for folder in libraries))


def included_files(text: str, folder: Path, csrc: Path) -> set[Path]:
    """The files that a source includes in quotes, and those that they include: beside the includer, or from csrc."""
    found: set[Path] = set()
    pending = [(text, folder)]
    while pending:
        text, folder = pending.pop()
        for name in re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE):
            path = next((p.resolve() for p in (folder / name, csrc / name) if p.is_file()), None)
            if path is not None and path not in found:
                found.add(path)
                pending.append((path.read_text(), path.parent))
    return found


def source_hash(target: Target, csrc: Path = CSRC) -> str:
    """Of the target's source and of all that it includes: an edited source never meets an old binary."""
    text = target.stub if target.source is None else target.source.read_text()
    assert text is not None
    folder = csrc if target.source is None else target.source.parent
    digest = hashlib.sha256(text.encode())
    for path in sorted(included_files(text, folder, csrc)):
        content = path.read_bytes()
        digest.update(f"\0{path.relative_to(csrc.resolve()).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def target_key(target: Target, toolchain: Toolchain) -> str:
    """Of all that decides what the compiled file holds: sources, flags, tools, architecture."""
    parts = (
        source_hash(target),
        *compile_flags(target, toolchain),
        *BINDING_LINK_FLAGS,
        toolchain.identity,
    )
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]
