"""What surrounds a call with a bias by relative position: compile, autocast, determinism, checkpointing, memory."""

from __future__ import annotations

import pytest
import torch
from flash_cosine_sim_attention import AlibiBias, flash_cosine_sim_attention
from flash_cosine_sim_attention.peak_memory import peak_memory
from flash_cosine_sim_attention.testing import POSITION_BIASES, evaluate, make_inputs
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("each_device")

FORMS = sorted(POSITION_BIASES)


class Layer(torch.nn.Module):
    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form
        self.parameter = torch.nn.Parameter(make_inputs(nq=50, bias=form).attn_bias)

    def forward(self, q, k, v):
        return flash_cosine_sim_attention(q, k, v, attn_bias=POSITION_BIASES[self.form](self.parameter), causal=True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(form, dynamic):
    torch._dynamo.reset()
    layer = Layer(form)
    compiled = torch.compile(layer, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for n in (20, 33):
        x = make_inputs(nq=n, d=16)
        results = []
        for function in (layer, compiled):
            out = function(x.q, x.k, x.v)
            results.append((out, *torch.autograd.grad(out.square().sum(), layer.parameter)))
        torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_compile_takes_a_descriptor_from_outside():
    torch._dynamo.reset()
    x = make_inputs(nq=20, d=16, bias="t5")
    compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True)
    torch.testing.assert_close(compiled(**x.arguments()), flash_cosine_sim_attention(**x.arguments()))


@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_round_the_bias(form):
    x = make_inputs(d=16, bias=form)
    arguments = x.arguments()
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out = flash_cosine_sim_attention(**arguments)
    q, k, v = (t.bfloat16() for t in (x.q, x.k, x.v))
    assert torch.equal(out, flash_cosine_sim_attention(**(arguments | {"q": q, "k": k, "v": v})))


@pytest.mark.parametrize("form", FORMS)
def test_deterministic_mode_is_bit_equal(form):
    x = make_inputs((3,), 2, nq=300, nk=400, d=16, bias=form)
    dout = torch.randn(x.out_shape())
    torch.use_deterministic_algorithms(True)
    try:
        first, *others = (evaluate(flash_cosine_sim_attention, x, dout) for _ in range(3))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(other[name], first[name]) for other in others for name in first)


def test_activation_checkpointing():
    x = make_inputs(d=16)
    slopes = torch.rand(2, requires_grad=True)

    def run(slopes):
        return flash_cosine_sim_attention(x.q, x.k, x.v, attn_bias=AlibiBias(slopes))

    expected = torch.autograd.grad(run(slopes).square().sum(), slopes)
    got = torch.autograd.grad(checkpoint(run, slopes, use_reentrant=False).square().sum(), slopes)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_linear(form, each_device):
    if each_device.type != "cpu":
        pytest.skip("peak_memory counts on the CPU")
    n, heads, d = 2048, 2, 8
    x = make_inputs((1,), heads, nq=n, d=d, bias=form)
    dout = torch.randn(x.out_shape())
    use = peak_memory(lambda: evaluate(flash_cosine_sim_attention, x, dout))
    assert use.largest < n * n
    assert use.peak < 0.15 * heads * n * n * 4


@pytest.mark.parametrize("needs", ["q", "attn_bias"])
def test_only_the_gradients_that_are_asked_for(needs):
    x = make_inputs(d=16, bias="t5")
    names = ("q", "k", "v", "attn_bias")
    dout = torch.randn(x.out_shape())
    part = evaluate(flash_cosine_sim_attention, x, dout, constants=tuple(name for name in names if name != needs))
    assert set(part) == {"out", "d" + needs}
    whole = evaluate(flash_cosine_sim_attention, x, dout)
    torch.testing.assert_close(part, {name: whole[name] for name in part})


def test_torch_attention_is_not_forced_onto_it():
    x = make_inputs(bias="alibi")
    with pytest.raises(ValueError, match="backend: 'sdpa' cannot serve this call"):
        flash_cosine_sim_attention(**x.arguments(), backend="sdpa")
