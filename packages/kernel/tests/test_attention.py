"""flash_cosine_sim_attention as users call it, against the float64 definition: shapes, dtypes, options, edges.

Which path serves a call is the package's business: these tests hold for any. Marked `gpu` they run on the GPU too.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention, plain_cosine_sim_attention
from flash_cosine_sim_attention.testing import assert_close_to_reference, make_inputs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.usefixtures("each_device")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
LENGTHS = (1, 2, 17, 63, 64, 65, 127, 128, 129, 200)


@st.composite
def problems(draw) -> dict[str, Any]:
    """Keyword arguments of make_inputs: anything that the contract accepts, in small."""
    merged = draw(st.booleans()) and draw(st.booleans())
    batch = draw(st.sampled_from([(1,), (2,), (3,)] if merged else [(1,), (2,), (2, 3), (2, 1, 2)]))
    heads = 0 if merged else draw(st.sampled_from([1, 2, 4]))
    groups = draw(st.sampled_from([1, 1, 2, 4]))
    kv_heads = None if merged else draw(st.sampled_from([None, 0, 1, heads]))
    biases = (
        [None, None, "bij"] if merged else [None, None, "hij", "bhij", "hj", "hi", "b", "j", "alibi", "t5", "relative"]
    )
    if not merged and len(batch) == 1:
        biases.append("bij")
    d = draw(st.sampled_from([8, 16, 24, 32, 64]))
    return {
        "batch": batch,
        "heads": heads,
        "kv_heads": kv_heads,
        "nq": draw(st.sampled_from(LENGTHS)),
        "nk": draw(st.sampled_from(LENGTHS)),
        "d": d,
        "dv": draw(st.sampled_from([d, d, 8, 40])),
        "dtype": draw(st.sampled_from([*DTYPES, torch.float64])),
        "mask": draw(st.booleans()),
        "bias": draw(st.sampled_from(biases)),
        "scale": draw(st.sampled_from([8.0, 1.0, 10.0, -4.0, 0.0, 100.0, "scalar", "head"])),
        "groups": groups,
        "causal": draw(st.booleans()),
        "l2norm_qk": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.parametrize("part", range(2))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(problem=problems(), lse=st.booleans())
def test_any_problem_matches_the_definition(part, problem, lse):
    """120 of them, in parts that test processes share."""
    assert_close_to_reference(make_inputs(**problem), lse=lse)


@pytest.mark.parametrize(("nq", "nk"), [(1, 1), (513, 513), (129, 1024), (1024, 129), (1, 2050), (2050, 65)])
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(nq, nk, causal):
    assert_close_to_reference(make_inputs((1,), 2, 1, nq, nk, d=32, causal=causal))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", ["hij", "bhij", "bij", "hj", "hi", "h", "b", "j", "i"])
def test_bias_gradient_is_summed_over_what_was_broadcast(dtype, bias):
    assert_close_to_reference(make_inputs((2,), 3, nq=33, nk=40, dtype=dtype, bias=bias, mask=True))


def test_bias_shared_over_the_rows_of_alphafold():
    x = make_inputs((2, 5), 4, nq=40, nk=40, d=16, bias="bhij", mask=True)
    assert x.attn_bias.shape == (2, 1, 4, 40, 40)
    assert_close_to_reference(x)


def test_bias_and_scale_of_another_dtype_get_their_gradients_in_it():
    x = make_inputs(dtype=torch.bfloat16)
    bias = torch.randn(2, 65, 65, requires_grad=True)
    scale = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)
    out = flash_cosine_sim_attention(x.q, x.k, x.v, attn_bias=bias, scale=scale)
    out.sum().backward()
    assert (out.dtype, bias.grad.dtype, scale.grad.dtype) == (torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("value", [1e4, -1e4, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_extreme_bias_entries(value, dtype):
    x = make_inputs((2,), 2, nq=70, nk=90, dtype=dtype, bias="hij")
    x.attn_bias[torch.rand(x.attn_bias.shape) < 0.3] = value
    x.attn_bias[0, 5] = value  # a whole row
    assert_close_to_reference(x)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [0.01, 100.0])
def test_norm_of_the_inputs_does_not_matter(dtype, factor):
    x = make_inputs(dtype=dtype)
    x.q.mul_(factor)
    x.k.mul_(factor)
    assert_close_to_reference(x)


@pytest.mark.parametrize("scale", [10.0, 70.0, 100.0, 400.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_all_cosines_minus_one(scale, dtype):
    """The worst case of the fixed shift: every term of a row's sum is as small as it can be."""
    x = make_inputs(nq=40, nk=70, dtype=dtype, scale=scale)
    direction = torch.randn(32)
    x.q.copy_(direction.expand_as(x.q))
    x.k.copy_(-direction.expand_as(x.k))
    assert_close_to_reference(x, lse=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("causal", [False, True])
def test_masked_keys_and_values_reach_nothing(dtype, poison, causal):
    x = make_inputs((2,), 2, 1, 70, 130, dtype=dtype, mask=True, causal=causal)
    hidden = ~x.mask[:, None, :, None].expand_as(x.k)
    x.k[hidden] = poison
    x.v[hidden] = poison
    assert_close_to_reference(x)
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    out = flash_cosine_sim_attention(*leaves, mask=x.mask, causal=causal)
    dq, dk, dv = torch.autograd.grad(out.float().sum(), leaves)
    assert dq.isfinite().all()
    assert bool((dk[hidden] == 0).all())
    assert bool((dv[hidden] == 0).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing(dtype):
    x = make_inputs((2,), 2, nq=70, nk=40, dtype=dtype, causal=True, mask=True)
    x.mask[1] = False
    leaves = [t.requires_grad_() for t in (x.q, x.k, x.v)]
    out, lse = flash_cosine_sim_attention(*leaves, x.mask, causal=True, return_lse=True)
    empty = lse == -math.inf
    assert bool(empty[1].all())
    assert bool(empty[0, :, :30].all())
    assert bool((out[empty] == 0).all())
    gradients = torch.autograd.grad(out.float().sum(), leaves)
    assert all(bool(g.isfinite().all()) for g in gradients)
    assert bool((gradients[0][empty] == 0).all())
    assert bool((gradients[1][1] == 0).all())


@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8), (0, 5, 8), (2, 0, 5, 8)])
def test_empty_queries(shape):
    q = torch.randn(*shape, requires_grad=True)
    k = torch.randn(*shape[:-2], 7, 8, requires_grad=True)
    out, lse = flash_cosine_sim_attention(q, k, k, return_lse=True)
    assert (out.shape, lse.shape) == (shape, shape[:-1])
    dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert dq.shape == q.shape
    assert bool((dk == 0).all())


def test_no_keys():
    q = torch.randn(2, 3, 5, 8, requires_grad=True)
    k = torch.randn(2, 3, 0, 8, requires_grad=True)
    out, lse = flash_cosine_sim_attention(q, k, k, return_lse=True)
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())
    dq, dk = torch.autograd.grad(out.sum(), (q, k))
    assert bool((dq == 0).all())
    assert dk.shape == k.shape


class TestStrides:
    """Views are served as they are: no layout changes the result."""

    def expect(self, q, k, v, **options):
        got = flash_cosine_sim_attention(q, k, v, **options)
        contiguous = flash_cosine_sim_attention(*(t.contiguous() for t in (q, k, v)), **options)
        torch.testing.assert_close(got, contiguous)
        torch.testing.assert_close(got, plain_cosine_sim_attention(q, k, v, **options), rtol=1e-4, atol=1e-5)

    def test_views_of_a_packed_projection(self):
        packed = torch.randn(2, 70, 3, 4, 16)  # (b, n, qkv, h, d), as a linear layer writes it
        self.expect(*(packed[:, :, index].transpose(1, 2) for index in range(3)), causal=True)

    def test_expanded_over_batch_and_heads(self):
        q = torch.randn(1, 1, 70, 16).expand(3, 4, -1, -1)
        k = torch.randn(1, 2, 70, 16).expand(3, -1, -1, -1)
        self.expect(q, k, k)

    def test_last_dim_not_contiguous(self):
        q, k, v = (torch.randn(2, 4, 16, 70).transpose(-1, -2) for _ in range(3))
        self.expect(q, k, v)

    def test_odd_offsets(self):
        q, k, v = (torch.randn(2 * 4 * 70 * 17 + 1)[1:].view(2, 4, 70, 17)[..., 1:] for _ in range(3))
        self.expect(q, k, v)

    def test_transposed_bias_and_mask(self):
        q = torch.randn(2, 4, 70, 16)
        bias = torch.randn(70, 4, 70).permute(1, 2, 0)
        mask = (torch.rand(70, 2) < 0.7).t()
        self.expect(q, q, q, attn_bias=bias, mask=mask)

    def test_gradients_of_expanded_inputs(self):
        base = torch.randn(1, 4, 70, 16, requires_grad=True)
        expanded = base.expand(3, -1, -1, -1)
        out = flash_cosine_sim_attention(expanded, expanded, expanded)
        (got,) = torch.autograd.grad(out.square().sum(), base)
        (expected,) = torch.autograd.grad(plain_cosine_sim_attention(expanded, expanded, expanded).square().sum(), base)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_lse_merges_partial_results():
    """What lse is for: attention over two halves of the keys, merged, is attention over all of them."""
    q, k, v = (torch.randn(1, 2, 64, 16) for _ in range(3))
    whole = flash_cosine_sim_attention(q, k, v)
    (left, left_lse), (right, right_lse) = (
        flash_cosine_sim_attention(q, k[:, :, part], v[:, :, part], return_lse=True)
        for part in (slice(0, 20), slice(20, 64))
    )
    weight = torch.sigmoid(left_lse - right_lse)[..., None]
    torch.testing.assert_close(weight * left + (1 - weight) * right, whole)


def test_only_what_needs_a_gradient_gets_one():
    x = make_inputs(bias="hij", scale="head")
    for name in ("q", "k", "v", "attn_bias", "scale"):
        arguments = x.arguments()
        arguments[name] = arguments[name].clone().requires_grad_()
        expected = dict(arguments)
        expected[name] = arguments[name].detach().clone().requires_grad_()
        flash_cosine_sim_attention(**arguments).sum().backward()
        plain_cosine_sim_attention(**expected).sum().backward()
        torch.testing.assert_close(arguments[name].grad, expected[name].grad, rtol=1e-3, atol=1e-4)
