"""The common call in few steps of host time: what a signature settled once is not asked again.

Half precision, (b, h, n, d) tensors in the kernels' form, one group, norm inside, a number as scale; no mask, no bias;
plain eager code. The first call of a signature (sizes, strides, dtypes, device, options) goes the usual way; if a CUDA
kernel serves it, later ones go from here straight to one operator that allocates and launches (plain_forward in
csrc/torch_binding.cpp). Everything else is left to `attention.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backends, cuda, ops
from .kernel_form import has_rows
from .problem import Problem

MAX_SIGNATURES = 4096
"""Where lengths never repeat, the memory of signatures starts anew."""


class Plan(NamedTuple):
    """What a signature settles."""

    launcher: int
    counts_items: bool  # the kernel hands out its blocks by a counter
    scale: float
    causal: bool
    backend: str


Signature = tuple
_plans: dict[Signature, Plan | None] = {}  # None: goes the usual way


def signature(
    q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor, causal: bool, backend: str | None
) -> Signature | None:
    """What decides how a call with neither mask nor bias is served; None for what is no common call."""
    if torch.compiler.is_compiling() or type(scale) not in (float, int) or not ops.is_plain_eager((q, k, v)):
        return None
    if q is None or k is None or v is None:  # for `validate` to complain of
        return None
    if torch.is_autocast_enabled(q.device.type):
        return None
    tensors = (q.shape, q.stride(), k.shape, k.stride(), v.shape, v.stride(), q.dtype, k.dtype, v.dtype)
    return (*tensors, q.device, k.device, v.device, scale, causal, backend)


def attend(key: Signature, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor] | None:
    """(out, lse), in the dims of q; None where the call is to go the usual way."""
    plan = _plans.get(key)
    if plan is None or (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return None
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return _CommonCall.apply(q, k, v, plan)[:2]
    out, lse, _, _ = _forward(q, k, v, plan)
    return out, lse


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
    if v.shape[-1] != q.shape[-1] or 0 in q.shape or 0 in k.shape:
        return None
    if not (q.is_contiguous() or q.transpose(1, 2).is_contiguous()):  # else the output has a layout of its own
        return None
    q, k, v = (x.detach()[:, None] for x in (q, k, v))
    problem = Problem(q, k, v, None, None, None, float(scale), 1, causal, True)
    kernels = backends.implementation(problem, backend or "")
    if not (isinstance(kernels, cuda.CudaKernels) and has_rows(q) and has_rows(k) and has_rows(v)):
        return None
    launcher = kernels.launcher("forward", problem)
    if launcher is None:
        return None
    return Plan(launcher.address, launcher.arch == "sm90", float(scale), causal, backend or "")


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run = torch.ops.flash_cosine_sim_attention.plain_forward.default._op
    return run(plan.launcher, q, k, v, plan.scale, plan.causal, plan.counts_items)


class _CommonCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan):
        out, lse, q_rnorm, k_rnorm = _forward(q, k, v, plan)
        ctx.save_for_backward(out, lse, q_rnorm, k_rnorm, q, k, v)
        ctx.plan = plan
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        plan, wanted = ctx.plan, ctx.needs_input_grad
        saved = [x.unsqueeze(1) for x in ctx.saved_tensors]
        upstream = [None if x is None else x.unsqueeze(1) for x in (dout, dlse)]
        options = (None, None, None, plan.scale, 1, plan.causal, True, False, plan.backend)
        gradients = ops.gradients(*upstream, *saved, *options, [*wanted[:3], False, False])
        dq, dk, dv = (None if x is None else x.squeeze(1) for x in gradients[:3])
        return dq, dk, dv, None
