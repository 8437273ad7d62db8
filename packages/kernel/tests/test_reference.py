"""The definition itself: against a loop that one can read aloud, and its derivatives against finite differences."""

from __future__ import annotations

import math

import pytest
import torch
from flash_cosine_sim_attention import plain_cosine_sim_attention
from flash_cosine_sim_attention.testing import make_inputs

DOUBLE = torch.float64


def attend_one_row(q, keys, values, bias, scale, groups):
    """One query against the keys it sees, straight from the formula."""
    if not len(keys):
        return torch.zeros(values.shape[-1], dtype=DOUBLE), -math.inf

    def unit(x):
        return torch.cat([chunk / max(float(chunk.norm()), 1e-12) for chunk in x.chunk(groups)])

    weights = [math.exp(scale * float(unit(q) @ unit(k)) + b) for k, b in zip(keys, bias, strict=True)]
    return sum(w * v for w, v in zip(weights, values, strict=True)) / sum(weights), math.log(sum(weights))


@pytest.mark.parametrize(("nq", "nk"), [(5, 5), (3, 6), (6, 3)])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_against_a_loop(nq, nk, causal, masked):
    x = make_inputs(
        (2,), 4, 2, nq, nk, d=8, dv=4, dtype=DOUBLE, mask=masked, bias="hij", scale=3.0, groups=2, causal=causal
    )
    out, lse = plain_cosine_sim_attention(**x.arguments(), return_lse=True)
    for b in range(2):
        for h in range(4):
            for i in range(nq):
                sees = [
                    j for j in range(nk) if (not causal or j <= i + nk - nq) and (x.mask is None or bool(x.mask[b, j]))
                ]
                expected, expected_lse = attend_one_row(
                    x.q[b, h, i], x.k[b, h // 2, sees], x.v[b, h // 2, sees], x.attn_bias[h, i, sees].tolist(), 3.0, 2
                )
                torch.testing.assert_close(out[b, h, i], expected, rtol=1e-12, atol=1e-12)
                assert float(lse[b, h, i]) == pytest.approx(expected_lse, rel=1e-12)


def scalars(x, options):
    """(q, k, v, bias, scale) -> out and lse, for gradcheck; empty rows are left out of lse."""

    def function(q, k, v, bias, scale):
        out, lse = plain_cosine_sim_attention(q, k, v, x.mask, bias, scale, return_lse=True, **options)
        return out, lse[lse > -1e30]

    return function


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_first_and_second_derivatives(causal, groups, masked):
    x = make_inputs((2,), 2, 1, 3, 4, d=4, dtype=DOUBLE, mask=masked, bias="hij", scale="head")
    if masked:
        x.mask[1] = False  # rows that see nothing
    arguments = [t.requires_grad_() for t in (x.q, x.k, x.v, x.attn_bias, x.scale)]
    function = scalars(x, {"causal": causal, "groups": groups})
    assert torch.autograd.gradcheck(function, arguments)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_softmax_of_large_logits_does_not_overflow():
    q = torch.randn(1, 1, 4, 8, dtype=DOUBLE)
    out = plain_cosine_sim_attention(q, q, q, attn_bias=torch.full((1, 4, 4), 1e4, dtype=DOUBLE), scale=1000)
    torch.testing.assert_close(out, q, rtol=0, atol=1e-8)


def test_nan_in_masked_keys_and_values_reaches_nothing():
    x = make_inputs(mask=True, dtype=DOUBLE, nq=6, nk=9)
    clean = plain_cosine_sim_attention(**x.arguments())
    hidden = ~x.mask[:, None, :, None].expand_as(x.k)
    k = torch.where(hidden, math.nan, x.k).requires_grad_()
    v = torch.where(hidden, math.inf, x.v).requires_grad_()
    out = plain_cosine_sim_attention(x.q, k, v, x.mask)
    assert torch.equal(out, clean)
    dk, dv = torch.autograd.grad(out.sum(), (k, v))
    assert not dk.isnan().any()
    assert bool((dk[hidden] == 0).all())
    assert bool((dv[hidden] == 0).all())


def test_rows_that_see_nothing():
    x = make_inputs(nq=5, nk=3, dtype=DOUBLE, causal=True)  # queries 0 and 1 stand before the first key
    q = x.q.requires_grad_()
    out, lse = plain_cosine_sim_attention(q, x.k, x.v, causal=True, return_lse=True)
    assert bool((out[..., :2, :] == 0).all())
    assert bool((lse[..., :2] == -math.inf).all())
    (dq,) = torch.autograd.grad(out.sum(), q)
    assert bool((dq[..., :2, :] == 0).all())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_rounded_once(dtype):
    x = make_inputs(dtype=dtype)
    exact = plain_cosine_sim_attention(**x.to(DOUBLE).arguments())
    got = plain_cosine_sim_attention(**x.arguments())
    assert got.dtype == dtype
    limit = torch.finfo(dtype).eps / 2 * float(exact.abs().max()) * 1.01
    assert float((got.double() - exact).abs().max()) <= limit


def test_autocast_changes_nothing():
    x = make_inputs(dtype=torch.float32)
    expected = plain_cosine_sim_attention(**x.arguments())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(plain_cosine_sim_attention(**x.arguments()), expected)
