"""The values of the kernels that always work and of those that are chosen, and that they really serve."""

from __future__ import annotations

import math
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention, plain_cosine_sim_attention
from flash_cosine_sim_attention.cuda import FLOAT32_BOUND
from flash_cosine_sim_attention.testing import (
    assert_close_to_reference,
    evaluate,
    make_inputs,
    poisoned_gradients,
    poisoned_outputs,
    random_upstream,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.gpu

HALF = [torch.bfloat16, torch.float16]
DTYPES = [*HALF, torch.float32]
cuda = partial(make_inputs, device="cuda")
EVERY_LENGTH = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 255, 257, 512, 513)


def served(backend: str | None, dtype: torch.dtype, bound: float) -> str | None:
    """float32 with larger logits is left to the torch path (cuda.FLOAT32_BOUND): no kernel is forced onto it."""
    return None if dtype == torch.float32 and bound > FLOAT32_BOUND else backend


def kernel_module(backend: str | None):
    from flash_cosine_sim_attention import backends

    return backends.implementation(cuda(dtype=torch.bfloat16).problem(), backend or "")


class TestFusedKernelsServe:
    """A call that the kernels should serve must not fall back in silence."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("d", [8, 16, 24, 32, 40, 64, 72, 80, 96, 112, 128])
    def test_head_dims(self, dtype, d, backend):
        assert_close_to_reference(cuda((1,), 2, 1, 150, 140, d=d, dtype=dtype, causal=True), backend=backend, lse=True)

    @pytest.mark.parametrize("dtype", HALF)
    @pytest.mark.parametrize("d", [136, 160, 192, 200, 256])
    def test_large_head_dims(self, dtype, d, backend):
        assert_close_to_reference(cuda((1,), 2, 1, 150, 140, d=d, dtype=dtype), backend=backend, lse=True)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("d", [33, 60])
    def test_head_dims_that_need_padding(self, dtype, d, backend):
        assert_close_to_reference(cuda((1,), 2, nq=70, d=d, dtype=dtype), backend=backend)

    def test_float64_and_wide_heads_are_served_by_the_torch_path(self):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_close_to_reference(cuda((1,), 1, nq=40, d=32, dtype=torch.float64))
            assert_close_to_reference(cuda((1,), 1, nq=40, d=264, dtype=torch.bfloat16))


@st.composite
def configurations(draw) -> dict[str, Any]:
    heads = draw(st.sampled_from([1, 2, 4]))
    d = draw(st.sampled_from([16, 32, 64, 64, 128]))
    return {
        "batch": draw(st.sampled_from([(1,), (2,), (2, 3)])),
        "heads": heads,
        "kv_heads": draw(st.sampled_from([None, 0, 1, heads])),
        "nq": draw(st.sampled_from(EVERY_LENGTH)),
        "nk": draw(st.sampled_from(EVERY_LENGTH)),
        "d": d,
        "dtype": draw(st.sampled_from(DTYPES)),
        "mask": draw(st.booleans()),
        "bias": draw(st.sampled_from([None, None, "hij", "bhij", "hj", "hi", "b"])),
        "scale": draw(st.sampled_from([8.0, 1.0, 10.0, 12.0, -4.0, 60.0, 100.0, "scalar", "head"])),
        "groups": draw(st.sampled_from([1, 1, 2, 8])),
        "causal": draw(st.booleans()),
        "l2norm_qk": draw(st.booleans()),
        "seed": draw(st.integers(0, 2**16)),
    }


@pytest.mark.parametrize("part", range(4))
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=False)
@given(configuration=configurations(), lse=st.booleans(), backend=st.sampled_from(["sm80", None]))
def test_random_configurations(part, configuration, lse, backend):
    """200 of them, in parts that test processes share."""
    scale, groups = configuration["scale"], configuration["groups"]
    bound = abs(scale) * groups if isinstance(scale, float) else 0.0
    backend = served(backend, configuration["dtype"], bound)
    assert_close_to_reference(cuda(**configuration), backend=backend, lse=lse)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize(("nq", "nk", "causal"), [(300, 333, False), (129, 1100, True)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_later_calls_of_a_signature(nq, nk, causal, d, dtype, deterministic, backend):
    """The first goes the usual way, later ones the short one (common_call.py), where deterministic with NaN in every
    workspace (torch's fill_uninitialized_memory)."""
    torch.use_deterministic_algorithms(deterministic)
    try:
        for seed in range(3):
            x = cuda((2,), 4, 2, nq, nk, d=d, dtype=dtype, causal=causal, seed=seed, mask=d == 64 and not causal)
            assert_close_to_reference(x, backend=backend, lse=seed == 1)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("nq", "nk"), [(2050, 2050), (129, 4097), (4097, 129), (1, 4097), (4096, 4096)])
def test_long_lengths(nq, nk, causal, dtype, backend):
    assert_close_to_reference(cuda((1,), 2, 1, nq, nk, d=64, dtype=dtype, causal=causal), backend=backend)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("d", [64, 96, 128])
@pytest.mark.parametrize("bias", ["hij", "bhij", "hj", "bij", "relative"])
def test_bias_that_hides_and_lifts(dtype, d, bias, backend):
    """Rows of the bias start on 16-byte boundaries, so that the Hopper forward reads them as they are."""
    x = cuda((2,), 2, nq=140, nk=264, d=d, dtype=dtype, bias=bias, causal=bias == "bhij", mask=bias == "hj")
    x.attn_bias[..., 1::3] = -math.inf
    x.attn_bias[..., 9::30] += 100.0
    assert_close_to_reference(x, backend=backend, lse=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{}, {"bias": "hij"}, {"groups": 4}, {"mask": True, "causal": True}])
def test_every_element_is_written(dtype, options, backend):
    """Outputs and gradients are NaN before, and the definition's values after."""
    x = cuda((2,), 4, 2, 150, 140, d=64, dtype=dtype, **options)
    problem, module = x.problem(), kernel_module(backend)
    outputs = poisoned_outputs(problem)
    module.forward(problem, outputs)
    gradients = poisoned_gradients(problem, [True, True, True, problem.bias is not None, False])
    dout, _ = random_upstream(x)
    module.backward(problem, outputs, dout.view_as(outputs.out), None, gradients)
    exact = evaluate(plain_cosine_sim_attention, x.to(torch.float64), dout)
    tolerance = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 2e-2}[dtype]
    found = {"out": outputs.out, "dq": gradients.dq, "dk": gradients.dk, "dv": gradients.dv}
    for name, tensor in found.items():
        want = exact[name].view_as(tensor)
        assert float((tensor.double() - want).norm() / want.norm()) < tolerance, name


@pytest.mark.parametrize("dtype", HALF)
def test_relative_error_with_the_norm_inside(dtype, backend):
    """Peers with F.normalize in front of them reach 66 to 86e-4 in bfloat16."""
    x = cuda((2,), 4, nq=1024, d=64, dtype=dtype, scale=10.0)
    dout, _ = random_upstream(x)
    got = evaluate(flash_cosine_sim_attention, x, dout, backend=backend)
    exact = evaluate(plain_cosine_sim_attention, x.to(torch.float64), dout)
    for name, want in exact.items():
        assert float((got[name].double() - want).norm() / want.norm()) <= 30e-4, name


def test_float32_relative_error(backend):
    x = cuda((2,), 4, nq=1024, d=64, scale=10.0)
    dout, _ = random_upstream(x)
    got = evaluate(flash_cosine_sim_attention, x, dout, backend=backend)
    exact = evaluate(plain_cosine_sim_attention, x.to(torch.float64), dout)
    for name, want in exact.items():
        assert float((got[name].double() - want).norm() / want.norm()) <= 2e-6, name


@pytest.mark.parametrize("d", [24, 64, 128, 256])
def test_tf32_setting(d, monkeypatch, backend):
    """Where torch allows TF32 in products, float32 calls take the faster kernels: eleven bits, as TF32 has."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32")
    inputs = cuda((2,), 4, 2, 300, 333, d=d, mask=True, scale=10)
    out = flash_cosine_sim_attention(**inputs.arguments(), backend=backend)
    exact = plain_cosine_sim_attention(**inputs.to(torch.float64).arguments())
    assert 1e-5 < float((out - exact).norm() / exact.norm()) < 1e-3


class TestEdges:
    """What each_device tests say of the kernels that are chosen, of both."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("factor", [0.01, 100.0])
    def test_norm_of_the_inputs_does_not_matter(self, dtype, factor, backend):
        x = cuda((2,), 2, 1, 150, 300, d=64, dtype=dtype, causal=True)
        x.q.mul_(factor)
        x.k.mul_(factor)
        assert_close_to_reference(x, backend=backend, lse=True)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("scale", [10.0, 70.0, 100.0])
    def test_all_cosines_minus_one(self, dtype, scale, backend):
        """The worst case of the fixed shift: every term of a row's sum is as small as it can be."""
        x = cuda((1,), 2, nq=150, nk=1100, d=64, dtype=dtype, scale=scale)
        direction = torch.randn(64, device="cuda")
        x.q.copy_(direction.expand_as(x.q))
        x.k.copy_(-direction.expand_as(x.k))
        assert_close_to_reference(x, backend=served(backend, dtype, scale), lse=True)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("nq", [127, 128, 129, 257])
    @pytest.mark.parametrize("nk", [127, 128, 129, 257])
    def test_lengths_over_the_borders_of_tiles(self, nq, nk, dtype, backend):
        for causal, mask in ((False, False), (True, False), (False, True), (True, True)):
            x = cuda((1,), 2, 1, nq, nk, d=64, dtype=dtype, causal=causal, mask=mask)
            assert_close_to_reference(x, backend=backend)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("shape", [(0, 2, 5, 16), (2, 2, 0, 16), (2, 0, 5, 16)])
    def test_empty_queries(self, shape, dtype, backend):
        q = torch.randn(*shape, device="cuda", dtype=dtype, requires_grad=True)
        k = torch.randn(*shape[:-2], 7, 16, device="cuda", dtype=dtype, requires_grad=True)
        out, lse = flash_cosine_sim_attention(q, k, k, backend=backend, return_lse=True)
        assert (out.shape, lse.shape) == (shape, shape[:-1])
        assert bool((torch.autograd.grad(out.sum(), k)[0] == 0).all())

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_no_keys(self, dtype, backend):
        q = torch.randn(2, 3, 5, 16, device="cuda", dtype=dtype, requires_grad=True)
        out, lse = flash_cosine_sim_attention(q, q[:, :, :0], q[:, :, :0], backend=backend, return_lse=True)
        assert bool((out == 0).all())
        assert bool((lse == -math.inf).all())
        assert bool((torch.autograd.grad(out.sum(), q)[0] == 0).all())
