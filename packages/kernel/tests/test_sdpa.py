"""sdpa.py: what torch's own attention serves is right and in O(n) memory; what it does not is refused, with why."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from flash_cosine_sim_attention import backends, flash_cosine_sim_attention, sdpa
from flash_cosine_sim_attention.peak_memory import peak_memory
from flash_cosine_sim_attention.testing import Inputs, assert_close_to_reference, evaluate, make_inputs, random_upstream

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def check(inputs: Inputs):
    return assert_close_to_reference(inputs, backend="sdpa", constants=("attn_bias",))


def reason(inputs: Inputs, return_lse: bool = False) -> str | None:
    problem = inputs.problem()
    bias = problem.bias if inputs.attn_bias is None or not inputs.attn_bias.requires_grad else inputs.attn_bias[:, None]
    return sdpa.why_not(problem.q, problem.k, problem.v, problem.mask, bias, problem.causal, return_lse)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 64, 65, 129, 513])
@pytest.mark.parametrize("causal", [False, True])
def test_self_attention(dtype, n, causal):
    check(make_inputs((2,), 2, nq=n, d=16, dtype=dtype, causal=causal))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("nq", "nk"), [(1, 300), (300, 1), (65, 130), (130, 65)])
def test_cross_attention_with_a_mask(dtype, nq, nk):
    check(make_inputs((2,), 2, nq=nq, nk=nk, d=16, dtype=dtype, mask=True))


@pytest.mark.parametrize(("nq", "nk"), [(1, 300), (1, 1), (130, 65), (65, 64), (2, 1)])
def test_causal_where_it_is_aligned_to_the_bottom_right(nq, nk):
    """One query sees all keys; of more queries than keys the first see none."""
    check(make_inputs((2,), 2, nq=nq, nk=nk, d=16, causal=True))


@pytest.mark.parametrize("kv_heads", [0, 1, 2, 3])
@pytest.mark.parametrize("batch", [(2,), (2, 3), (2, 1, 2)])
def test_grouped_heads_and_batch_dims(kv_heads, batch):
    check(make_inputs(batch, 6, kv_heads, nq=33, nk=20, d=8, mask=True))
    check(make_inputs(batch, 6, kv_heads, nq=33, d=8, causal=True))


@pytest.mark.parametrize("scale", [0.0, -4.0, 100.0, "scalar", "head"])
@pytest.mark.parametrize("options", [{"groups": 4}, {"l2norm_qk": False}, {"heads": 0}])
def test_scales_groups_and_forms(scale, options):
    check(make_inputs(nq=40, nk=50, d=16, scale=scale, mask=True, **options))
    check(make_inputs(nq=40, nk=30, d=16, scale=scale, causal=True, **options))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [0.0, -4.0])
def test_causal_with_a_scale_that_is_not_positive(dtype, scale):
    """Torch makes NaN or wrong values of it."""
    check(make_inputs(nq=300, d=16, scale=scale, causal=True, dtype=dtype))


@pytest.mark.parametrize("shape", [(2, 2, 40, 50), (1, 2, 40, 50), (2, 1, 1, 50), (1, 1, 40, 1), (1, 2, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_constant_bias(shape, dtype):
    inputs = make_inputs((2,), 2, nq=40, nk=50, d=16, dtype=dtype)
    check(replace(inputs, attn_bias=torch.randn(shape, dtype=dtype)))
    check(replace(inputs, attn_bias=torch.randn(shape)))


def test_constant_bias_of_large_and_infinite_values():
    inputs = make_inputs((2,), 2, nq=40, nk=50, d=16)
    bias = torch.where(torch.rand(2, 40, 50) < 0.5, 1e4, -1e4)
    bias[torch.rand(2, 40, 50) < 0.3] = -math.inf
    bias[:, 7] = -math.inf
    check(replace(inputs, attn_bias=bias))
    out = flash_cosine_sim_attention(inputs.q, inputs.k, inputs.v, attn_bias=bias, backend="sdpa")
    assert torch.all(out[:, :, 7] == 0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_garbage_in_masked_keys_and_values(garbage):
    inputs = make_inputs((2,), 2, nq=20, nk=30, d=8, mask=True)
    mask = inputs.mask.clone()
    mask[1] = False
    inputs = replace(inputs, mask=mask)
    hidden = ~mask[:, None, :, None]
    dirty = replace(inputs, k=inputs.k.masked_fill(hidden, garbage), v=inputs.v.masked_fill(hidden, garbage))
    dout, _ = random_upstream(inputs)
    clean, got = (evaluate(flash_cosine_sim_attention, x, dout, backend="sdpa") for x in (inputs, dirty))
    assert torch.all(got["out"][1] == 0)
    for name, x in got.items():
        assert torch.equal(x, clean[name]), name


def test_inputs_of_any_strides():
    inputs = make_inputs((2,), 3, nq=40, d=8)
    check(replace(inputs, q=inputs.q.mT.contiguous().mT, k=inputs.k.mT.contiguous().mT, v=inputs.v.mT.contiguous().mT))
    check(replace(inputs, v=inputs.v[:1, :, :, :1].expand(2, 3, 40, 8)))


REFUSED = {
    "log-sum-exp": {"return_lse": True},
    "one head dim": {"dv": 12},
    "at least 1": {"nk": 0},
    "together with causal": {"mask": True, "causal": True},
    "top left": {"nq": 5, "causal": True},
    "mask together with attn_bias": {"mask": True, "bias": "hij"},
    "shared over one of two batch dims": {"batch": (2, 3), "bias": "bhij"},
}


@pytest.mark.parametrize(("words", "options"), list(REFUSED.items()))
def test_refusals(words, options):
    options = dict(options)
    return_lse = options.pop("return_lse", False)
    inputs = make_inputs(**{"nq": 6, "nk": 7, "d": 8} | options)
    assert words in (reason(inputs, return_lse) or "")
    with pytest.raises(ValueError, match=f"'sdpa' cannot serve this call: .*{words}"):
        flash_cosine_sim_attention(**inputs.arguments(), return_lse=return_lse, backend="sdpa")
    flash_cosine_sim_attention(**inputs.arguments(), return_lse=return_lse)  # served by another path


def test_bias_is_refused_if_its_gradient_is_wanted_or_its_dtype_does_not_fit():
    inputs = make_inputs(nq=6, nk=7, d=8, bias="bhij")
    bias = inputs.attn_bias.requires_grad_()
    with pytest.raises(ValueError, match="gradient of attn_bias"):
        flash_cosine_sim_attention(inputs.q, inputs.k, inputs.v, attn_bias=bias, backend="sdpa")
    with torch.no_grad():
        assert reason(replace(inputs, attn_bias=bias)) is None
    with pytest.raises(ValueError, match=r"torch.float32, got torch.float64"):
        flash_cosine_sim_attention(inputs.q, inputs.k, inputs.v, attn_bias=bias.detach().double(), backend="sdpa")


def test_choice():
    """float32 goes to torch where that is exact; what needs more, and float16, which is slow there, to `chunked`."""

    def chosen(**options) -> bool:
        problem = make_inputs(**{"nq": 300, "d": 8} | options).problem()
        fields = (problem.q, problem.k, problem.v, problem.mask, problem.bias, problem.causal)
        return backends.uses_sdpa(*fields, return_lse=False, toeplitz=problem.toeplitz, backend=None)

    assert chosen()
    assert chosen(causal=True)
    assert chosen(mask=True)
    assert chosen(dtype=torch.float64)
    assert not chosen(mask=True, causal=True)
    assert not chosen(bias="alibi")
    assert not chosen(dtype=torch.float16)
    assert not chosen(dtype=torch.bfloat16, nq=64)
    assert chosen(dtype=torch.bfloat16) == sdpa.HAS_BFLOAT16_PRODUCTS


SERVED = {
    "full": {},
    "causal": {"causal": True},
    "more queries": {"causal": True, "nk": 1024},
    "mask": {"mask": True},
    "grouped": {"heads": 4, "kv_heads": 2},
    "two batch dims": {"batch": (1, 2)},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("options", SERVED.values(), ids=SERVED.keys())
def test_memory_grows_with_the_length_only(dtype, options):
    """None of the conditions in `why_not` is missing: torch does not turn to its n x n computation."""
    n, d = 2048, 16
    inputs = make_inputs(**{"batch": (1,), "nq": n, "d": d, "dtype": dtype, "scale": "head"} | options)
    dout, _ = random_upstream(inputs)
    use = peak_memory(lambda: evaluate(flash_cosine_sim_attention, inputs, dout, backend="sdpa"))
    assert use.largest < n * n
    assert use.peak < 16 * dout.numel() * max(dtype.itemsize, 4) + 2**21


@pytest.mark.parametrize("layout", ["transposed", "last dim of stride 0"])
def test_memory_with_rows_that_are_not_contiguous(layout):
    n = 2048
    inputs = make_inputs((1,), 2, nq=n, d=16)
    v = inputs.v.mT.contiguous().mT if layout == "transposed" else inputs.v[..., :1].expand(1, 2, n, 16)
    q = inputs.q.mT.contiguous().mT
    use = peak_memory(lambda: flash_cosine_sim_attention(q, q, v, l2norm_qk=False, backend="sdpa"))
    assert use.largest < n * n


def test_memory_with_a_constant_bias():
    n = 1024
    inputs, bias = make_inputs((2,), 2, nq=n, d=16), torch.randn(2, n, n)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]

    def run():
        out = flash_cosine_sim_attention(*leaves, attn_bias=bias, backend="sdpa")
        return torch.autograd.grad(out.sum(), leaves)

    assert peak_memory(run).peak < n * n * 4
