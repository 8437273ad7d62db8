"""The common call in few steps of host time: what a signature settled once is not asked again.

Half precision, (b, h, n, d) tensors in the kernels' form, one group, norm inside, a number as scale; no mask, no bias;
plain eager code. The first call of a signature (sizes, strides, dtypes, device, options) goes the usual way; if a CUDA
kernel serves it, later ones go from here straight to one operator that allocates and launches, and so do their
backwards (common_forward and common_backward in csrc/torch_binding.cpp). Everything else is left to `attention.py`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from . import backends, cuda, ops
from .kernel_form import has_rows
from .problem import Problem

MAX_SIGNATURES = 4096
"""Where lengths never repeat, the memory of signatures starts anew."""

_PLAIN = (Tensor, Parameter)
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms, _autocast = torch._C._functorch.peek_interpreter_stack, torch._C._is_any_autocast_enabled


class Backward(NamedTuple):
    """What the first backward settles."""

    run: Callable[..., Any]  # the operator common_backward
    launcher: int
    columns: int  # kHeadDim of the variant
    dq_heads: int  # sizes of its workspaces: cuda.accumulator
    progress_words: int


class Plan(NamedTuple):
    """What a signature settles."""

    run: Callable[..., Any]  # the operator common_forward
    launcher: int
    scale: float
    causal: bool
    backend: str
    backward: dict[bool, Backward]
    """By whether it is to be deterministic, once there was one."""


Signature = tuple
_plans: dict[Signature, Plan | None] = {}  # None: goes the usual way


def signature(
    q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor, causal: bool, backend: str | None
) -> Signature | None:
    """What decides how a call with neither mask nor bias is served; None for what is no common call."""
    if torch.compiler.is_compiling() or _is_watched() or type(scale) not in (float, int):
        return None
    if type(q) not in _PLAIN or type(k) not in _PLAIN or type(v) not in _PLAIN:
        return None
    tensors = (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, k.dtype, v.dtype)
    return (*tensors, q.device, k.device, v.device, scale, causal, backend)


def _is_watched() -> bool:
    """Whether more than plain eager code is at work: a tracer, a mode, a transform, autocast."""
    return bool(_dispatch_modes() or _function_modes() or _autocast() or _transforms() is not None)


def attend(key: Signature, q: Tensor, k: Tensor, v: Tensor, return_lse: bool) -> Tensor | tuple[Tensor, Tensor] | None:
    """What the call returns; None where it is to go the usual way."""
    plan = _plans.get(key)
    if plan is None or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return None
    if (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled():
        return _apply(q, k, v, plan, return_lse)
    out, _, lse = plan.run(plan.launcher, q, k, v, plan.scale, plan.causal, return_lse)
    return (out, lse) if return_lse else out


def remember(key: Signature, q: Tensor, k: Tensor, v: Tensor) -> None:
    """After a call went the usual way: how the next one of its signature goes."""
    if key in _plans:
        return
    if len(_plans) >= MAX_SIGNATURES:
        _plans.clear()
    _plans[key] = _plan(q, k, v, *key[-3:])


def _plan(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, backend: str | None) -> Plan | None:
    if q.ndim != 4 or k.ndim != 4 or q.dtype not in (torch.float16, torch.bfloat16) or q.shape[-1] % 8:
        return None
    if v.shape[-1] != q.shape[-1] or 0 in q.shape or 0 in k.shape or 0 in q.stride():
        return None
    problem = _problem(q, k, v, scale, causal)
    kernels = backends.implementation(problem, backend or "")
    if not (isinstance(kernels, cuda.CudaKernels) and has_rows(problem.q) and has_rows(problem.k)):
        return None
    launcher = kernels.launcher("forward", problem) if has_rows(problem.v) else None
    if launcher is None:
        return None
    run = torch.ops.flash_cosine_sim_attention.common_forward.default._op
    return Plan(run, launcher.address, float(scale), causal, backend or "", {})


def _problem(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Problem:
    q, k, v = (x.detach().unsqueeze(1) for x in (q, k, v))
    return Problem(q, k, v, None, None, None, float(scale), 1, causal, True)


class _CommonCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, return_lse):
        out, left, lse = plan.run(plan.launcher, q, k, v, plan.scale, plan.causal, return_lse)
        ctx.save_for_backward(out, left, lse, q, k, v)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        if dout is None or type(dout) is not Tensor or torch.is_grad_enabled() or _is_watched():
            return _backward_in_full(ctx, dout, dlse)
        plan, wanted, (out, left, lse, q, k, v) = ctx.plan, ctx.needs_input_grad, ctx.saved_tensors
        deterministic = torch.are_deterministic_algorithms_enabled()
        settled = plan.backward.get(deterministic) or _settle_backward(plan, q, k, v, deterministic)
        if settled is None:
            return _backward_in_full(ctx, dout, dlse)
        if dout.stride() != out.stride() or dout.data_ptr() % 16:
            dout = _with_rows(dout)
        run, launcher, *sizes = settled
        tensors = (dout, None if dlse is None else dlse.contiguous(), out, left, lse, q, k, v)
        return *run(launcher, *tensors, plan.scale, plan.causal, *sizes, deterministic, *wanted[:3]), None, None


_apply = super(torch.autograd.Function, _CommonCall).apply
"""Without a look for tensors of functorch, which `_is_watched` has ruled out: 1.5 us."""


def _settle_backward(plan: Plan, q: Tensor, k: Tensor, v: Tensor, deterministic: bool) -> Backward | None:
    """The kernel that the usual way would take; None if none serves."""
    problem = _problem(q, k, v, plan.scale, plan.causal)
    kernels = backends.implementation(problem, plan.backend)
    assert isinstance(kernels, cuda.CudaKernels)
    launcher = kernels.launcher("backward", problem)
    if launcher is None:
        return None
    run = torch.ops.flash_cosine_sim_attention.common_backward.default._op
    sizes = cuda.accumulator(launcher, problem, deterministic)
    settled = plan.backward[deterministic] = Backward(run, launcher.address, launcher.head_dim, *sizes)
    return settled


def _with_rows(x: Tensor) -> Tensor:
    return x if has_rows(x.unsqueeze(1)) else x.clone(memory_format=torch.contiguous_format)


@ops.refuses_second_derivatives
def _backward_in_full(ctx, dout, dlse):
    """The usual way: where a graph of the backward is wanted, under modes, or without a gradient of out."""
    plan, wanted, (out, left, lse, q, k, v) = ctx.plan, ctx.needs_input_grad, ctx.saved_tensors
    saved = [x.unsqueeze(1) for x in (out, *_left_by_forward(left, lse, q, k), q, k, v)]
    upstream = [None if x is None else x.unsqueeze(1) for x in (dout, dlse)]
    options = (None, None, None, plan.scale, 1, plan.causal, True, False, plan.backend)
    gradients = ops.gradients(*upstream, *saved, *options, [*wanted[:3], False, False])
    return *(None if x is None else x.squeeze(1) for x in gradients[:3]), None, None


def _left_by_forward(left: Tensor, lse: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lse (b, h, i), q_rnorm (b, h, i, 1), k_rnorm (b, hk, j, 1): LeftByForward in torch_binding.cpp says where."""
    shapes = [(*q.shape[:-1], 1), (*k.shape[:-1], 1), (1,), *([q.shape[:-1]] if lse is None else [])]
    found, at = [], 0
    for shape in shapes:
        found.append(left[at : at + math.prod(shape)].view(shape))
        at += -(-math.prod(shape) // 64) * 64
    return found[3] if lse is None else lse, found[0], found[1]
