"""The one table of compiled variants: architecture x pass x dtype x head dim x feature.

The builder compiles it, the adapter (cuda.py) looks launchers up in it, error messages list it, tests walk through it.
Imports nothing of torch, so that the builder needs none.

To add a head dim or a dtype: its row here, and the tile sizes in the architecture's csrc/<arch>/tile_config.h.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
"""Head dims with tiles of their own; any multiple of 8 in between runs in the next larger one, zero-filled on chip."""

FEATURES = {"forward": ("bounded", "running_max"), "backward": ("plain", "bias")}
"""forward: the shift of the softmax, known before the launch, or tracked. backward: without or with a bias."""

_ELEMENTS = {"float16": "__half", "bfloat16": "__nv_bfloat16"}
_FEATURE_ARGUMENTS = {
    "bounded": "fcsa::Softmax::kBounded",
    "running_max": "fcsa::Softmax::kRunningMax",
    "plain": "false",
    "bias": "true",
}
_ARCHITECTURES: dict[str, tuple[str, ...]] = {"sm80": ("float16", "bfloat16")}
"""Architecture folder of csrc/ -> the dtypes that it has kernels for."""


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled launcher. `pass_name` is "forward" or "backward"; `head_dim` is the tile's, kHeadDim."""

    arch: str
    pass_name: str
    dtype: str
    head_dim: int
    feature: str

    @property
    def name(self) -> str:
        """The exported C symbol, and the name of its files."""
        return f"fcsa_{self.arch}_{self.pass_name}_{self.dtype}_d{self.head_dim}_{self.feature}"

    @property
    def source(self) -> str:
        """The stub that instantiates the kernel; written to the build folder only."""
        title = self.pass_name.capitalize()
        traits = f"fcsa::{self.arch}::{title}Traits<{_ELEMENTS[self.dtype]}, {self.head_dim}, "
        traits += f"{_FEATURE_ARGUMENTS[self.feature]}>"
        return (
            f'#include "{self.arch}/{self.pass_name}.cuh"\n\n'
            f'extern "C" __attribute__((visibility("default"))) cudaError_t {self.name}(\n'
            f"    const fcsa::{title}Params& params, cudaStream_t stream) {{\n"
            f"  return fcsa::{self.arch}::launch_{self.pass_name}<{traits}>(params, stream);\n"
            "}\n"
        )


VARIANTS: tuple[Variant, ...] = tuple(
    Variant(arch, pass_name, dtype, head_dim, feature)
    for arch, dtypes in _ARCHITECTURES.items()
    for pass_name, features in FEATURES.items()
    for dtype in dtypes
    for head_dim in HEAD_DIMS
    for feature in features
)

ALLOWED_SPILLS: dict[str, int] = {}
"""Variant name -> bytes of spill that were measured and accepted; every other variant must not spill."""

_BY_FIELDS = {(v.arch, v.pass_name, v.dtype, v.head_dim, v.feature): v for v in VARIANTS}


def tile_head_dim(head_dim: int) -> int | None:
    """The smallest compiled head dim that holds `head_dim`; None beyond the largest."""
    return next((d for d in HEAD_DIMS if d >= head_dim), None)


@cache
def variant_for(arch: str, pass_name: str, dtype: str, head_dim: int, feature: str) -> Variant:
    """The variant that serves a call. Raises ValueError that lists what is supported where there is none."""
    tile = tile_head_dim(head_dim)
    if tile is not None:
        variant = _BY_FIELDS.get((arch, pass_name, dtype, tile, feature))
        if variant is not None:
            return variant
    raise ValueError(
        f"no {pass_name} kernel for arch {arch}, dtype {dtype}, head dim {head_dim}, {feature}; {supported()}"
    )


def supported() -> str:
    """One sentence for error messages."""
    archs = "; ".join(f"{arch} with {', '.join(dtypes)}" for arch, dtypes in _ARCHITECTURES.items())
    features = "; ".join(f"{name}: {', '.join(values)}" for name, values in FEATURES.items())
    return f"compiled kernels: {archs}; head dims up to {HEAD_DIMS[-1]}; {features}"


def dtypes_of(arch: str) -> tuple[str, ...]:
    """The dtypes that an architecture has kernels for; () for an architecture without kernels."""
    return _ARCHITECTURES.get(arch, ())
