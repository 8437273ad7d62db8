"""The table of compiled variants."""

from __future__ import annotations

import pytest
from flash_cosine_sim_attention.variants import (
    ALLOWED_SPILLS,
    TABLE,
    VARIANTS,
    Variant,
    dtypes_of,
    find_variant,
    has_pass,
    variant_for,
    why_none,
)


def test_every_variant_is_there_once_and_found_by_its_fields():
    assert len({variant.name for variant in VARIANTS}) == len(set(VARIANTS)) == len(VARIANTS)
    for v in VARIANTS:
        assert variant_for(v.arch, v.pass_name, v.dtype, v.head_dim, v.feature) is v


@pytest.mark.parametrize("row", TABLE)
def test_a_head_dim_gets_the_smallest_tile_that_holds_it(row):
    for head_dim in range(1, max(row.head_dims) + 1):
        for dtype in row.dtypes:
            for feature in row.features:
                tile = variant_for(row.arch, row.pass_name, dtype, head_dim, feature).head_dim
                assert tile >= head_dim
                assert not any(head_dim <= smaller < tile for smaller in row.head_dims)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        (
            ("sm80", "forward", "bfloat16", 257, "bounded"),
            "head dim 257: the sm80 forward kernels for bfloat16 take 1 to",
        ),
        (("sm80", "forward", "bfloat16", 0, "bounded"), "head dim 0"),
        (
            ("sm80", "backward", "float64", 64, "plain"),
            "no sm80 backward kernel for float64, only for float16, bfloat16",
        ),
        (("sm80", "forward", "bfloat16", 64, "bias"), "no sm80 forward kernel 'bias' .*, only bounded, running_max"),
        (("sm75", "forward", "float16", 64, "bounded"), "this version has no sm75 forward kernels"),
    ],
)
def test_an_unknown_variant_is_an_error_that_lists_what_is_supported(fields, reason):
    assert find_variant(*fields) is None
    with pytest.raises(ValueError, match=reason):
        variant_for(*fields)


def test_what_there_is_has_no_reason_against_it():
    assert all(why_none(v.arch, v.pass_name, v.dtype, v.head_dim, v.feature) is None for v in VARIANTS)
    assert has_pass("sm80", "backward")
    assert not has_pass("sm75", "backward")
    assert set(dtypes_of("sm80")) >= {"float16", "bfloat16"}
    assert dtypes_of("sm75") == ()


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
    assert set(ALLOWED_SPILLS) <= {f"{v.arch}_{v.pass_name}_d{v.head_dim}_{v.feature}" for v in VARIANTS}
    assert sum(v.allowed_spills > 0 for v in VARIANTS) >= len(ALLOWED_SPILLS)
