"""The direct call of plain eager code: nobody who would see the operator may miss it."""

from __future__ import annotations

import pytest
import torch
from flash_cosine_sim_attention import flash_cosine_sim_attention, ops
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

OPERATOR = torch.ops.flash_cosine_sim_attention.forward.default


class Seen(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.operators = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators.append(func)
        return func(*args, **(kwargs or {}))


class SeenFunctions(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.functions = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.functions.append(func)
        return func(*args, **(kwargs or {}))


def qkv(**options):
    return [torch.randn(1, 2, 5, 8, **options) for _ in range(3)]


def call(*tensors):
    return flash_cosine_sim_attention(*tensors, backend="chunked")


def test_plain_tensors_and_parameters_take_the_direct_way(monkeypatch):
    called = []
    monkeypatch.setattr(ops, "_forward", lambda *args: called.append(args) or OPERATOR(*args))
    call(*qkv())
    call(*map(torch.nn.Parameter, qkv()))
    assert len(called) == 2


@pytest.mark.parametrize("requires_grad", [False, True])
def test_dispatch_modes_see_the_operators(requires_grad):
    tensors = qkv(requires_grad=requires_grad)
    with Seen() as seen:
        out = call(*tensors)
        if requires_grad:
            out.sum().backward()
    assert OPERATOR in seen.operators
    assert (torch.ops.flash_cosine_sim_attention.backward.default in seen.operators) == requires_grad


def test_function_modes_see_the_operator():
    with SeenFunctions() as seen:
        call(*qkv())
    assert torch.ops.flash_cosine_sim_attention.forward in seen.functions


def test_fake_tensors_stay_fake():
    with FakeTensorMode():
        tensors = qkv()
        out = call(*tensors)
    assert type(out) is type(tensors[0])
    assert out.shape == (1, 2, 5, 8)
    assert type(call(*tensors)) is type(tensors[0])  # outside of the mode too


def test_tracers_record_the_operator():
    graph = make_fx(call)(*qkv())
    assert OPERATOR in [node.target for node in graph.graph.nodes]


def test_backward_of_a_direct_call_inside_a_mode():
    tensors = qkv(requires_grad=True)
    out = call(*tensors)
    with Seen() as seen:
        gradients = torch.autograd.grad(out.sum(), tensors)
    assert torch.ops.flash_cosine_sim_attention.backward.default in seen.operators
    expected = torch.autograd.grad(call(*tensors).sum(), tensors)
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted)
