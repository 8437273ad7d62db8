"""The short way of calls whose signature is known gives what the usual way gives, and serves nothing else."""

from __future__ import annotations

import pytest
import torch
from flash_cosine_sim_attention import common_call, flash_cosine_sim_attention, launchers
from flash_cosine_sim_attention.testing import assert_close_to_reference, make_inputs

from .test_cuda import host_library  # noqa: F401  a fixture


@pytest.fixture(autouse=True)
def _launchers_on_the_host(host_library, serve_on_the_cpu):  # noqa: F811
    def address(variant, capability, also=()):
        return launchers.exported(host_library, f"{variant.pass_name}_{variant.dtype}_{variant.feature}")

    serve_on_the_cpu(address)


def taken(calls: list) -> int:
    return sum(result is not None for result in calls)


@pytest.fixture
def short_ways(monkeypatch):
    """What `attend` gave, call by call."""
    calls: list = []
    real = common_call.attend
    monkeypatch.setattr(common_call, "attend", lambda *args: calls.append(real(*args)) or calls[-1])
    return calls


@pytest.fixture
def short_backwards(monkeypatch):
    """A mark for each backward that went the short way."""
    calls: list = []
    x = torch.randn(1, 1, 3, 8).bfloat16()
    flash_cosine_sim_attention(x, x, x, backend="sm80")  # then the operators are there
    real = common_call._backward

    def backward(*arguments):
        gradients = real(*arguments)
        if gradients != (None, None, None):
            calls.append(True)
        return gradients

    monkeypatch.setattr(common_call, "_backward", backward)
    return calls


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [{}, {"causal": True, "nk": 40}, {"kv_heads": 1, "heads": 4}, {"scale": 3}, {"scale": 60.0}, {"mask": True}],
    ids=str,
)
@pytest.mark.parametrize("lse", [False, True])
def test_values_and_gradients(short_ways, short_backwards, dtype, options, lse):
    inputs = make_inputs(dtype=dtype, **({"nq": 19, "nk": 23, "d": 16} | options))
    for _ in range(3):
        assert_close_to_reference(inputs, backend="sm80", lse=lse)
    assert taken(short_ways) == 2
    assert len(short_backwards) == 2


@pytest.mark.parametrize("wanted", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
@pytest.mark.parametrize("deterministic", [False, True])
def test_gradients_of_what_wants_them(short_backwards, wanted, deterministic):
    x = make_inputs(nq=19, nk=23, d=16, dtype=torch.float16, heads=4, kv_heads=2)
    leaves = {name: getattr(x, name).clone().requires_grad_() for name in wanted}
    arguments = {"q": x.q, "k": x.k, "v": x.v} | leaves
    dout = torch.randn_like(x.q)
    torch.use_deterministic_algorithms(deterministic)
    try:
        usual, short = (
            torch.autograd.grad(flash_cosine_sim_attention(**arguments, backend="sm80"), leaves.values(), dout)
            for _ in range(2)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    assert len(short_backwards) == 1
    for first, second in zip(usual, short, strict=True):
        torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_any_upstream_gradient(short_backwards):
    """Expanded, transposed, off the 16-byte boundaries; of the log-sum-exp alone."""
    q, k, v = (torch.randn(2, 4, 19, 16).bfloat16().requires_grad_() for _ in range(3))
    flash_cosine_sim_attention(q, k, v, backend="sm80")
    out, lse = flash_cosine_sim_attention(q, k, v, backend="sm80", return_lse=True)
    dense = torch.randn_like(out)
    same = (dense.transpose(1, 2).contiguous().transpose(1, 2), torch.cat([dense.flatten()[:1], dense.flatten()])[1:])
    expected = torch.autograd.grad(out, (q, k, v), dense, retain_graph=True)
    for dout in (same[0], same[1].view_as(dense)):
        for got, want in zip(torch.autograd.grad(out, (q, k, v), dout, retain_graph=True), expected, strict=True):
            assert torch.equal(got, want)
    ones = torch.autograd.grad(out, (q, k, v), torch.ones_like(out), retain_graph=True)
    for got, want in zip(torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True), ones, strict=True):
        assert torch.equal(got, want)
    assert len(short_backwards) == 5
    assert bool(torch.autograd.grad(lse.sum(), q)[0].any())
    assert len(short_backwards) == 5


def test_a_second_derivative_is_refused(short_backwards):
    q, k, v = (torch.randn(2, 4, 19, 16).bfloat16().requires_grad_() for _ in range(3))
    flash_cosine_sim_attention(q, k, v, backend="sm80")
    out = flash_cosine_sim_attention(q, k, v, backend="sm80")
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    assert len(short_backwards) == 0
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


@pytest.mark.parametrize("lse", [False, True])
def test_without_gradient(short_ways, lse):
    inputs = make_inputs(nq=19, nk=23, d=16, dtype=torch.bfloat16)
    first, second = (flash_cosine_sim_attention(**inputs.arguments(), return_lse=lse, backend="sm80") for _ in range(2))
    assert taken(short_ways) == 1
    torch.testing.assert_close(second, first, rtol=0, atol=0)


def test_layouts(short_ways):
    """(b, n, h, d) buffers come back as such, slices of a buffer of q, k and v dense.
    A start off the 16-byte boundaries goes the usual way."""
    q, k, v = (torch.randn(2, 19, 4, 16).bfloat16().transpose(1, 2) for _ in range(3))
    first, second = (flash_cosine_sim_attention(q, k, v, backend="sm80") for _ in range(2))
    assert taken(short_ways) == 1
    assert second.stride() == first.stride() == q.stride()
    assert torch.equal(first, second)

    packed = torch.randn(2, 19, 3, 4, 16).bfloat16().transpose(1, 3).unbind(2)
    first, second = (flash_cosine_sim_attention(*packed, backend="sm80") for _ in range(2))
    assert taken(short_ways) == 2
    assert second.stride() == first.stride() == q.stride()
    assert torch.equal(first, second)

    first = flash_cosine_sim_attention(q, k, v, backend="sm80")
    shifted = torch.cat([q.new_zeros(1), q.transpose(1, 2).flatten()])[1:].view(2, 19, 4, 16).transpose(1, 2)
    assert torch.equal(flash_cosine_sim_attention(shifted, k, v, backend="sm80"), first)
    assert taken(short_ways) == 3


@pytest.mark.parametrize(
    "options",
    [
        {"bias": "hij"},
        {"scale": "head"},
        {"groups": 2},
        {"l2norm_qk": False},
        {"d": 20},
        {"dv": 8},
        {"kv_heads": 0},
        {"heads": 0, "batch": (4,)},
        {"batch": (2, 3)},
        {"nq": 0},
    ],
    ids=str,
)
def test_other_calls_go_the_usual_way(short_ways, options):
    inputs = make_inputs(dtype=torch.bfloat16, **({"nq": 19, "nk": 23, "d": 16} | options))
    for _ in range(2):
        flash_cosine_sim_attention(**inputs.arguments(), backend="sm80")
    assert taken(short_ways) == 0


def test_masks(short_ways, short_backwards):
    """One for all batch rows, transposed, sliced; of other forms the usual way."""
    q, k, v = (torch.randn(3, 2, 19, 16).bfloat16().requires_grad_() for _ in range(3))
    dout = torch.randn_like(q)
    base = torch.rand(19, 3) < 0.7
    known = (base.T, base[:, :1].T, (torch.rand(3, 40) < 0.7)[:, 1:39:2], (torch.rand(19) < 0.7).expand(3, -1))
    for mask in (*known, base[:, 0]):
        results = []
        for _ in range(2):
            out = flash_cosine_sim_attention(q, k, v, mask=mask, backend="sm80")
            results.append((out.detach(), *torch.autograd.grad(out, (q, k, v), dout)))
        assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))
    assert taken(short_ways) == len(short_backwards) == len(known)


def test_modes_go_the_usual_way(short_ways):
    q, k, v = (torch.randn(1, 2, 5, 16).bfloat16() for _ in range(3))
    for _ in range(2):
        flash_cosine_sim_attention(q, k, v, backend="sm80")
    with torch.autocast("cpu", dtype=torch.float16):
        assert flash_cosine_sim_attention(q, k, v, backend="sm80").dtype == torch.float16
    assert taken(short_ways) == 1


def test_a_changed_option_is_a_signature_of_its_own():
    q, k, v = (torch.randn(1, 2, 5, 16).bfloat16() for _ in range(3))
    for options in ({"scale": 8}, {"scale": 2}, {"scale": 2, "causal": True}):
        first, second = (flash_cosine_sim_attention(q, k, v, backend="sm80", **options) for _ in range(2))
        assert torch.equal(first, second)
    assert len(common_call._settled) == 3


def test_the_memory_of_signatures_ends(monkeypatch):
    monkeypatch.setattr(common_call, "MAX_SIGNATURES", 4)
    for n in range(1, 12):
        x = torch.randn(1, 1, n, 16).bfloat16()
        flash_cosine_sim_attention(x, x, x, backend="sm80")
    assert len(common_call._settled) <= 4


def test_errors_stay_what_they_are():
    q = torch.randn(1, 2, 5, 16).bfloat16()
    with pytest.raises(TypeError, match="v: expected a"):
        flash_cosine_sim_attention(q, q, None)
    with pytest.raises(TypeError, match="expected one dtype"):
        flash_cosine_sim_attention(q, q, q.half())
    with pytest.raises(ValueError, match="scale: expected a finite number"):
        flash_cosine_sim_attention(q, q, q, scale=float("nan"))
