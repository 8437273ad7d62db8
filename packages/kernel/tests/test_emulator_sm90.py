"""The sources of the sm90 kernels, run on the CPU by the emulator beside this file, through the real adapter.

Needs the CUDA headers and g++, no GPU. Small problems: each still crosses two tiles of queries and of keys.
"""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention
from flash_cosine_sim_attention.accuracy import assert_within_budget
from flash_cosine_sim_attention.reference import plain_cosine_sim_attention
from flash_cosine_sim_attention.testing import (
    Inputs,
    assert_close_to_reference,
    eager_cosine_sim_attention,
    make_inputs,
)
from flash_cosine_sim_attention.variants import variant_for

from .emulator.build import build, launchers_of

FORWARD = [("bfloat16", 64), ("float16", 128), ("bfloat16", 96)]
EMULATED = [variant_for("sm90", "forward", dtype, d, "bounded") for dtype, d in FORWARD]
EMULATED += [variant_for("sm90", "forward", dtype, 64, "running_max") for dtype in ("float16", "bfloat16")]
BIASED = [("bfloat16", 64), ("float16", 128), ("bfloat16", 128)]
EMULATED += [variant_for("sm90", "forward", *kind, "bias") for kind in BIASED]
EMULATED += [variant_for("sm90", "forward", *kind, "toeplitz") for kind in BIASED]


@pytest.fixture(scope="module")
def emulated(tmp_path_factory, tools_with_binding):
    return build(tmp_path_factory.mktemp("emulator"), EMULATED, tools_with_binding)


@pytest.fixture(autouse=True)
def _kernels_on_the_cpu(emulated, serve_on_the_cpu):
    """backend="sm90" serves CPU tensors, with workspaces that are NaN at first."""

    serve_on_the_cpu(launchers_of(emulated), "sm90")


@pytest.mark.parametrize(("dtype", "d"), FORWARD)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "kv_heads": 1},
        {"causal": True, "nq": 300, "nk": 300},
        {"groups": 4, "scale": 2.0},
        {"l2norm_qk": False, "causal": True, "nq": 270, "nk": 200},
    ],
    ids=str,
)
def test_forward(dtype, d, options):
    sizes = {"nq": 140, "nk": 270, "d": d} | options
    assert_forward_close(make_inputs((1,), 2, dtype=getattr(torch, dtype), **sizes))


@pytest.mark.parametrize("causal", [False, True])
def test_tiles_for_many_keys(causal):
    """From 2048 keys on head dim 64 has three consumer warpgroups."""
    assert_forward_close(make_inputs((1,), 1, None, 200, 2100, 64, dtype=torch.bfloat16, causal=causal))


@pytest.mark.parametrize(
    "options",
    [
        {"scale": 80.0},
        {"scale": -80.0, "causal": True},
        {"scale": "head", "kv_heads": 1},
        {"mask": True, "scale": 80.0},
    ],
    ids=str,
)
def test_running_maximum(options):
    assert_forward_close(make_inputs((1,), 2, nq=140, dtype=torch.float16, **({"nk": 400, "d": 64} | options)))


HIDDEN = {
    "the end of one, the start of the other": ([slice(300, None)], [slice(0, 140)]),
    "whole tiles amid others": ([slice(128, 384)], [slice(5, 500)]),
    "all keys of one": ([slice(None)], [slice(599, None)]),
    "every third": ([slice(None, None, 3)], [slice(1, None, 3)]),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("hidden", HIDDEN)
def test_key_mask(hidden, causal):
    """NaN in the masked keys and values reaches nothing."""
    inputs = make_inputs((2,), 2, 1, 140, 600, 64, dtype=torch.bfloat16, causal=causal)
    mask = torch.ones(2, 600, dtype=torch.bool)
    for row, slices in zip(mask, HIDDEN[hidden], strict=True):
        for hide in slices:
            row[hide] = False
    assert_forward_close(replace(inputs, mask=mask), poison=True)


@pytest.mark.parametrize(("dtype", "d"), BIASED)
@pytest.mark.parametrize(
    "options",
    [
        {"bias": "hij"},
        {"bias": "bhij", "causal": True, "kv_heads": 1},
        {"bias": "hj", "nk": 271},
        {"bias": "bij", "scale": "head", "nq": 270, "nk": 200},
        {"bias": "hij", "mask": True, "nk": 263},
    ],
    ids=str,
)
@pytest.mark.parametrize("wide", [False, True])
def test_bias(dtype, d, options, wide):
    """`wide`: a float32 bias."""
    inputs = make_inputs((2,), 2, dtype=getattr(torch, dtype), **({"nq": 140, "nk": 264, "d": d} | options))
    if wide:
        inputs = replace(inputs, attn_bias=torch.randn(inputs.attn_bias.shape))
    assert_forward_close(inputs)


@pytest.mark.parametrize(("dtype", "d"), BIASED)
@pytest.mark.parametrize("wide", [False, True])
def test_bias_that_hides(dtype, d, wide):
    """-inf over whole tiles, for all keys of some queries, and steps of 1e4 that raise the shift."""
    inputs = make_inputs((1,), 2, nq=140, nk=400, d=d, dtype=getattr(torch, dtype), bias="hij", causal=True)
    bias = inputs.attn_bias.to(torch.float32 if wide else inputs.attn_bias.dtype)
    bias[0, :, 256:] = -math.inf
    bias[0, 7:40] = -math.inf
    bias[0, 70:80, 3] = 1e4
    bias[1, :100] = -1e4
    bias[1, :, 300:] = 1e4  # hidden from many queries
    bias[1, 120:, ::2] = -math.inf
    assert_forward_close(replace(inputs, attn_bias=bias))


@pytest.mark.parametrize(("dtype", "d"), BIASED)
@pytest.mark.parametrize("form", ["alibi", "relative"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "kv_heads": 1, "nk": 301},
        {"mask": True, "nq": 270, "nk": 199},
        {"scale": "head", "nk": 1},
        {"nk": 2100, "nq": 200},
    ],
    ids=str,
)
def test_bias_by_its_diagonals(dtype, d, form, options):
    sizes = {"nq": 140, "nk": 270, "d": d} | options
    assert_forward_close(make_inputs((2,), 2, dtype=getattr(torch, dtype), bias=form, **sizes))


def test_extreme_diagonals():
    x = make_inputs((1,), 2, nq=140, nk=270, d=64, dtype=torch.bfloat16, bias="relative")
    x.attn_bias[:, ::3] = -math.inf
    x.attn_bias[:, 1::3] *= 1e4
    assert_forward_close(x)


def assert_forward_close(inputs: Inputs, poison: bool = False) -> None:
    """`poison`: the kernel gets NaN in masked keys and values, the references do not."""
    given = inputs
    if poison:
        masked = ~inputs.mask[:, None, :, None]
        given = replace(inputs, k=inputs.k.masked_fill(masked, math.nan), v=inputs.v.masked_fill(masked, math.nan))
    actual = flash_cosine_sim_attention(**given.arguments(), return_lse=True, backend="sm90")
    exact = plain_cosine_sim_attention(**inputs.to(torch.float64).arguments(), return_lse=True)
    baseline = eager_cosine_sim_attention(**inputs.arguments(), return_lse=True)
    for name, *three in zip(("out", "lse"), actual, exact, baseline, strict=True):
        assert_within_budget(name, *three)


BACKWARD = [("bfloat16", 64), ("float16", 128)]
EMULATED += [variant_for("sm90", "backward", dtype, d, "plain") for dtype, d in BACKWARD]


@pytest.mark.parametrize(("dtype", "d"), BACKWARD)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "kv_heads": 1},
        {"groups": 4, "scale": 2.0},
        {"l2norm_qk": False, "causal": True, "nq": 270, "nk": 200},
    ],
    ids=str,
)
@pytest.mark.parametrize("deterministic", [False, True])
def test_backward(dtype, d, options, deterministic):
    """Deterministic: in order; the emulator fails a block that waits for one which runs later."""
    assert_backward_close(deterministic, dtype, **({"nq": 140, "nk": 270, "d": d} | options))


def test_backward_of_many_keys():
    """From 32 blocks of keys on a block of threads takes several."""
    assert_backward_close(False, "bfloat16", heads=1, nq=70, nk=4100, d=64)


@pytest.mark.parametrize("mask", [False, True])
def test_backward_of_large_logits_beside_keys_that_are_not_there(mask):
    """exp2 of the shift alone is infinite: all cosines are -1."""
    x = make_inputs((1,), 1, nq=70, nk=140, d=64, dtype=torch.bfloat16, scale=100.0, mask=mask)
    direction = torch.randn(64)
    x.q.copy_(direction.expand_as(x.q))
    x.k.copy_(-direction.expand_as(x.k))
    assert_close_to_reference(x, backend="sm90", lse=True)


def assert_backward_close(deterministic: bool, dtype: str, heads: int = 2, **sizes) -> None:
    torch.use_deterministic_algorithms(deterministic)
    try:
        inputs = make_inputs((1,), heads, dtype=getattr(torch, dtype), **sizes)
        assert_close_to_reference(inputs, backend="sm90", lse=True)
    finally:
        torch.use_deterministic_algorithms(False)
