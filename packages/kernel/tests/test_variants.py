"""The table of compiled variants."""

from __future__ import annotations

import pytest
from flash_cosine_sim_attention.variants import (
    ALLOWED_SPILLS,
    FEATURES,
    HEAD_DIMS,
    VARIANTS,
    Variant,
    dtypes_of,
    tile_head_dim,
    variant_for,
)


def test_every_variant_is_there_once_and_found_by_its_fields():
    assert len({variant.name for variant in VARIANTS}) == len(set(VARIANTS)) == len(VARIANTS)
    for v in VARIANTS:
        assert variant_for(v.arch, v.pass_name, v.dtype, v.head_dim, v.feature) is v


@pytest.mark.parametrize("dtype", dtypes_of("sm80"))
@pytest.mark.parametrize("head_dim", range(1, HEAD_DIMS[-1] + 1, 5))
def test_a_head_dim_gets_the_smallest_tile_that_holds_it(dtype, head_dim):
    for pass_name, features in FEATURES.items():
        for feature in features:
            tile = variant_for("sm80", pass_name, dtype, head_dim, feature).head_dim
            assert tile >= head_dim
            assert not any(head_dim <= smaller < tile for smaller in HEAD_DIMS)


def test_tile_head_dim():
    assert [tile_head_dim(d) for d in (1, 32, 33, 128, 256, 257)] == [32, 32, 64, 128, 256, None]


@pytest.mark.parametrize(
    "fields",
    [
        ("sm80", "forward", "bfloat16", 257, "bounded"),
        ("sm80", "forward", "float64", 64, "bounded"),
        ("sm80", "forward", "bfloat16", 64, "bias"),
        ("sm75", "forward", "float16", 64, "bounded"),
    ],
)
def test_an_unknown_variant_is_an_error_that_lists_what_is_supported(fields):
    with pytest.raises(ValueError, match=r"no forward kernel for .*; compiled kernels: sm80 with float16, bfloat16"):
        variant_for(*fields)


def test_source_of_a_forward():
    assert Variant("sm80", "forward", "bfloat16", 64, "bounded").source == (
        '#include "sm80/forward.cuh"\n\n'
        'extern "C" __attribute__((visibility("default"))) cudaError_t fcsa_sm80_forward_bfloat16_d64_bounded(\n'
        "    const fcsa::ForwardParams& params, cudaStream_t stream) {\n"
        "  return fcsa::sm80::launch_forward<fcsa::sm80::ForwardTraits<__nv_bfloat16, 64, fcsa::Softmax::kBounded>>"
        "(params, stream);\n"
        "}\n"
    )


def test_source_of_a_backward():
    source = Variant("sm80", "backward", "float16", 128, "bias").source
    assert "cudaError_t fcsa_sm80_backward_float16_d128_bias(\n    const fcsa::BackwardParams& params" in source
    assert "launch_backward<fcsa::sm80::BackwardTraits<__half, 128, true>>(params, stream)" in source


def test_allowed_spills_name_existing_variants():
    assert set(ALLOWED_SPILLS) <= {variant.name for variant in VARIANTS}
