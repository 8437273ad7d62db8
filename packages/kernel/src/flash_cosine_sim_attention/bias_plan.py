"""How the CUDA kernels are served a bias: workspaces, and whether it is a call for the kernels of short rows.

A bias that many rows share is repacked once a call in the order of the threads (csrc/sm80/packed_bias.cuh).
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from .kernel_form import has_bias_rows, workspace
from .problem import Problem

PAIR_HEAD_DIM = 32
PAIR_LENGTH = {"forward": 512, "backward": 384}
"""What the kernels for a bias that many short rows share are made for (csrc/sm80/pair_rows.cuh)."""

PAIR_SM90_KEYS = {True: 512, False: 384}
"""The most keys of Hopper's own forward, which has room for a bias of the dtype of q, or for one in float32."""

MIN_SHARERS, MIN_SHARERS_GENERAL = 4, 32
"""A bias is repacked where at least as many batch rows share it, for the kernels for short rows and for the general
ones: those gain less by it."""

DBIAS_PARTS = 2**23
"""The most floats of the workspace for the gradient of a bias that is shared: enough to keep every GPU busy."""


MIN_SHARERS_OF_COPY = 4
"""A bias that TMA cannot read as it is goes to the sm90 forward as a copy where at least as many matrices of logits
share it; else the sm80 kernels, which read any strides, serve an automatic call."""


class BiasPlan(NamedTuple):
    packed: Tensor | None  # workspace for the repacked bias
    pair: bool  # whether the kernels for short rows serve the call


def plan_bias(problem: Problem, pass_name: str, variant_head_dim: int) -> BiasPlan:
    """variant_head_dim: kHeadDim of the launcher."""
    q, k, bias = problem.q, problem.k, problem.bias
    if bias is None or problem.toeplitz:
        return BiasPlan(None, False)
    (b0, b1, h, i, _), (hk, j) = q.shape, k.shape[2:4]
    matrices = bias.shape[0] * bias.shape[1]
    if b0 * b1 < MIN_SHARERS * matrices or (bias.shape[0] > 1 and bias.shape[1] > 1):
        return BiasPlan(None, False)
    pair = q.dtype != torch.float32 and variant_head_dim == PAIR_HEAD_DIM and h == hk
    pair = pair and not problem.causal and problem.groups == 1 and max(i, j) <= PAIR_LENGTH[pass_name]
    pair = pair and _shared_memory(q.device) >= (227 if max(i, j) > 256 else 160) * 1024
    if not pair and (b0 * b1 < MIN_SHARERS_GENERAL * matrices or _is_staged(problem, pass_name)):
        return BiasPlan(None, False)
    values = matrices * bias.shape[2] * -(-i // 32) * -(-j // 32) * 1024
    dtype = q.dtype if bias.dtype == q.dtype else torch.float32
    return BiasPlan(workspace(q, (values,), dtype), pair)


def sm90_bias_form(problem: Problem) -> str | None:
    """How the sm90 forward reads a bias: "rows", as it is or from a copy that is small beside the logits; "copied",
    from a large copy; "shared" by all keys, not at all. None: there is no bias, or its diagonals alone."""
    bias, keys = problem.bias, problem.k.shape[-2]
    if bias is None or problem.toeplitz:
        return None
    if bias.shape[-1] != keys:
        return "shared"
    is_read = bias.dtype in (problem.q.dtype, torch.float32) and has_bias_rows(bias, keys)
    is_small = MIN_SHARERS_OF_COPY * bias.numel() <= problem.q[..., 0].numel() * keys
    return "rows" if is_read or is_small else "copied"


def pair_on_sm90(problem: Problem) -> bool | None:
    """Whether Hopper's own forward for short rows that share a bias (csrc/sm90/pair_forward.cuh) was the faster one for
    calls of this kind; None: it does not serve the call."""
    q, k, bias = problem.q, problem.k, problem.bias
    if bias is None or problem.toeplitz or problem.causal or problem.groups != 1 or q.dtype == torch.float32:
        return None
    if max(q.shape[-1], problem.v.shape[-1]) > PAIR_HEAD_DIM or q.shape[2] != k.shape[2]:
        return None
    keys, matrices, is_narrow = k.shape[3], bias.shape[0] * bias.shape[1], bias.dtype == q.dtype
    if min(bias.shape[:2]) > 1 or q.shape[0] * q.shape[1] < MIN_SHARERS * matrices or keys > PAIR_SM90_KEYS[is_narrow]:
        return None
    return 256 < keys <= 384 if is_narrow else keys <= 256


def _is_staged(problem: Problem, pass_name: str) -> bool:
    """Whether the backward copies tiles of the bias to shared memory as it is (csrc/sm80/backward.cuh)."""
    bias = problem.bias
    assert bias is not None
    is_aligned = bias.stride(-1) == 1 and bias.shape[-1] % 8 == 0 and bias.stride(-2) % 8 == 0
    return pass_name == "backward" and problem.q.dtype != torch.float32 and bias.dtype == problem.q.dtype and is_aligned


@cache
def _shared_memory(device: torch.device) -> int:
    """Bytes a block of threads may have; of host tensors, which only tests bring here, as many as any GPU has."""
    if device.type != "cuda":
        return 1 << 20
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin  # type: ignore[attr-defined]


def dbias_parts(problem: Problem, dbias: Tensor | None) -> Tensor | None:
    """Room for sums over parts of what shares one bias, added up afterwards: at most DBIAS_PARTS floats; for a bias by
    its diagonals O(i + j) of each (b0, b1, h), the windows of csrc/sm80/backward_ddiagonals.cuh.
    """
    (b0, b1, h, i, _), j = problem.q.shape, problem.k.shape[-2]
    if dbias is not None and problem.toeplitz:
        return workspace(problem.q, (b0 * b1 * h * (2 * -(-i // 64) + -(-j // 32)) * 96,))
    if dbias is None or dbias.numel() == b0 * b1 * h * i * j:
        return None
    padded = b0 * b1 * h * (-(-i // 128) * 128) * (-(-j // 128) * 128)
    return workspace(problem.q, (min(padded, DBIAS_PARTS),))
