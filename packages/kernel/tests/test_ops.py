"""The operators and everything that surrounds a call: compile, autocast, checkpointing, inference mode, threads."""

from __future__ import annotations

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention, plain_cosine_sim_attention
from flash_cosine_sim_attention.problem import canonicalize
from flash_cosine_sim_attention.testing import make_inputs
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

pytestmark = pytest.mark.usefixtures("each_device")

OPS = torch.ops.flash_cosine_sim_attention


def operator_arguments(requires_grad: bool = True, backend: str = "", **options):
    x = make_inputs(nq=20, nk=30, d=16, **options)
    fields = canonicalize(x.q, x.k, x.v, x.mask, x.attn_bias, x.scale, x.attn_bias_batch_dim)
    fields = [f.detach().requires_grad_(requires_grad and f.is_floating_point()) if isinstance(f, torch.Tensor) else f
              for f in fields]  # fmt: skip
    return (*fields, x.groups, x.causal, x.l2norm_qk, False, backend)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 1, "mask": True, "causal": True, "groups": 2},
        {"bias": "hij", "scale": "head", "dv": 8},
        {"batch": (2, 3), "bias": "bhij", "l2norm_qk": False, "dtype": torch.bfloat16},
    ],
)
def test_opcheck_forward(options):
    opcheck(OPS.forward.default, operator_arguments(**options))


@pytest.mark.parametrize("needs", [[True] * 5, [True, False, False, False, False], [False] * 3 + [True] * 2])
def test_opcheck_backward(needs):
    arguments = operator_arguments(requires_grad=False, bias="hij", scale="head", mask=True)
    out, lse, q_rnorm, k_rnorm = OPS.forward(*arguments)
    upstream = (torch.randn_like(out), torch.randn_like(lse))
    opcheck(OPS.backward.default, (*upstream, out, lse, q_rnorm, k_rnorm, *arguments, needs))


def test_output_follows_the_layout_of_the_queries():
    q = torch.randn(2, 70, 4, 16).transpose(1, 2)  # a (b, n, h, d) buffer
    assert flash_cosine_sim_attention(q, q, q, return_lse=True)[0].transpose(1, 2).is_contiguous()


def loss_and_gradients(function, x, **options):
    leaves = {name: t.detach().clone().requires_grad_() for name, t in x.tensors().items()}
    loss = function(**(x.arguments() | leaves), **options).float().square().sum()
    loss.backward()
    return loss.detach(), tuple(leaf.grad for leaf in leaves.values())


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", [None, "chunked", "plain"])
def test_compile_fullgraph(dynamic, backend):
    """What code inductor makes of the torch calls of "plain", in a minute on a GPU, is no business of ours."""
    torch._dynamo.reset()
    compiler = "aot_eager" if backend == "plain" else "inductor"
    compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True, dynamic=dynamic, backend=compiler)
    for nq, nk in ((20, 30), (33, 41)):
        x = make_inputs(nq=nq, nk=nk, d=16, causal=True, mask=True, kv_heads=1)
        expected = loss_and_gradients(flash_cosine_sim_attention, x, backend=backend)
        torch.testing.assert_close(loss_and_gradients(compiled, x, backend=backend), expected, rtol=1e-4, atol=1e-4)


def test_compile_with_bias_and_learned_scale():
    torch._dynamo.reset()
    compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True)
    x = make_inputs((2, 3), 4, nq=20, d=16, bias="bhij", scale="head")
    expected = loss_and_gradients(flash_cosine_sim_attention, x)
    torch.testing.assert_close(loss_and_gradients(compiled, x), expected, rtol=1e-4, atol=1e-4)


def test_dynamic_lengths_do_not_recompile():
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile(flash_cosine_sim_attention, fullgraph=True, dynamic=True, backend=counter)
    for n in (20, 33, 47, 64):
        x = make_inputs(nq=n, d=16)
        compiled(x.q, x.k, x.v, causal=True)
    assert counter.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_queries_keys_and_values(dtype):
    x = make_inputs()
    with torch.autocast(torch.get_default_device().type, dtype=dtype):
        out = flash_cosine_sim_attention(x.q, x.k.half(), x.v)
    expected = flash_cosine_sim_attention(x.q.to(dtype), x.k.half().to(dtype), x.v.to(dtype))
    assert out.dtype == dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize("backend", [None, "chunked"])
def test_autocast_leaves_the_inside_alone(backend):
    """Gradients are those of the cast inputs: no product inside is rounded by autocast again."""
    x = make_inputs(causal=True)
    q, k, v = (t.clone().requires_grad_() for t in (x.q, x.k, x.v))
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        out = flash_cosine_sim_attention(q, k, v, causal=True, backend=backend)
        gradients = torch.autograd.grad(out.float().sum(), (q, k, v))
    rounded = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    expected = flash_cosine_sim_attention(*rounded, causal=True, backend=backend)
    for got, want in zip(gradients, torch.autograd.grad(expected.float().sum(), rounded), strict=True):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want.float(), rtol=2e-2, atol=2e-3)


def test_float64_stays_float64_under_autocast():
    x = make_inputs(dtype=torch.float64)
    with torch.autocast(torch.get_default_device().type, dtype=torch.bfloat16):
        assert flash_cosine_sim_attention(x.q, x.k, x.v).dtype == torch.float64


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant):
    x = make_inputs(causal=True)
    expected = loss_and_gradients(flash_cosine_sim_attention, x)

    def checkpointed(**arguments):
        order = ("q", "k", "v")
        rest = {name: value for name, value in arguments.items() if name not in order}
        run = lambda *qkv: flash_cosine_sim_attention(*qkv, **rest)  # noqa: E731
        return checkpoint(run, *(arguments[name] for name in order), use_reentrant=use_reentrant)

    torch.testing.assert_close(loss_and_gradients(checkpointed, x), expected)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradients(mode):
    x = make_inputs()
    expected = flash_cosine_sim_attention(**x.arguments())
    x.q.requires_grad_()
    with mode():
        out = flash_cosine_sim_attention(**x.arguments())
    assert not out.requires_grad
    torch.testing.assert_close(out, expected)


class Layer(torch.nn.Module):
    """A self-attention layer with a learned temperature, as users write it."""

    def __init__(self) -> None:
        super().__init__()
        self.to_qkv = torch.nn.Linear(32, 96)
        self.scale = torch.nn.Parameter(torch.full((4,), 8.0))

    def forward(self, x):
        q, k, v = self.to_qkv(x).unflatten(-1, (3, 4, 8)).permute(2, 0, 3, 1, 4)
        return flash_cosine_sim_attention(q, k, v, scale=self.scale, causal=True).transpose(1, 2).flatten(2)


def test_deepcopy_of_a_module():
    layer, x = Layer(), torch.randn(2, 20, 32)
    torch.testing.assert_close(copy.deepcopy(layer)(x), layer(x))


def test_a_layer_learns():
    torch.manual_seed(0)
    layer, x, target = Layer(), torch.randn(2, 20, 32), torch.randn(2, 20, 32)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    assert not torch.equal(layer.scale, torch.full((4,), 8.0))


def test_threads():
    inputs = [make_inputs(nq=40 + i, d=16, seed=i, causal=True) for i in range(8)]
    expected = [loss_and_gradients(flash_cosine_sim_attention, x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda x: loss_and_gradients(flash_cosine_sim_attention, x), inputs * 3))
    torch.testing.assert_close(got, expected * 3)


@pytest.mark.parametrize("loss", [lambda out: out.square().sum(), lambda out: out.sum()])
def test_second_derivative_is_refused(loss):
    """First derivatives only, and it says so; the plain function has both."""
    x = make_inputs(nq=8, d=8)
    q = x.q.requires_grad_()
    (dq,) = torch.autograd.grad(loss(plain_cosine_sim_attention(q, x.k, x.v)), q, create_graph=True)
    assert torch.autograd.grad(dq.square().sum(), q)[0].isfinite().all()
    (dq,) = torch.autograd.grad(loss(flash_cosine_sim_attention(q, x.k, x.v, backend="chunked")), q, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        dq.square().sum().backward()
