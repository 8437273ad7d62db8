"""The sources of the sm80 kernels, run on the CPU by the emulator beside this file, through the real adapter.

Needs the CUDA headers and g++, no GPU. Small problems: each still crosses two tiles of queries and of keys.
"""

from __future__ import annotations

import ctypes

import pytest
import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention
from flash_cosine_sim_attention.testing import assert_close_to_reference, make_inputs
from flash_cosine_sim_attention.variants import variant_for

from .emulator.build import build, launchers_of

EMULATED = [
    variant_for("sm80", pass_name, dtype, 64, feature)
    for dtype, features in (("bfloat16", ("bounded", "plain")), ("float16", ("running_max", "bias")))
    for pass_name, feature in zip(("forward", "backward"), features, strict=True)
]
EMULATED += [variant_for("sm80", "forward", "bfloat16", 128, "bounded")]
EMULATED += [variant_for("sm80", "backward", "bfloat16", 128, "plain")]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory, tools_with_binding):
    return build(tmp_path_factory.mktemp("emulator"), EMULATED, tools_with_binding)


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(emulated, serve_on_the_cpu):
    """backend="sm80" serves CPU tensors, with workspaces that are NaN at first."""

    serve_on_the_cpu(launchers_of(emulated))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "kv_heads": 1},
        {"mask": True, "l2norm_qk": False},
        {"nq": 140, "nk": 70, "causal": True, "mask": True, "groups": 4},
    ],
    ids=str,
)
def test_bfloat16(options):
    assert_close_to_reference(make_inputs((1,), 2, dtype=torch.bfloat16, **({"nq": 70, "nk": 140, "d": 64} | options)),
                              backend="sm80", lse=True)  # fmt: skip


@pytest.mark.parametrize("bias", ["hij", "bhij", "hj"])
def test_float16_with_bias(bias):
    x = make_inputs((2,), 2, nq=70, nk=140, d=40, dtype=torch.float16, bias=bias, mask=True, scale="head")
    assert_close_to_reference(x, flash_cosine_sim_attention, backend="sm80")


@pytest.mark.parametrize(("nq", "nk"), [(150, 139), (270, 70)])
def test_a_bias_gradient_of_more_tiles_than_blocks(nq, nk):
    """A block takes one tile after the other; some are hidden as a whole, and keys do not come in pairs."""
    x = make_inputs((3,), 2, nq=nq, nk=nk, d=40, dtype=torch.float16, bias="hij", causal=True)
    assert_close_to_reference(x, flash_cosine_sim_attention, backend="sm80")


@pytest.mark.parametrize("shared_memory", [99 * 1024, 227 * 1024])
def test_tiles_for_the_shared_memory_of_the_device(emulated, shared_memory):
    """The backward has smaller tiles for GPUs with 99 KB a block (compute capability 8.6, 8.9, 12.0)."""
    library = ctypes.CDLL(str(emulated))
    library.emulate_shared_memory_limit(shared_memory)
    try:
        assert_close_to_reference(make_inputs((1,), 1, nq=70, nk=140, d=128, dtype=torch.bfloat16), backend="sm80")
    finally:
        library.emulate_shared_memory_limit(232 * 1024)


def test_deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        assert_close_to_reference(make_inputs((1,), 2, 1, 70, 140, d=64, dtype=torch.bfloat16), backend="sm80")
    finally:
        torch.use_deterministic_algorithms(False)
