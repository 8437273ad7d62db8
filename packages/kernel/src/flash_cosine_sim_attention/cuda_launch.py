"""One pass by a kernel: bring the tensors into its form, launch, bring the results back.

Workspaces are allocated here; csrc/params.h says what each is for.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .bias_plan import PAIR_HEAD_DIM, BiasPlan, dbias_parts, plan_bias
from .kernel_form import (
    bias_with_rows,
    kernel_bias,
    kernel_width,
    readable,
    workspace,
    writable,
    writable_bias_gradient,
    write_back,
)
from .problem import Gradients, Outputs, Problem


class Launcher(NamedTuple):
    address: int
    head_dim: int  # kHeadDim of the variant
    arch: str


def launch_forward(launcher: Launcher, problem: Problem, outputs: Outputs) -> None:
    """Fills `outputs`. No size is 0."""
    q, k, v, groups, norm = problem.q, problem.k, problem.v, problem.groups, problem.l2norm_qk
    width = kernel_width(q.shape[-1], v.shape[-1], groups)
    q, k, v = readable(q, groups, width), readable(k, groups, width), readable(v, 1, width)
    out = writable(outputs.out, width)
    bias, on_sm90 = kernel_bias(problem.bias, q.dtype), launcher.arch == "sm90"
    plan = BiasPlan(None, False) if on_sm90 else plan_bias(problem, "forward", launcher.head_dim)
    if bias is not None and on_sm90 and not problem.toeplitz and launcher.head_dim > PAIR_HEAD_DIM:
        bias = bias_with_rows(bias, k.shape[-2])  # the kernel for short rows that share a bias reads any
    split = q.dtype == torch.float32  # multiplied as halves, from copies: of q, k (normalised on the way) and v
    copies = split or (norm and groups > 1)
    torch.ops.flash_cosine_sim_attention.launch_forward(
        launcher.address,
        q,
        k,
        v,
        problem.mask,
        bias,
        None if problem.scale is None else problem.scale.contiguous(),
        problem.scale_value,
        problem.bound,
        groups,
        problem.causal,
        norm,
        problem.toeplitz,
        out,
        outputs.lse,
        outputs.q_rnorm if norm else None,
        outputs.k_rnorm if norm else None,
        workspace(q, q.shape, q.dtype) if copies else None,
        workspace(q, k.shape, q.dtype) if copies else None,
        workspace(q, v.shape, q.dtype) if split else None,
        workspace(q, v.shape[:3]) if split else None,
        workspace(q, (1,)) if launcher.arch == "sm90" else None,
        *plan,
    )
    write_back(out, outputs.out)


class BackwardPlan(NamedTuple):
    deterministic: bool
    bias: BiasPlan
    accumulates: bool  # dq, in float32, from several thread blocks
    in_order: bool  # and that in a fixed order
    copies: bool  # of q and k, normalised
    split: bool  # float32, multiplied as halves from copies of q, k, v and dout


def _plan_backward(launcher: Launcher, problem: Problem, dlse: Tensor | None, gradients: Gradients) -> BackwardPlan:
    deterministic = torch.are_deterministic_algorithms_enabled()
    in_order = deterministic and launcher.arch == "sm90"  # additions to dq_accum; sm80 makes dq without them
    accumulates = (gradients.dq is not None or gradients.dscale is not None) and (in_order or not deterministic)
    bias = plan_bias(problem, "backward", launcher.head_dim)
    if dlse is not None or (gradients.dq is None and gradients.dk is None and gradients.dv is None):
        bias = BiasPlan(bias.packed, False)
    # fp16 does not hold the factors of unusual norms that bf16 folds into dS: it has copies scaled by powers of two
    split, half = problem.q.dtype == torch.float32, problem.q.dtype == torch.float16
    copies = split or (problem.l2norm_qk and not bias.pair and (problem.groups > 1 or half))
    return BackwardPlan(deterministic, bias, accumulates and not bias.pair, in_order, copies, split)


def _backward_workspaces(
    launcher: Launcher, plan: BackwardPlan, q: Tensor, k: Tensor, v: Tensor
) -> tuple[Tensor | None, ...]:
    """rows, dq_accum, dq_progress, q_unit, k_unit, v_split, v_largest, dout_split, largest."""
    padded_rows = (*q.shape[:-2], -(-q.shape[-2] // 128) * 128)
    return (
        workspace(q, (*padded_rows, 4)),
        workspace(q, (*padded_rows, launcher.head_dim)) if plan.accumulates else None,
        workspace(q, (*k.shape[:3], -(-k.shape[3] // 128), 2)) if plan.accumulates and plan.in_order else None,
        workspace(q, q.shape, q.dtype) if plan.copies else None,
        workspace(q, k.shape, q.dtype) if plan.copies else None,
        workspace(q, v.shape, q.dtype) if plan.split else None,
        workspace(q, v.shape[:3]) if plan.split else None,
        workspace(q, q.shape, q.dtype) if plan.split else None,
        workspace(q, (2, *v.shape[:3])) if plan.split else None,
    )


def launch_backward(
    launcher: Launcher, problem: Problem, outputs: Outputs, dout: Tensor, dlse: Tensor | None, gradients: Gradients
) -> None:
    """Fills what is not None of `gradients`. No size is 0."""
    q, k, v, groups, norm = problem.q, problem.k, problem.v, problem.groups, problem.l2norm_qk
    width = kernel_width(q.shape[-1], v.shape[-1], groups)
    q, k, v = readable(q, groups, width), readable(k, groups, width), readable(v, 1, width)
    bias = kernel_bias(problem.bias, q.dtype)
    dbias = writable_bias_gradient(bias, gradients.dbias)
    dq, dk, dv = (
        None if gradient is None else writable(gradient, width)
        for gradient in (gradients.dq, gradients.dk, gradients.dv)
    )
    dscale_rows = None if gradients.dscale is None else workspace(q, q.shape[:-1])
    plan = _plan_backward(launcher, problem, dlse, gradients)
    torch.ops.flash_cosine_sim_attention.launch_backward(
        launcher.address,
        q,
        k,
        v,
        problem.mask,
        bias,
        None if problem.scale is None else problem.scale.contiguous(),
        problem.scale_value,
        groups,
        problem.causal,
        norm,
        problem.toeplitz,
        readable(dout, 1, width),
        None if dlse is None else dlse.to(torch.float32).contiguous(),
        readable(outputs.out, 1, width),
        outputs.lse.contiguous(),
        outputs.q_rnorm.contiguous() if norm else None,
        outputs.k_rnorm.contiguous() if norm else None,
        dq,
        dk,
        dv,
        dbias,
        dscale_rows,
        *_backward_workspaces(launcher, plan, q, k, v),
        dbias_parts(problem, dbias),
        *plan.bias,
        plan.deterministic,
    )
    write_back(dq, gradients.dq, groups)
    write_back(dk, gradients.dk, groups)
    write_back(dv, gradients.dv)
    write_back(dbias, gradients.dbias)
    if dscale_rows is not None:
        torch.sum(dscale_rows, (0, 1, 3), out=gradients.dscale)


def accumulator(launcher: Launcher, problem: Problem, deterministic: bool) -> tuple[int, int]:
    """For how many heads dq_accum has room, and the size of dq_progress (csrc/params.h); 0 for none."""
    (b0, b1, heads), (kv_heads, keys) = problem.q.shape[:3], problem.k.shape[2:4]
    if not deterministic:
        return b0 * b1 * heads, 0
    return (b0 * b1 * heads, b0 * b1 * kv_heads * -(-keys // 128) * 2) if launcher.arch == "sm90" else (0, 0)


def empty_forward(outputs: Outputs) -> None:
    """No query, no key or no batch: an attention over nothing is 0."""
    outputs.out.zero_()
    outputs.lse.fill_(float("-inf"))
    outputs.q_rnorm.zero_()  # read by nothing; never left as it came
    outputs.k_rnorm.zero_()


def empty_backward(gradients: Gradients) -> None:
    for gradient in (gradients.dq, gradients.dk, gradients.dv, gradients.dbias, gradients.dscale):
        if gradient is not None:
            gradient.zero_()
