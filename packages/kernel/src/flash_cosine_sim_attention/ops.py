"""The operators `torch.ops.flash_cosine_sim_attention.{forward, backward}`: schema, fake kernels, autograd.

They exist as soon as the package is imported, before any CUDA library is built or loaded. Which backend computes is
decided inside, so that nothing of that choice is traced by torch.compile.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import Parameter

from . import backends
from .problem import Gradients, Outputs, Problem

_library = torch.library.Library("flash_cosine_sim_attention", "DEF")
_PROBLEM = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? scale, float scale_value, int groups, "
    "bool causal, bool l2norm_qk, bool toeplitz, str backend"
)
_library.define(f"forward({_PROBLEM}) -> (Tensor out, Tensor lse, Tensor q_rnorm, Tensor k_rnorm)")
_library.define(
    f"backward(Tensor dout, Tensor? dlse, Tensor out, Tensor lse, Tensor q_rnorm, Tensor k_rnorm, {_PROBLEM}, "
    "bool[] needs) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dbias, Tensor dscale)"
)


def empty_outputs(problem: Problem) -> Outputs:
    q, k, v, wide = problem.q, problem.k, problem.v, problem.wide_dtype
    if q.shape[-1] == v.shape[-1]:
        out = torch.empty_like(q)  # in the layout of q: (b, n, h, d) buffers come back as such
    else:
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[:-1], dtype=wide)
    if not problem.l2norm_qk:
        return Outputs(out, lse, q.new_empty(0, dtype=wide), q.new_empty(0, dtype=wide))
    q_rnorm = q.new_empty(*q.shape[:-1], problem.groups, dtype=wide)
    k_rnorm = q.new_empty(*k.shape[:-1], problem.groups, dtype=wide)
    return Outputs(out, lse, q_rnorm, k_rnorm)


def empty_gradients(problem: Problem, needs: list[bool]) -> Gradients:
    inputs = (problem.q, problem.k, problem.v, problem.bias, problem.scale)
    return Gradients(
        *(torch.empty_like(x) if need and x is not None else None for x, need in zip(inputs, needs, strict=True))
    )


def _no_autocast(problem: Problem) -> contextlib.AbstractContextManager:
    device_type = problem.q.device.type
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()


def _forward(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *fields, backend = args
    problem = Problem(*fields)
    outputs = empty_outputs(problem)
    with _no_autocast(problem):
        backends.implementation(problem, backend).forward(problem, outputs)
    return outputs.out, outputs.lse, outputs.q_rnorm, outputs.k_rnorm


def _forward_fake(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    outputs = empty_outputs(Problem(*args[:-1]))
    return outputs.out, outputs.lse, outputs.q_rnorm, outputs.k_rnorm


def _as_returned(problem: Problem, gradients: Gradients) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """An operator cannot return None: an empty tensor stands for a gradient that nobody wants."""
    wanted = (gradients.dq, gradients.dk, gradients.dv, gradients.dbias, gradients.dscale)
    dq, dk, dv, dbias, dscale = (problem.q.new_empty(0) if g is None else g for g in wanted)
    return dq, dk, dv, dbias, dscale


def _backward(dout, dlse, out, lse, q_rnorm, k_rnorm, *args):
    *fields, backend, needs = args
    problem = Problem(*fields)
    gradients = empty_gradients(problem, needs)
    with _no_autocast(problem):
        backends.implementation(problem, backend).backward(
            problem, Outputs(out, lse, q_rnorm, k_rnorm), dout, dlse, gradients
        )
    return _as_returned(problem, gradients)


def _backward_fake(dout, dlse, out, lse, q_rnorm, k_rnorm, *args):
    *fields, _, needs = args
    problem = Problem(*fields)
    return _as_returned(problem, empty_gradients(problem, needs))


def refuses_second_derivatives(backward: Callable) -> Callable:
    """once_differentiable, where the upstream gradients are constants (of out.sum(), say) too: a derivative of the
    gradients raises, and never silently lacks what runs through the saved tensors.
    """
    once = once_differentiable(backward)

    @functools.wraps(backward)
    def checked(ctx, *upstream):
        if torch.is_grad_enabled():
            upstream = tuple(x if x is None or x.requires_grad else x.detach().requires_grad_() for x in upstream)
        return once(ctx, *upstream)

    return checked


class _Attention(torch.autograd.Function):
    """Old-style `forward(ctx, ...)`: 8 us less host time a call than setup_context."""

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, q_rnorm, k_rnorm = torch.ops.flash_cosine_sim_attention.forward(*args)
        return _save(ctx, args, out, lse, q_rnorm, k_rnorm)

    @staticmethod
    @refuses_second_derivatives
    def backward(ctx, dout, dlse, *_):
        wanted = ctx.needs_input_grad
        needs = [wanted[0], wanted[1], wanted[2], wanted[4], wanted[5]]
        dq, dk, dv, dbias, dscale = gradients(dout, dlse, *ctx.saved_tensors, *ctx.options, needs)
        return dq, dk, dv, None, dbias, dscale, None, None, None, None, None, None


def gradients(dout: Tensor | None, dlse: Tensor | None, *args) -> tuple[Tensor | None, ...]:
    """args: those of the operator `backward` behind dlse -> (dq, dk, dv, dbias, dscale), None where not wanted."""
    if dout is None:
        if dlse is None:
            return (None,) * 5
        dout = torch.zeros_like(args[0])
    if is_plain_eager((dout, dlse, *args[:10])):
        with torch._C._AutoDispatchBelowAutograd():
            found = _backward(dout, dlse, *args)
    else:
        found = torch.ops.flash_cosine_sim_attention.backward(dout, dlse, *args)
    return tuple(gradient if need else None for gradient, need in zip(found, args[-1], strict=True))


def _save(ctx, args, out, lse, q_rnorm, k_rnorm):
    q, k, v, mask, bias, scale, *ctx.options = args
    ctx.save_for_backward(out, lse, q_rnorm, k_rnorm, q, k, v, mask, bias, scale)
    ctx.mark_non_differentiable(q_rnorm, k_rnorm)
    ctx.set_materialize_grads(False)
    return out, lse, q_rnorm, k_rnorm


class _EagerAttention(_Attention):
    """The same past the dispatcher."""

    @staticmethod
    def forward(ctx, *args):
        with torch._C._AutoDispatchBelowAutograd():
            out, lse, q_rnorm, k_rnorm = _forward(*args)
        return _save(ctx, args, out, lse, q_rnorm, k_rnorm)


def is_plain_eager(args: tuple) -> bool:
    """Whether nobody but this file would see the operator: no compiler, tracer, mode, transform or tensor subclass."""
    return (
        torch._C._len_torch_dispatch_stack() == 0
        and torch._C._len_torch_function_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(x is None or type(x) is Tensor or type(x) is Parameter for x in args)
    )


def forward(*args) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator `forward`. In plain eager code its two trips through the dispatcher, 6 us of host time each, are
    spared: the same functions are called directly.
    """
    if torch.compiler.is_compiling() or not is_plain_eager(args[:6]):
        return torch.ops.flash_cosine_sim_attention.forward(*args)
    if _needs_gradient(args):
        return _EagerAttention.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return _forward(*args)


def _needs_gradient(args: tuple) -> bool:
    return torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args[:6])


def _forward_autograd(*args):
    if _needs_gradient(args):
        return _Attention.apply(*args)
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flash_cosine_sim_attention.forward(*args)


def _backward_autograd(*args):
    """Reached with create_graph=True only: first derivatives are computed, second ones are an error when asked for."""
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.flash_cosine_sim_attention.backward(*args)


_library.impl("forward", _forward, "CompositeExplicitAutograd")
_library.impl("backward", _backward, "CompositeExplicitAutograd")
_library.impl("forward", _forward_autograd, "Autograd")
_library.impl("backward", _backward_autograd, "Autograd")
torch.library.register_fake("flash_cosine_sim_attention::forward", _forward_fake, lib=_library)
torch.library.register_fake("flash_cosine_sim_attention::backward", _backward_fake, lib=_library)
