"""chunked.py against the float64 definition: every feature, lengths around tile edges, poisoned buffers, memory."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from flash_cosine_sim_attention import chunked, flash_cosine_sim_attention, plain_cosine_sim_attention
from flash_cosine_sim_attention.peak_memory import peak_memory
from flash_cosine_sim_attention.testing import (
    Inputs,
    assert_close_to_reference,
    make_inputs,
    poisoned_gradients,
    poisoned_outputs,
    random_upstream,
)
from flash_cosine_sim_attention.tiles import MAX_FIXED_BOUND, TILE, Tiling, steps

LENGTHS = [(1, 1), (63, 65), (64, 64), (127, 128), (129, 127), (255, 257), (513, 256), (1, 1024), (300, 1)]
NUM_GRADIENTS = 5  # of q, k, v, bias, scale


def check(inputs: Inputs, **options):
    return assert_close_to_reference(inputs, backend="chunked", **options)


def run_module(inputs: Inputs, needs: list[bool] | None = None, with_dlse: bool = False):
    """Forward and backward of the module itself on buffers full of NaN -> (outputs, gradients)."""
    problem = inputs.problem()
    outputs, gradients = poisoned_outputs(problem), poisoned_gradients(problem, needs)
    chunked.forward(problem, outputs)
    dout, dlse = random_upstream(inputs)
    dlse = dlse.view(outputs.lse.shape).to(outputs.lse.dtype)
    chunked.backward(problem, outputs, dout.view(outputs.out.shape), dlse if with_dlse else None, gradients)
    return outputs, gradients


def present(record) -> dict[str, torch.Tensor]:
    """The tensors of Outputs or Gradients by name."""
    fields = {name: getattr(record, name) for name in record.__dataclass_fields__}
    return {name: x for name, x in fields.items() if x is not None}


@pytest.mark.parametrize(("nq", "nk"), LENGTHS)
@pytest.mark.parametrize("causal", [False, True])
def test_lengths(nq, nk, causal, each_device):
    check(make_inputs((1,), 2, nq=nq, nk=nk, d=16, causal=causal, mask=True), lse=True)
    check(make_inputs((1,), 1, nq=nq, nk=nk, d=8, causal=causal, bias="hij"))


@pytest.mark.parametrize(("nq", "nk"), [(2050, 1024), (1024, 2050)])
def test_long_sequences(nq, nk):
    check(make_inputs((1,), 1, nq=nq, nk=nk, d=16, causal=True, mask=True), lse=True)
    check(make_inputs((1,), 1, nq=nq, nk=nk, d=16, causal=True, scale="head", bias="hj"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [None, "hij"])
def test_dtypes(dtype, bias, each_device):
    options = {"nq": 130, "nk": 300, "d": 24, "dv": 40, "causal": True, "mask": True, "bias": bias, "dtype": dtype}
    check(make_inputs(**options), lse=True)
    check(make_inputs(**options, kv_heads=1, groups=3, scale="head"))


@pytest.mark.parametrize("kv_heads", [0, 1, 2, 3, 6])
@pytest.mark.parametrize("bias", [None, "bhij"])
def test_grouped_heads(kv_heads, bias, each_device):
    check(make_inputs((2,), 6, kv_heads, nq=90, nk=70, d=16, bias=bias, mask=True, causal=True, scale="head"))


def test_more_query_heads_in_a_group_than_rows_in_a_tile():
    check(make_inputs((1,), TILE + 3, 1, nq=5, nk=7, d=8, causal=True))


@pytest.mark.parametrize("bias", ["hij", "bij", "bhij", "hi", "hj", "ij", "bh", "b", "h", "i", "j", "bj", "bi", ""])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_broadcast_of_the_bias(bias, dtype):
    check(make_inputs((2,), 2, nq=40, nk=300, d=8, bias=bias, dtype=dtype, mask=True), lse=True)


@pytest.mark.parametrize("bias", ["bhij", "hij", "bij", "j", "bh"])
def test_two_batch_dims(bias):
    bias_of_all_dims = bias if bias != "bij" else "ij"
    check(make_inputs((2, 3), 2, 1, nq=20, nk=33, d=8, bias=bias_of_all_dims, mask=True, causal=True))


def test_bias_shared_over_the_outer_batch_dim():
    inputs = make_inputs((3, 2), 2, nq=20, nk=33, d=8)
    check(replace(inputs, attn_bias=torch.randn(1, 2, 2, 20, 33)))


@pytest.mark.parametrize("bias_dtype", [torch.float16, torch.float64])
def test_bias_of_another_dtype_gets_its_gradient_in_it(bias_dtype):
    inputs = make_inputs((3,), 2, nq=20, nk=33, d=8)
    bias = torch.randn(2, 20, 33, dtype=bias_dtype, requires_grad=True)
    out = flash_cosine_sim_attention(inputs.q, inputs.k, inputs.v, attn_bias=bias, backend="chunked")
    expected = plain_cosine_sim_attention(inputs.q, inputs.k, inputs.v, attn_bias=bias)
    upstream = torch.randn_like(out)
    (actual,), (wanted,) = (torch.autograd.grad(x, bias, upstream) for x in (out, expected))
    assert actual.dtype == bias_dtype
    torch.testing.assert_close(actual, wanted, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 1.0, -4.0, 59.0, 61.0, 100.0, "scalar", "head"])
@pytest.mark.parametrize("groups", [1, 2, 16])
def test_scales_and_groups(scale, groups):
    """Below and beyond the bound of the fixed shift."""
    check(make_inputs((1,), 2, nq=33, nk=270, d=32, scale=scale, groups=groups, mask=True), lse=True)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_largest_fixed_bound_with_all_cosines_at_its_ends(sign, dtype):
    """Every score is -B or B: the furthest that exp goes without a maximum, with small and with large values."""
    bound, nk = MAX_FIXED_BOUND[dtype], 300
    for size in (1e-9, 1e9):
        q = torch.ones(1, 1, 3, 8, dtype=dtype)
        v = torch.randn(1, 1, nk, 8, dtype=dtype) * size
        out, lse = flash_cosine_sim_attention(
            q, sign * torch.ones(1, 1, nk, 8, dtype=dtype), v, scale=bound, return_lse=True, backend="chunked"
        )
        expected = v.double().mean(2, keepdim=True).expand(-1, -1, 3, -1)
        torch.testing.assert_close(out, expected.to(dtype), rtol=2e-5, atol=2e-6 * size)
        torch.testing.assert_close(lse, torch.full_like(lse, sign * bound + math.log(nk)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [100.0, 1e4])
def test_large_biases(size, each_device):
    inputs = make_inputs((2,), 2, nq=40, nk=300, d=16, mask=True, causal=True)
    bias = torch.where(torch.rand(2, 40, 300) < 0.5, size, -size)
    check(replace(inputs, attn_bias=bias))


def test_bias_of_minus_infinity_and_rows_without_a_key(each_device):
    bias = torch.randn(2, 40, 300)
    bias[torch.rand(2, 40, 300) < 0.3] = -math.inf
    bias[:, 7] = -math.inf
    inputs = replace(make_inputs((2,), 2, nq=40, nk=300, d=16, mask=True), attn_bias=bias)
    check(inputs, lse=True)
    outputs, gradients = run_module(inputs, with_dlse=True)
    assert torch.all(outputs.out[..., 7, :] == 0)
    assert torch.all(outputs.lse[..., 7] == -math.inf)
    assert all(bool(x.isfinite().all()) for x in present(gradients).values())


@pytest.mark.parametrize("bias", [None, "hij"])
def test_nothing_visible_at_all(bias):
    inputs = make_inputs((2,), 2, nq=5, nk=270, d=8, mask=True, bias=bias)
    mask = inputs.mask.clone()
    mask[1] = False
    outputs, gradients = run_module(replace(inputs, mask=mask), with_dlse=True)
    assert torch.all(outputs.out[1] == 0)
    assert torch.all(outputs.lse[1] == -math.inf)
    for name in ("dq", "dk", "dv"):
        assert torch.all(getattr(gradients, name)[1] == 0), name
    check(replace(inputs, mask=mask), lse=True)


def test_queries_before_the_first_key_of_causal_attention():
    outputs, gradients = run_module(make_inputs((1,), 1, nq=600, nk=5, d=8, causal=True))
    assert torch.all(outputs.out[..., :595, :] == 0)
    assert torch.all(gradients.dq[..., :595, :] == 0)


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
@pytest.mark.parametrize("options", [{}, {"bias": "hij"}, {"l2norm_qk": False}, {"scale": 100.0}, {"causal": True}])
def test_garbage_in_masked_keys_and_values(garbage, options, each_device):
    inputs = make_inputs((2,), 2, nq=20, nk=300, d=8, mask=True, **options)
    hidden = ~inputs.mask[:, None, :, None]
    dirty = replace(inputs, k=inputs.k.masked_fill(hidden, garbage), v=inputs.v.masked_fill(hidden, garbage))
    clean_results, dirty_results = (run_module(x, with_dlse=True) for x in (inputs, dirty))
    for clean, got in zip(clean_results, dirty_results, strict=True):
        for name, x in present(got).items():
            if name != "k_rnorm":  # of a masked key: no part of any result
                assert torch.equal(x, getattr(clean, name)), name


@pytest.mark.parametrize("shape", [{"nq": 0}, {"nk": 0}, {"batch": (0,)}, {"nq": 0, "nk": 0}, {"batch": (2, 0)}])
@pytest.mark.parametrize("bias", [None, "hij"])
def test_sizes_of_zero(shape, bias, each_device):
    check(make_inputs(**{"nq": 5, "nk": 6, "d": 8} | shape, bias=bias, mask=True, causal=True), lse=True)


def test_no_heads():
    """Only keys: their gradient is 0."""
    q, k = torch.randn(2, 0, 5, 8), torch.randn(2, 3, 6, 8, requires_grad=True)
    flash_cosine_sim_attention(q, k, k, backend="chunked").sum().backward()
    assert torch.all(k.grad == 0)


def test_queries_and_keys_of_norm_zero_are_treated_as_by_normalize():
    inputs = make_inputs((1,), 1, nq=6, nk=9, d=8, groups=2, dtype=torch.float64)
    q, k = inputs.q.clone(), inputs.k.clone()
    q[..., 2, :4], q[..., 3, :], k[..., 5, :] = 0, 0, 0
    q[..., 4, :] = 1e-14
    inputs = replace(inputs, q=q, k=k)
    leaves = [x.clone().requires_grad_() for x in (q, k, inputs.v)]
    results = []
    for function, options in ((flash_cosine_sim_attention, {"backend": "chunked"}), (plain_cosine_sim_attention, {})):
        out = function(*leaves, groups=2, **options)
        results.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for actual, expected in zip(*results, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("wanted", range(NUM_GRADIENTS))
@pytest.mark.parametrize("scale", [8.0, 100.0])
def test_one_gradient_at_a_time(wanted, scale):
    options = {"bias": "hj"} if wanted == 3 else {}
    inputs = make_inputs((2,), 2, nq=40, nk=300, d=8, mask=True, scale="head" if wanted == 4 else scale, **options)
    _, everything = run_module(inputs)
    _, one = run_module(inputs, needs=[index == wanted for index in range(NUM_GRADIENTS)])
    assert len(present(one)) == 1
    for name, gradient in present(one).items():
        assert torch.equal(gradient, getattr(everything, name)), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bias", [None, "hij", "bhij"])
def test_every_element_is_written(dtype, bias):
    inputs = make_inputs((2,), 4, 2, nq=300, nk=270, d=8, dv=12, dtype=dtype, bias=bias, mask=True, causal=True)
    outputs, gradients = run_module(inputs)
    for name, x in (present(outputs) | present(gradients)).items():
        assert not bool(x.isnan().any()), name


def test_norm_factors():
    inputs = make_inputs((2,), 4, 2, nq=30, nk=27, d=8, groups=2)
    outputs, _ = run_module(inputs)
    for factors, x in ((outputs.q_rnorm, inputs.q), (outputs.k_rnorm, inputs.k)):
        norms = x.double().unflatten(-1, (2, 4)).norm(dim=-1).view(factors.shape)
        torch.testing.assert_close(factors.double(), 1 / norms, rtol=1e-6, atol=0)


def test_inputs_of_any_strides():
    inputs = make_inputs((2,), 3, nq=40, nk=50, d=8, mask=True)
    buffers = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (inputs.q, inputs.k, inputs.v)]
    check(replace(inputs, q=buffers[0], k=buffers[1], v=buffers[2]))
    check(replace(inputs, q=inputs.q.mT.contiguous().mT, v=inputs.v[:1, :, :1].expand(2, 3, 50, 8)))
    bias = torch.randn(50, 40).T.expand(3, 40, 50)
    check(replace(inputs, attn_bias=bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"causal": True, "mask": True}, {"kv_heads": 1}, {"scale": 100.0}])
def test_memory_grows_with_the_length_only(dtype, options):
    n, heads, d = 4096, 2, 16
    inputs = make_inputs((1,), heads, nq=n, d=d, dtype=dtype, **options)
    leaves = [x.requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    dout = torch.randn(inputs.out_shape(), dtype=dtype)

    def run():
        out = flash_cosine_sim_attention(**inputs.arguments(), backend="chunked")
        return torch.autograd.grad(out, leaves, dout)

    use = peak_memory(run)
    results = heads * n * d * dtype.itemsize * 4  # out and the gradients of q, k, v
    tiles = 2 * Tiling.of(inputs.problem()).box[2] * TILE * TILE * 4
    assert use.largest < n * n
    assert use.peak < results + tiles + 8 * heads * n * (d + 1) * 4
    assert use.peak < 0.1 * heads * n * n * 4


def test_memory_of_a_bias_gradient_is_the_gradient():
    n, heads = 1024, 2
    inputs = make_inputs((1,), heads, nq=n, d=8, bias="hij")
    bias = inputs.attn_bias.requires_grad_()
    arguments = inputs.arguments() | {"attn_bias": bias, "backend": "chunked"}
    use = peak_memory(lambda: torch.autograd.grad(flash_cosine_sim_attention(**arguments).sum(), bias))
    assert use.peak < 1.5 * heads * n * n * 4


@pytest.mark.parametrize("length", [1, 255, 256, 257, 1000])
@pytest.mark.parametrize("heads", [(1, 1), (8, 8), (8, 1), (8, 2)])
def test_tiling_covers_and_bounds(length, heads):
    problem = make_inputs((3,), *heads, nq=length, nk=length + 1, d=4).problem()
    tiling = Tiling.of(problem)
    assert all(1 <= size <= full for size, full in zip(tiling.box, problem.k.shape[:3], strict=True))
    scores = math.prod(tiling.box) * heads[0] // heads[1] * tiling.rows * tiling.keys
    assert scores <= 2 * TILE * TILE * max(torch.get_num_threads(), 1)
    assert sum(part.stop - part.start for part in steps(length, tiling.rows)) == length
