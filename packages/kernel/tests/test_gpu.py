"""What only a GPU can show: streams, graphs, huge offsets, determinism, memory, that the fused kernels really serve."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention, plain_cosine_sim_attention
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
EVERY_LENGTH = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129, 191, 255, 257, 512, 513)


@pytest.fixture(params=["sm80", None], ids=["sm80", "automatic"])
def backend(request) -> str | None:
    """The kernels that always work, and those that are chosen: on Hopper, its own where they serve."""
    return request.param


def cuda(*arguments: Any, **options: Any):
    return make_inputs(*arguments, device="cuda", **options)


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


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=False)
@given(configuration=configurations(), lse=st.booleans(), backend=st.sampled_from(["sm80", None]))
def test_random_configurations(configuration, lse, backend):
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
            x = cuda((2,), 4, 2, nq, nk, d=d, dtype=dtype, causal=causal, seed=seed)
            assert_close_to_reference(x, backend=backend, lse=seed == 1)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("nq", "nk"), [(2050, 2050), (129, 4097), (4097, 129), (1, 4097), (4096, 4096)])
def test_long_lengths(nq, nk, causal, dtype, backend):
    assert_close_to_reference(cuda((1,), 2, 1, nq, nk, d=64, dtype=dtype, causal=causal), backend=backend)


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


class TestDeterminism:
    def gradients(self, x, backend):
        dout, _ = random_upstream(x)
        return evaluate(flash_cosine_sim_attention, x, dout, backend=backend)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("options", [{"causal": True}, {"bias": "hij", "mask": True}, {"kv_heads": 1}])
    def test_bit_equal_gradients(self, dtype, options, backend):
        x = cuda((2,), 4, nq=300, nk=310, d=64, dtype=dtype, **options)
        torch.use_deterministic_algorithms(True)
        try:
            first = self.gradients(x, backend)
            for _ in range(20):
                again = self.gradients(x, backend)
                assert all(torch.equal(first[name], again[name]) for name in first)
        finally:
            torch.use_deterministic_algorithms(False)

    @pytest.mark.parametrize(("d", "causal"), [(64, True), (128, False)])
    def test_problems_that_take_turns(self, d, causal, backend):
        """Each leaves in the workspaces what is wrong for the other: a kernel that reads too early shows."""
        problems = [cuda((4,), 8, nq=512, d=d, dtype=torch.float16, causal=causal, seed=seed) for seed in (1, 2)]
        torch.use_deterministic_algorithms(True)
        try:
            first = [self.gradients(x, backend) for x in problems]
            for turn in range(1000):
                again = self.gradients(problems[turn % 2], backend)
                assert all(torch.equal(again[name], expected) for name, expected in first[turn % 2].items()), turn
        finally:
            torch.use_deterministic_algorithms(False)

    def test_deterministic_gradients_are_right(self, backend):
        torch.use_deterministic_algorithms(True)
        try:
            assert_close_to_reference(cuda((2,), 4, 2, 200, 300, d=64, dtype=torch.bfloat16), backend=backend)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_forward_is_bit_equal(self, backend):
        x = cuda((2,), 4, nq=513, d=64, dtype=torch.bfloat16, causal=True)
        first = flash_cosine_sim_attention(**x.arguments(), backend=backend)
        for _ in range(100):
            assert torch.equal(first, flash_cosine_sim_attention(**x.arguments(), backend=backend))


class TestStreamsAndGraphs:
    def test_side_stream(self, backend):
        x = cuda((2,), 4, nq=512, d=64, dtype=torch.bfloat16, causal=True)
        dout, _ = random_upstream(x)
        expected = evaluate(flash_cosine_sim_attention, x, dout, backend=backend)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)  # the default stream would overtake a call that ignored this one
            got = evaluate(flash_cosine_sim_attention, x, dout, backend=backend)
        stream.synchronize()
        assert torch.equal(got["out"], expected["out"])
        torch.testing.assert_close(got["dq"], expected["dq"], rtol=1e-2, atol=1e-2)

    def test_graph_replay(self, backend):
        x = cuda((2,), 4, nq=300, d=64, dtype=torch.bfloat16, causal=True)
        q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
        dout = torch.randn_like(q)

        def step():
            out = flash_cosine_sim_attention(q, k, v, causal=True, backend=backend)
            return (out, *torch.autograd.grad(out, (q, k, v), dout))

        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            captured = step()
        with torch.no_grad():
            for t in (q, k, v):
                t.copy_(torch.randn_like(t))
        graph.replay()
        torch.cuda.synchronize()
        for got, want in zip(captured, step(), strict=True):
            torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)

    def test_no_synchronisation(self, backend):
        x = cuda((2,), 4, nq=300, d=64, dtype=torch.bfloat16, scale="head", bias="hij", mask=True)
        dout, _ = random_upstream(x)
        evaluate(flash_cosine_sim_attention, x, dout, backend=backend)
        q = x.q.requires_grad_()
        arguments = x.arguments() | {"q": q}
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(flash_cosine_sim_attention(**arguments, backend=backend), q, dout)
        finally:
            torch.cuda.set_sync_debug_mode("default")


class TestHugeOffsets:
    """Element offsets beyond 2^31."""

    def compare_last_head(self, q, k, v, backend):
        got = flash_cosine_sim_attention(q, k, v, backend=backend)[-1:, -1:]
        want = plain_cosine_sim_attention(*(t[-1:, -1:].double() for t in (q, k, v)))
        assert float((got.double() - want).norm() / want.norm()) < 1e-2

    def test_many_heads(self, backend):
        q = torch.randn(1, 1, 128, 64, device="cuda", dtype=torch.bfloat16)
        q = q.repeat(300, 1000, 1, 1)  # 2.46e9 elements
        assert q.numel() > 2**31
        q[-1, -1] = torch.randn(128, 64, device="cuda")
        self.compare_last_head(q, q, q, backend)

    def test_long_rows(self, backend):
        """One head of a (b, n, h, d) buffer whose rows are 2^20 elements apart."""
        buffer = torch.zeros(1, 2100, 16384, 64, device="cuda", dtype=torch.bfloat16)
        view = buffer.transpose(1, 2)[:, -2:]
        view.normal_()
        assert view.stride(2) * view.shape[2] > 2**31
        self.compare_last_head(view, view, view, backend)

    def test_bias_beyond_two_to_the_31(self, backend):
        n = 47_000
        q = torch.randn(1, 1, n, 16, device="cuda", dtype=torch.bfloat16)
        bias = torch.zeros(1, n, n, device="cuda", dtype=torch.bfloat16)
        bias[0, -64:].normal_()
        assert bias.numel() > 2**31
        got = flash_cosine_sim_attention(q, q, q, attn_bias=bias, backend=backend)[:, :, -64:]
        want = plain_cosine_sim_attention(q[:, :, -64:].double(), q.double(), q.double(), attn_bias=bias[:, -64:])
        assert float((got.double() - want).norm() / want.norm()) < 1e-2


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("n", [1024, 16384])
def test_memory_is_linear(dtype, n, backend):
    """Beside inputs, output and gradients: the log-sum-exp, norm factors, delta and one float32 copy of q."""
    x = cuda((1,), 4, nq=n, d=64, dtype=dtype, causal=True)
    dout, _ = random_upstream(x)
    q, k, v = (t.requires_grad_() for t in (x.q, x.k, x.v))
    torch.autograd.grad(flash_cosine_sim_attention(q, k, v, backend=backend), (q, k, v), dout)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.autograd.grad(flash_cosine_sim_attention(q, k, v, backend=backend), (q, k, v), dout)
    extra = torch.cuda.max_memory_allocated() - before
    tensor = q.numel() * q.element_size()
    assert extra < 10 * tensor + 4 * n * 4 * 16


def test_workspaces_hold_no_stale_state(backend):
    """Calls of other shapes in between change nothing."""
    x = cuda((2,), 4, nq=200, d=64, dtype=torch.bfloat16)
    expected = flash_cosine_sim_attention(**x.arguments(), backend=backend)
    for n in (65, 700, 1):
        y = cuda((1,), 2, nq=n, d=64, dtype=torch.bfloat16)
        evaluate(flash_cosine_sim_attention, y, random_upstream(y)[0], backend=backend)
    assert torch.equal(flash_cosine_sim_attention(**x.arguments(), backend=backend), expected)


def test_learned_scale_trains_on_the_device(backend):
    scale = torch.full((4,), 8.0, device="cuda", requires_grad=True)
    x = cuda((2,), 4, nq=100, d=32, dtype=torch.bfloat16)
    out = flash_cosine_sim_attention(x.q, x.k, x.v, scale=scale, backend=backend)
    out.float().square().sum().backward()
    assert bool((scale.grad != 0).all())
    assert not math.isnan(float(scale.grad.sum()))
