"""The common call in few steps of host time: what a signature settled once is not asked again.

Half precision, (b, h, n, d) tensors in the kernels' form, one group, norm inside, a number as scale, a key mask
(b | 1, j) or none, no bias; plain eager code. The first call of a signature (sizes, strides, dtypes, device, options)
goes the usual way; if a CUDA kernel serves it, later ones go from here straight to one operator that allocates and
launches, and so do their backwards (common_forward and common_backward in csrc/torch_binding.cpp, which knows the
signatures). Everything else is left to `attention.py`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import backends, cuda, cuda_launch, ops
from .kernel_form import has_rows
from .problem import Problem

MAX_SIGNATURES = 4096
"""Where lengths never repeat, the memory of signatures starts anew."""

FORWARD, BACKWARD, DETERMINISTIC_BACKWARD = range(3)
"""`Pass` in torch_binding.cpp."""

_PLAIN, _HALF = (Tensor, Parameter), (torch.float16, torch.bfloat16)
_BACKENDS = {None: 0, "sm80": 80, "sm90": 90}
_dispatch_modes, _function_modes = torch._C._len_torch_dispatch_stack, torch._C._len_torch_function_stack
_transforms, _autocast = torch._C._functorch.peek_interpreter_stack, torch._C._is_any_autocast_enabled

_settled: set[tuple] = set()  # signatures of which it is settled how their calls go
_forward: Any = None  # the operators, once a signature has been remembered
_backward: Any = None


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | Tensor,
    causal: bool,
    backend: str | None,
    return_lse: bool,
) -> Tensor | tuple[Tensor, Tensor] | None:
    """What a call without a bias returns; None where it is to go the usual way."""
    if not _is_common(q, k, v, mask, scale, backend) or _forward is None:
        return None
    if (q.requires_grad or k.requires_grad or v.requires_grad) and torch.is_grad_enabled():
        return _apply(q, k, v, mask, scale, causal, _BACKENDS[backend], return_lse)
    out, _, lse = _forward(q, k, v, mask, scale, causal, _BACKENDS[backend], return_lse)
    return (out, lse) if return_lse and out is not None else out


def _is_common(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | Tensor, backend: str | None
) -> bool:
    if torch.compiler.is_compiling() or _is_watched() or type(scale) not in (float, int):
        return False
    if type(q) not in _PLAIN or type(k) not in _PLAIN or type(v) not in _PLAIN:
        return False
    return q.dtype in _HALF and backend in _BACKENDS and (mask is None or type(mask) is Tensor)


def _is_watched() -> bool:
    """Whether more than plain eager code is at work: a tracer, a mode, a transform, autocast."""
    return bool(_dispatch_modes() or _function_modes() or _autocast() or _transforms() is not None)


def remember(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | Tensor,
    causal: bool,
    backend: str | None,
) -> None:
    """After a call went the usual way: how the next one of its signature goes."""
    if not _is_common(q, k, v, mask, scale, backend):
        return
    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    signature = (*((x.shape, x.stride(), x.dtype, x.device) for x in tensors), scale, causal, backend)
    if signature in _settled or any(x.data_ptr() % 16 for x in (q, k, v)):
        return
    if len(_settled) >= MAX_SIGNATURES:
        forget()
    _settled.add(signature)
    if not _has_form(q, k, v, mask):
        return
    launcher = _launcher("forward", _problem(q, k, v, mask, float(scale), causal), backend or "")
    if launcher is not None:
        _remember(FORWARD, (q, k, v, mask, scale, causal, _BACKENDS[backend]), launcher.address, 0, 0, 0)


def forget() -> None:
    """As if there had been no call."""
    if _forward is not None:
        torch.ops.flash_cosine_sim_attention.forget_common(torch.empty(0))
    _settled.clear()


def _remember(which_pass: int, call: tuple, *plan: int) -> None:
    global _forward, _backward
    operators = torch.ops.flash_cosine_sim_attention
    if _forward is None:
        _forward, _backward = operators.common_forward.default._op, operators.common_backward.default._op
    operators.remember_common(which_pass, *call, *plan)


def _has_form(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    """Whether the kernels take the tensors as they are, and the output has a layout like that of q."""
    if q.ndim != 4 or k.ndim != 4 or q.shape[-1] % 8 or v.shape[-1] != q.shape[-1]:
        return False
    if 0 in q.shape or 0 in k.shape or 0 in q.stride():
        return False
    if mask is not None and (mask.ndim != 2 or mask.shape[0] not in (1, q.shape[0]) or mask.shape[1] != k.shape[2]):
        return False
    return all(has_rows(x.unsqueeze(1)) for x in (q, k, v))


def _problem(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Problem:
    q, k, v = (x.detach().unsqueeze(1) for x in (q, k, v))
    return Problem(q, k, v, _canonical(mask), None, None, float(scale), 1, causal, True)


def _canonical(mask: Tensor | None) -> Tensor | None:
    """(b | 1, j) -> (b0 | 1, 1, j)"""
    return None if mask is None else mask.unsqueeze(1)


def _launcher(pass_name: str, problem: Problem, backend: str) -> cuda.Launcher | None:
    """What serves the call the usual way; None if it is no CUDA kernel."""
    kernels = backends.implementation(problem, backend)
    return kernels.launcher(pass_name, problem) if isinstance(kernels, cuda.CudaKernels) else None


class _CommonCall(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, mask, scale, causal, backend, return_lse):
        out, left, lse = _forward(q, k, v, mask, scale, causal, backend, return_lse)
        if out is None:
            return None
        ctx.save_for_backward(out, left, lse, q, k, v, mask)
        ctx.call = (scale, causal, backend)
        ctx.set_materialize_grads(False)
        return (out, lse) if return_lse else out

    @staticmethod
    def backward(ctx, dout, dlse=None):
        if dout is None or type(dout) is not Tensor or torch.is_grad_enabled() or _is_watched():
            return _backward_in_full(ctx, dout, dlse)
        call, wanted, (out, left, lse, q, k, v, mask) = ctx.call, ctx.needs_input_grad, ctx.saved_tensors
        if dout.stride() != out.stride() or dout.data_ptr() % 16:
            dout = _with_rows(dout)
        dlse = None if dlse is None else dlse.contiguous()
        deterministic = torch.are_deterministic_algorithms_enabled()
        tensors, wishes = (dout, dlse, out, left, lse, q, k, v, mask), (deterministic, wanted[0], wanted[1], wanted[2])
        gradients = _backward(*tensors, *call, *wishes)
        if gradients == (None, None, None):
            if not _settle_backward(q, k, v, mask, call, deterministic):
                return _backward_in_full(ctx, dout, dlse)
            gradients = _backward(*tensors, *call, *wishes)
        return *gradients, None, None, None, None, None


_apply = super(torch.autograd.Function, _CommonCall).apply
"""Without a look for tensors of functorch, which `_is_watched` has ruled out: 1.5 us."""


def _settle_backward(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, call: tuple[float, bool, int], deterministic: bool
) -> bool:
    """Remembers the kernel that the usual way would take; False if none serves."""
    scale, causal, backend = call
    problem = _problem(q, k, v, mask, scale, causal)
    launcher = _launcher("backward", problem, f"sm{backend}" if backend else "")
    if launcher is None:
        return False
    which = DETERMINISTIC_BACKWARD if deterministic else BACKWARD
    sizes = cuda_launch.accumulator(launcher, problem, deterministic)
    _remember(which, (q, k, v, mask, scale, causal, backend), launcher.address, launcher.head_dim, *sizes)
    return True


def _with_rows(x: Tensor) -> Tensor:
    return x if has_rows(x.unsqueeze(1)) else x.clone(memory_format=torch.contiguous_format)


@ops.refuses_second_derivatives
def _backward_in_full(ctx, dout, dlse):
    """The usual way: where a graph of the backward is wanted, under modes, or without a gradient of out."""
    (scale, causal, backend), wanted = ctx.call, ctx.needs_input_grad
    out, left, lse, q, k, v, mask = ctx.saved_tensors
    saved = [x.unsqueeze(1) for x in (out, *_left_by_forward(left, lse, q, k), q, k, v)]
    upstream = [None if x is None else x.unsqueeze(1) for x in (dout, dlse)]
    options = (_canonical(mask), None, None, float(scale), 1, causal, True, False, f"sm{backend}" if backend else "")
    gradients = ops.gradients(*upstream, *saved, *options, [*wanted[:3], False, False])
    return *(None if x is None else x.squeeze(1) for x in gradients[:3]), None, None, None, None, None


def _left_by_forward(left: Tensor, lse: Tensor | None, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """lse (b, h, i), q_rnorm (b, h, i, 1), k_rnorm (b, hk, j, 1): LeftByForward in torch_binding.cpp says where."""
    shapes = [(*q.shape[:-1], 1), (*k.shape[:-1], 1), (1,), *([q.shape[:-1]] if lse is None else [])]
    found, at = [], 0
    for shape in shapes:
        found.append(left[at : at + math.prod(shape)].view(shape))
        at += -(-math.prod(shape) // 64) * 64
    return found[3] if lse is None else lse, found[0], found[1]
