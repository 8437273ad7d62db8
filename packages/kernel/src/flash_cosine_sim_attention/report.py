"""What this installation can do, and why not more: `available()`, and the text of the package run as a program."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch

from . import cuda, launchers
from ._build import BuildError, cache
from ._build.spec import LIBRARY, LIBRARY_FOLDER, binding_target
from ._build.toolchain import Toolchain, find_toolchain
from .validation import FLOAT_DTYPES
from .variants import HEAD_DIMS, VARIANTS, dtypes_of, why_none

FUSED = ("sm80", "sm90")


def available(device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16) -> dict[str, str | None]:
    """Backend -> None where it serves calls of `dtype` on `device`, else the reason why it does not.

    device: None for the current GPU, or the CPU where there is none. Compiles nothing: fused kernels count as available
    if they are compiled already or a compiler is there.

    Example:
        >>> available("cpu")["chunked"] is None
        True
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = torch.device(device)
    reasons: dict[str, str | None] = {"plain": None, "chunked": None}
    reasons["sdpa"] = None if device.type == "cpu" else "serves the CPU only"
    for arch in FUSED:
        capability = cuda.capability_of(device)
        reasons[arch] = cuda.refusal(arch, capability) or _no_variant(arch, str(dtype).removeprefix("torch."))
        if reasons[arch] is None and capability is not None:
            reasons[arch] = _no_code(capability)
    return reasons


def _no_variant(arch: str, dtype: str) -> str | None:
    """Why there is no forward kernel of any feature; None if there is one."""
    reasons = [why_none(arch, "forward", dtype, HEAD_DIMS[1], feature) for feature in ("running_max", "bounded")]
    return None if None in reasons else reasons[0]


def _no_code(capability: tuple[int, int]) -> str | None:
    """Why no machine code for the GPU can be had: neither in the package nor by compiling; None if it can."""
    record = launchers.packaged()
    if record is not None and launchers.covers(record["archs"], capability):
        return None
    try:
        find_toolchain()
        cache.cache_folder()
    except BuildError as error:
        return str(error)
    return None


def describe() -> str:
    """The whole report, some forty columns of plain text."""
    return "\n".join((*_versions(), *_builds(), "", *_backends()))


def _versions() -> Iterator[str]:
    from . import __version__

    yield f"flash_cosine_sim_attention {__version__}, Python {sys.version.split()[0]}"
    yield f"torch      {torch.__version__}, CUDA {torch.version.cuda or 'none'}"
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    for index in range(count):
        major, minor = torch.cuda.get_device_capability(index)
        yield f"GPU {index}      {torch.cuda.get_device_name(index)}, compute capability {major}.{minor}"
    if not count:
        yield "GPU        none that torch can use"


def _builds() -> Iterator[str]:
    try:
        tools = find_toolchain()
        yield f"compiler   {tools.nvcc} {tools.nvcc_version}, {tools.cxx_version}"
    except BuildError as error:
        tools = None
        yield f"compiler   none: {error}"
    yield f"library    {_library()}"
    try:
        yield f"cache      {_cache(tools)}"
    except BuildError as error:
        yield f"cache      none: {error}"


def _library() -> str:
    record = launchers.packaged()
    if record is None:
        return "none in the package; ahead of time: python -m flash_cosine_sim_attention._build"
    current = launchers.in_package(binding_target(), None)
    state = "" if current else ", of other sources: not used"
    archs = ", ".join(f"sm_{arch}" for arch in record["archs"])
    return f"{LIBRARY_FOLDER / LIBRARY}, {len(record['sources']) - 1} of {len(VARIANTS)} launchers for {archs}{state}"


def _cache(tools: Toolchain | None) -> str:
    folder = cache.cache_folder()
    text = f"{folder}, {len(list(folder.glob('fcsa_*.so')))} launchers"
    if tools is not None and not cache.published_path(binding_target(), tools).exists():
        text += ", no binding yet"
    return text


def _backends() -> Iterator[str]:
    devices = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0))]
    for device in devices:
        yield f"calls on {device}"
        for dtype in FLOAT_DTYPES:
            reasons = available(device, dtype)
            fused = [arch for arch in reversed(FUSED) if reasons[arch] is None]
            chosen = fused[0] if fused else ("chunked or sdpa" if device == "cpu" else "chunked")
            yield f"  {str(dtype).removeprefix('torch.'):9} {chosen}"
            for arch in FUSED:
                if device != "cpu" and reasons[arch] is not None:
                    yield f"            not {arch}: {reasons[arch]}"
    yield f"fused kernels: head dims 1 to {HEAD_DIMS[-1]}; " + "; ".join(
        f"{arch}: {', '.join(dtypes_of(arch)) or 'none in this version'}" for arch in FUSED
    )
