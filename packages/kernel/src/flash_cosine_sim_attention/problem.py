"""The canonical form of one attention problem: what every fused path (chunked PyTorch, CUDA) receives.

The public function accepts many shapes; `canonicalize` turns them into views with exactly two batch dims, because two
are what a bias that is shared over one of them needs (AlphaFold's (b, 1, h, i, j) for q (b, N, h, i, d)).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .position_bias import PositionBias
from .validation import batch_shape, num_heads


@dataclass(frozen=True, slots=True)
class Problem:
    """One call. No tensor is expanded over heads or kv groups; size-1 dims of mask and bias stand for broadcasting."""

    q: Tensor  # (b0, b1, h, i, d)
    k: Tensor  # (b0, b1, hk, j, d)         query head a reads kv head a // (h / hk)
    v: Tensor  # (b0, b1, hk, j, dv)
    mask: Tensor | None  # bool (b0 | 1, b1 | 1, j), True = attend
    bias: Tensor | None  # (b0 | 1, b1 | 1, h | 1, i | 1, j | 1), any float dtype; or as `toeplitz` says
    scale: Tensor | None  # (h,) float32 (float64 for float64): learned; else None and scale_value holds
    scale_value: float
    groups: int
    causal: bool  # key j is visible to query i iff j <= i + (nk - nq)
    l2norm_qk: bool
    toeplitz: bool = False
    """The bias depends on j - i alone and is given by its diagonals: bias (b0 | 1, b1 | 1, h | 1, 1, i + j - 1), wide
    dtype; that of pair (i, j) is entry nq - 1 + j - i."""

    @property
    def bound(self) -> float:
        """B with |scale * qn . kn| <= B; inf where it is not known on the host (learned scale)."""
        return math.inf if self.scale is not None else abs(self.scale_value) * self.groups

    @property
    def wide_dtype(self) -> torch.dtype:
        """The dtype of sums, log-sum-exp and norm factors."""
        return torch.float64 if self.q.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, slots=True)
class Outputs:
    """Tensors that a backend's forward fills."""

    out: Tensor  # (b0, b1, h, i, dv), dtype of q
    lse: Tensor  # (b0, b1, h, i), wide dtype; natural log; -inf for a row with no visible key
    q_rnorm: Tensor  # (b0, b1, h, i, groups), wide dtype: 1 / max(|q|_group, eps); (0,) unless l2norm_qk
    k_rnorm: Tensor  # (b0, b1, hk, j, groups)


@dataclass(frozen=True, slots=True)
class Gradients:
    """Tensors that a backend's backward fills; None where no gradient is wanted."""

    dq: Tensor | None  # as q
    dk: Tensor | None  # as k, summed over the query heads of a kv head
    dv: Tensor | None  # as v
    dbias: Tensor | None  # shape and dtype of bias, summed over what was broadcast
    dscale: Tensor | None  # (h,), dtype of scale


def canonicalize(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    attn_bias: Tensor | PositionBias | None,
    scale: float | Tensor,
    attn_bias_batch_dim: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, float]:
    """Arguments that passed `validate` -> (q, k, v, mask, bias, scale, scale_value) of a `Problem`, differentiably.

    Views, except with three or more batch dims that cannot be merged in place. A `PositionBias` becomes its diagonals
    (see `Problem.toeplitz`).
    """
    if isinstance(attn_bias, PositionBias):
        q, k, v, mask, attn_bias = _with_diagonals(q, k, v, mask, attn_bias)
    batch, heads = batch_shape(q), num_heads(q)
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    merged = q.ndim == 3
    bias = None if attn_bias is None else _align_bias(attn_bias, len(batch), merged or attn_bias_batch_dim)
    mask = None if mask is None else mask.reshape((1,) * (len(batch) + 1 - mask.ndim) + mask.shape)
    if merged:
        q, k, v = q.unsqueeze(1), k.unsqueeze(1), v.unsqueeze(1)
    elif k.ndim < q.ndim:
        k, v = k.unsqueeze(-3), v.unsqueeze(-3)

    split = _split_of_batch(batch, bias)
    q, k, v = (_two_batch_dims(x, len(batch), split) for x in (q, k, v))
    if mask is not None:
        if len(batch) > 2:
            mask = mask.expand(*batch, -1)
        mask = _two_batch_dims(mask, len(batch), split)
        mask = mask.expand(-1, -1, k.shape[-2])
    if bias is not None:
        if _is_mixed(batch, bias, split):
            bias = bias.expand(*batch, *bias.shape[-3:])
        bias = _two_batch_dims(bias, len(batch), split)

    if isinstance(scale, Tensor):
        return q, k, v, mask, bias, scale.to(wide).reshape(-1).expand(heads), 0.0
    return q, k, v, mask, bias, None, float(scale)


def _with_diagonals(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: PositionBias
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor]:
    """-> q, k, v, mask and the bias's diagonals, (*batch | 1, h | 1, 1, i + j - 1) in 4 or more dims.

    Merged (b * h, n, d) with a bias of h heads get batch dims (b, h) with one head each: a mask may tell heads apart.
    """
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    diagonals = bias.diagonals(q.shape[-2], k.shape[-2], wide).contiguous().unsqueeze(-2)
    heads = bias.leading[-1]
    if q.ndim == 3 and heads != 1:
        q, k, v = (x.unflatten(0, (-1, heads)).unsqueeze(2) for x in (q, k, v))
        if mask is not None and mask.ndim == 2 and mask.shape[0] != 1:
            mask = mask.unflatten(0, (-1, heads))
        diagonals = diagonals.unsqueeze(-3)
    return q, k, v, mask, diagonals.reshape((1,) * (4 - diagonals.ndim) + diagonals.shape)


def restore(x: Tensor, q: Tensor) -> Tensor:
    """x (b0, b1, h, i, ...) -> the leading dims of the caller's q."""
    return x.reshape(*q.shape[:-1], *x.shape[4:])


def _align_bias(bias: Tensor, num_batch_dims: int, by_batch: bool) -> Tensor:
    """-> (*batch | 1s, h | 1, i | 1, j | 1)"""
    if bias.ndim == 3 and by_batch:
        bias = bias.unsqueeze(1)
    return bias.reshape((1,) * (num_batch_dims + 3 - bias.ndim) + bias.shape)


def _split_of_batch(batch: tuple[int, ...], bias: Tensor | None) -> int:
    """Where to cut the batch dims in two, so that the bias is shared over the whole of one part if that is possible."""
    if len(batch) <= 2:
        return 1
    if bias is None:
        return len(batch)
    own = [bias.shape[index] != 1 for index in range(len(batch))]
    for cut in range(1, len(batch)):
        if len(set(own[:cut])) == 1 and len(set(own[cut:])) == 1:
            return cut
    return len(batch)


def _is_mixed(batch: tuple[int, ...], bias: Tensor, split: int) -> bool:
    """Whether some but not all of the dims of a part are shared: then the bias has to be expanded over the batch."""
    parts = (range(split), range(split, len(batch)))
    return any(len({bias.shape[index] != 1 for index in part if batch[index] != 1}) > 1 for part in parts)


def _two_batch_dims(x: Tensor, num_batch_dims: int, split: int) -> Tensor:
    if num_batch_dims == 2:
        return x
    if num_batch_dims == 1:
        return x.unsqueeze(1)
    if num_batch_dims == 0:
        return x[None, None]
    tail = x.shape[num_batch_dims:]
    outer = math.prod(x.shape[:split])
    return x.reshape(outer, math.prod(x.shape[split:num_batch_dims]), *tail)
