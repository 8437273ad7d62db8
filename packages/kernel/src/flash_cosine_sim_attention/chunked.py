"""Placeholder until the chunked path lands: correct, not memory-efficient."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch

from .reference import plain_cosine_sim_attention


def _run(problem, q, k, v, bias, scale):
    merged = [None if x is None else x for x in (problem.mask, bias)]
    return plain_cosine_sim_attention(
        q, k, v, merged[0], merged[1], problem.scale_value if scale is None else scale, problem.groups,
        problem.causal, problem.l2norm_qk, return_lse=True,
    )


def forward(problem, outputs):
    out, lse = _run(problem, problem.q, problem.k, problem.v, problem.bias, problem.scale)
    outputs.out.copy_(out)
    outputs.lse.copy_(lse)
    if problem.l2norm_qk:
        for x, r in ((problem.q, outputs.q_rnorm), (problem.k, outputs.k_rnorm)):
            r.copy_(1 / x.to(problem.wide_dtype).unflatten(-1, (problem.groups, -1)).norm(dim=-1).clamp_min(1e-12))


def backward(*args):
    with ThreadPoolExecutor(1) as pool:
        pool.submit(_backward, *args).result()


def _backward(problem, outputs, dout, dlse, gradients):
    inputs = [problem.q, problem.k, problem.v, problem.bias, problem.scale]
    targets = [gradients.dq, gradients.dk, gradients.dv, gradients.dbias, gradients.dscale]
    inputs = [None if x is None else x.detach().requires_grad_(t is not None) for x, t in zip(inputs, targets)]
    with torch.enable_grad():
        out, lse = _run(problem, *inputs)
        total = (out * dout).sum() if dlse is None else (out * dout).sum() + torch.where(lse > -1e30, lse * dlse, 0).sum()
    wanted = [(x, t) for x, t in zip(inputs, targets) if t is not None]
    for g, (_, t) in zip(torch.autograd.grad(total, [x for x, _ in wanted]), wanted):
        t.copy_(g)
