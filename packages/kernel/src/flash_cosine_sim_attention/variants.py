"""The one table of compiled variants: architecture x pass x dtype x head dim x feature.

The builder compiles it, the adapter (cuda.py) looks launchers up in it, error messages list it, tests walk through it.
Imports nothing of torch, so that the builder needs none.

To add a head dim or a dtype: its row here, and the tile sizes of csrc/<arch>/. A new architecture: a folder and a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

HEAD_DIMS = (32, 64, 96, 128, 192, 256)
"""Head dims with tiles of their own; any multiple of 8 in between runs in the next larger one, zero-filled on chip."""

HALF = ("float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class Row:
    """All combinations of what it lists.

    Dtype "tf32": float32 tensors, with products as coarse as TF32's. Features of a forward: "bounded" (the shift of the
    softmax is known before the launch), "running_max" (tracked; on sm80 with a bias, too), "bias" (sm90), "pair" (sm90,
    for short rows that share one), "toeplitz" (one by its diagonals). Of a backward: "plain", "bias", "toeplitz".
    """

    arch: str
    pass_name: str
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    features: tuple[str, ...]


TABLE = (
    Row("sm80", "forward", HALF, HEAD_DIMS, ("bounded", "running_max", "toeplitz")),
    Row("sm80", "forward", ("float32",), HEAD_DIMS[:4], ("running_max", "toeplitz")),
    Row("sm80", "forward", ("tf32",), HEAD_DIMS, ("running_max", "toeplitz")),
    Row("sm80", "backward", (*HALF, "tf32"), HEAD_DIMS, ("plain", "bias", "toeplitz")),
    Row("sm80", "backward", ("float32",), HEAD_DIMS[:4], ("plain", "bias", "toeplitz")),
    Row("sm90", "forward", HALF, HEAD_DIMS[1:], ("bounded", "running_max", "bias", "toeplitz")),
    Row("sm90", "forward", HALF, HEAD_DIMS[:1], ("pair",)),
    Row("sm90", "backward", HALF, (64, 128), ("plain",)),
)

ALLOWED_SPILLS: dict[str, int] = {
    # Accumulators and operands hold all registers there are; what gives way is loop state and the block's indices, a
    # few loads a tile of some hundred products. Shapes without spills were slower (docs/decisions.md).
    "sm80_forward_d32_bounded": 80,
    "sm80_forward_d64_bounded": 216,
    "sm80_forward_d64_running_max": 256,
    "sm80_forward_d96_bounded": 140,
    "sm80_forward_d128_bounded": 140,
    "sm80_forward_d96_running_max": 128,
    "sm80_forward_d128_running_max": 132,
    "sm80_forward_d192_running_max": 64,
    "sm80_forward_d256_bounded": 96,
    "sm80_forward_d256_running_max": 96,
    "sm80_forward_d64_toeplitz": 104,
    "sm80_forward_d128_toeplitz": 104,
    "sm80_forward_d256_toeplitz": 64,
    # The same, worst where a bias or a mask takes part, or in float32 and TF32; in multiples of 64. The kernels of the
    # common call (bfloat16, no bias, head dim 64 or 128) spill nothing on sm_80. The bias gradient's tiles of 128 x 128
    # (d 32 in float32, d 64) spill most, and are faster than smaller ones all the same.
    "sm80_backward_d32_plain": 192,
    "sm80_backward_d32_bias": 1024,
    "sm80_backward_d64_plain": 192,
    "sm80_backward_d64_bias": 1152,
    "sm80_backward_d96_plain": 192,
    "sm80_backward_d96_bias": 64,
    "sm80_backward_d128_plain": 192,
    "sm80_backward_d128_bias": 832,
    "sm80_backward_d192_plain": 64,
    "sm80_backward_d192_bias": 64,
    "sm80_backward_d256_plain": 64,
    "sm80_backward_d256_bias": 192,
    "sm80_backward_d64_toeplitz": 192,
    "sm80_backward_d96_toeplitz": 192,
    "sm80_backward_d128_toeplitz": 256,
    "sm80_backward_d192_toeplitz": 64,
    "sm80_backward_d256_toeplitz": 192,
    # Where the tile is 256 wide and there is a key mask: O alone holds 128 registers of a consumer's 224. Once a
    # block of queries; with a bias a few loads a tile.
    "sm90_forward_d256_running_max": 64,
    "sm90_forward_d256_bias": 192,
    "sm90_forward_d64_toeplitz": 64,
    "sm90_forward_d192_toeplitz": 128,
    "sm90_forward_d256_toeplitz": 192,
    # Once a block of keys: sizes of the call that its loop keeps (docs/decisions.md). In the loop
    # over queries a handful of loads. The largest figure is of the kernel in order (d 64), and without dQ (d 128).
    "sm90_backward_d64_plain": 448,
    "sm90_backward_d128_plain": 192,
}
"""Spills that were accepted, since no tile shape without them measured faster: arch_pass_d<head dim>_feature -> bytes a
thread, stores and loads, of the worst kernel of any dtype; all others must not spill. `compile_report --spills` prints
what there is.
"""

_ELEMENTS = {"float16": "__half", "bfloat16": "__nv_bfloat16", "float32": "float", "tf32": "fcsa::Tf32"}
_FEATURE_ARGUMENTS = {
    ("forward", "bounded"): "fcsa::Softmax::kBounded",
    ("forward", "running_max"): "fcsa::Softmax::kRunningMax",
    ("forward", "toeplitz"): "fcsa::Softmax::kRunningMax, true",
    ("sm90_forward", "bias"): "fcsa::Softmax::kRunningMax, false, false, float",
    ("sm90_forward", "toeplitz"): "fcsa::Softmax::kRunningMax, false, false, fcsa::sm90::Diagonals",
    ("backward", "plain"): "false",
    ("backward", "bias"): "true",
    ("backward", "toeplitz"): "true, true",
}


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
    def allowed_spills(self) -> int:
        return ALLOWED_SPILLS.get(f"{self.arch}_{self.pass_name}_d{self.head_dim}_{self.feature}", 0)

    @property
    def source(self) -> str:
        """The stub that instantiates the kernel; written to the build folder only."""
        title = self.pass_name.capitalize()
        header, function = self.pass_name, f"launch_{self.pass_name}"
        traits = f"fcsa::{self.arch}::{title}Traits<{_ELEMENTS[self.dtype]}, {self.head_dim}, "
        own = _FEATURE_ARGUMENTS.get((f"{self.arch}_{self.pass_name}", self.feature))
        if self.feature == "pair":
            header, function, traits = "pair_forward", "launch_pair_forward", _ELEMENTS[self.dtype]
        else:
            traits += f"{own or _FEATURE_ARGUMENTS[self.pass_name, self.feature]}>"
        return (
            f'#include "{self.arch}/{header}.cuh"\n\n'
            f'extern "C" __attribute__((visibility("default"))) cudaError_t {self.name}(\n'
            f"    const fcsa::{title}Params& params, cudaStream_t stream) {{\n"
            f"  return fcsa::{self.arch}::{function}<{traits}>(params, stream);\n"
            "}\n"
        )


VARIANTS: tuple[Variant, ...] = tuple(
    Variant(row.arch, row.pass_name, dtype, head_dim, feature)
    for row in TABLE
    for dtype in row.dtypes
    for head_dim in row.head_dims
    for feature in row.features
)


def has_pass(arch: str, pass_name: str) -> bool:
    """Whether an architecture has kernels of its own for a pass."""
    return any(row.arch == arch and row.pass_name == pass_name for row in TABLE)


def dtypes_of(arch: str) -> tuple[str, ...]:
    """The dtypes that an architecture has kernels for; () for an architecture without kernels."""
    return tuple(dict.fromkeys(dtype for row in TABLE if row.arch == arch for dtype in row.dtypes))


@cache
def find_variant(arch: str, pass_name: str, dtype: str, head_dim: int, feature: str) -> Variant | None:
    """The variant with the smallest tile that holds `head_dim`."""
    fitting = [
        variant
        for variant in VARIANTS
        if (variant.arch, variant.pass_name, variant.dtype, variant.feature) == (arch, pass_name, dtype, feature)
        and variant.head_dim >= head_dim > 0
    ]
    return min(fitting, key=lambda variant: variant.head_dim, default=None)


def why_none(arch: str, pass_name: str, dtype: str, head_dim: int, feature: str) -> str | None:
    """The first of the arguments for which there is no kernel, as a reason that lists what there is; None if one is."""
    if find_variant(arch, pass_name, dtype, head_dim, feature) is not None:
        return None
    rows = [row for row in TABLE if row.arch == arch and row.pass_name == pass_name]
    if not rows:
        return f"this version has no {arch} {pass_name} kernels"
    fitting = [row for row in rows if dtype in row.dtypes]
    if not fitting:
        known = ", ".join(dict.fromkeys(known for row in rows for known in row.dtypes))
        return f"there is no {arch} {pass_name} kernel for {dtype}, only for {known}"
    if not any(0 < head_dim <= max(row.head_dims) for row in fitting):
        largest = max(max(row.head_dims) for row in fitting)
        return f"head dim {head_dim}: the {arch} {pass_name} kernels for {dtype} take 1 to {largest}"
    features = ", ".join(dict.fromkeys(known for row in fitting for known in row.features))
    return f"there is no {arch} {pass_name} kernel '{feature}' for {dtype} and head dim {head_dim}, only {features}"


def variant_for(arch: str, pass_name: str, dtype: str, head_dim: int, feature: str) -> Variant:
    """The variant that serves a call. Raises ValueError that lists what is supported where there is none."""
    variant = find_variant(arch, pass_name, dtype, head_dim, feature)
    if variant is None:
        raise ValueError(why_none(arch, pass_name, dtype, head_dim, feature))
    return variant
