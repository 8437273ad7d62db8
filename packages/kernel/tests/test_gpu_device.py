"""What only a GPU can show of its surroundings: streams, graphs, huge offsets, determinism, memory."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention, plain_cosine_sim_attention
from flash_cosine_sim_attention.testing import assert_close_to_reference, evaluate, make_inputs, random_upstream

pytestmark = pytest.mark.gpu

HALF = [torch.bfloat16, torch.float16]
DTYPES = [*HALF, torch.float32]
cuda = partial(make_inputs, device="cuda")


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
        """Each leaves in the workspaces what is wrong for the other: a kernel that reads too early shows. The sm80
        kernels start none before its time."""
        problems = [cuda((4,), 8, nq=512, d=d, dtype=torch.float16, causal=causal, seed=seed) for seed in (1, 2)]
        torch.use_deterministic_algorithms(True)
        try:
            first = [self.gradients(x, backend) for x in problems]
            for turn in range(1000 if backend is None else 100):
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

    @pytest.fixture(autouse=True)
    def _memory_for_others(self):
        yield
        torch.cuda.empty_cache()

    def compare_last_head(self, *inputs, backend):
        """Output and gradients."""
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = flash_cosine_sim_attention(*leaves, backend=backend)
        dout = torch.randn_like(out)
        got = (out.detach(), *torch.autograd.grad(out, leaves, dout))
        leaves = [x[-1:, -1:].double().requires_grad_() for x in inputs]
        exact = plain_cosine_sim_attention(*leaves)
        want = (exact.detach(), *torch.autograd.grad(exact, leaves, dout[-1:, -1:].double()))
        for x, expected in zip(got, want, strict=True):
            assert float((x[-1:, -1:].double() - expected).norm() / expected.norm()) < 1e-2

    def test_many_heads(self, backend):
        q = torch.randn(1, 1, 128, 64, device="cuda", dtype=torch.bfloat16)
        q = q.repeat(263, 1000, 1, 1)  # 2.15e9 elements
        assert q.numel() > 2**31
        q[-1, -1] = torch.randn(128, 64, device="cuda")
        self.compare_last_head(q, q, q, backend=backend)

    def test_long_rows(self, backend):
        """One head of a (b, n, h, d) buffer whose rows are 2^20 elements apart."""
        buffer = torch.zeros(1, 2100, 16384, 64, device="cuda", dtype=torch.bfloat16)
        view = buffer.transpose(1, 2)[:, -2:]
        view.normal_()
        assert view.stride(2) * view.shape[2] > 2**31
        self.compare_last_head(view, view, view, backend=backend)

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
