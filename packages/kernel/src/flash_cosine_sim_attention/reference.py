"""The definition: eager, O(n^2) memory, differentiable twice, any dtype up to float64. It shares no arithmetic with
the paths that it judges; only the argument checks are common.

    qn = q / |q|_group,  kn = k / |k|_group
    s_ij = scale * (qn_i . kn_j) + bias_ij        over visible keys j
    out_i = sum_j exp(s_ij) v_j / sum_j exp(s_ij)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .position_bias import PositionBias
from .validation import validate


def plain_cosine_sim_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    attn_bias: Tensor | PositionBias | None = None,
    scale: float | Tensor = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
    *,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The definition of cosine-sim attention, with the signature of `flash_cosine_sim_attention`: see its docstring.

    Half inputs are computed in float32 and rounded once at the end, float64 in float64. `backend` may be None or
    "plain": there is nothing to choose here.

    Raises:
        TypeError, ValueError: as `flash_cosine_sim_attention`; ValueError for any other backend.
    """
    validate(q, k, v, mask, attn_bias, scale, groups, attn_bias_batch_dim, backend)
    if backend not in (None, "plain"):
        raise ValueError(f"backend: expected None or 'plain' for plain_cosine_sim_attention, got {backend!r}")
    with torch.autocast(q.device.type, enabled=False):
        out, lse = _attend(q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk, attn_bias_batch_dim)
    return (out, lse) if return_lse else out


def _attend(q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk, attn_bias_batch_dim) -> tuple[Tensor, Tensor]:
    dtype, merged = q.dtype, q.ndim == 3
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = (t.to(wide) for t in (q, k, v))
    if merged:
        q = q.unsqueeze(1)
    k, v = _per_query_head(k, q), _per_query_head(v, q)

    if mask is not None:  # a masked key or value may be NaN: any finite number in its place will do
        visible_keys = mask.expand(*q.shape[:-3], k.shape[-2])[..., None, :, None]  # (*batch, 1, j, 1)
        k, v = torch.where(visible_keys, k, 1.0), torch.where(visible_keys, v, 0.0)
    if l2norm_qk:
        q, k = _unit(q, groups), _unit(k, groups)

    scores = q @ k.transpose(-1, -2)  # (*batch, h, i, j)
    scores = scores * _per_head(scale, wide)
    if attn_bias is not None:
        scores = scores + _dense(attn_bias, scores, merged, attn_bias_batch_dim or merged).to(wide)
    scores = torch.where(_visible(scores, mask, causal), scores, float("-inf"))

    out, lse = _softmax_average(scores, v)
    return (out.squeeze(1).to(dtype), lse.squeeze(1)) if merged else (out.to(dtype), lse)


def _dense(attn_bias: Tensor | PositionBias, scores: Tensor, merged: bool, by_batch: bool) -> Tensor:
    """-> broadcastable to scores (*batch, h, i, j)"""
    if isinstance(attn_bias, PositionBias):
        bias = attn_bias.materialize(scores.shape[-2], scores.shape[-1], scores.dtype)
        return bias.repeat(scores.shape[0] // bias.shape[0], 1, 1).unsqueeze(1) if merged else bias
    return attn_bias.unsqueeze(1) if attn_bias.ndim == 3 and by_batch else attn_bias


def _per_query_head(x: Tensor, q: Tensor) -> Tensor:
    """x (*batch, j, d) or (*batch, hk, j, d) -> (*batch, h, j, d): query head a reads kv head a // (h / hk)."""
    if x.ndim < q.ndim:
        return x.unsqueeze(-3).expand(*q.shape[:-2], *x.shape[-2:])
    kv_heads = x.shape[-3]
    return x.repeat_interleave(q.shape[-3] // kv_heads, dim=-3) if kv_heads else x


def _unit(x: Tensor, groups: int) -> Tensor:
    chunks = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return (chunks / chunks.norm(dim=-1, keepdim=True).clamp_min(1e-12)).flatten(-2)


def _per_head(scale: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return scale.to(dtype).reshape(-1, 1, 1) if isinstance(scale, Tensor) else scale


def _visible(scores: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
    """bool, broadcastable to (*batch, h, i, j). Causal is aligned to the bottom right: j <= i + (nk - nq)."""
    nq, nk = scores.shape[-2:]
    visible = torch.ones(nq, nk, dtype=torch.bool, device=scores.device)
    if causal:
        visible = visible.tril(nk - nq)
    return visible if mask is None else visible & mask[..., None, None, :]


def _softmax_average(scores: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """(*batch, h, i, j), (*batch, h, j, dv) -> out (*batch, h, i, dv), lse (*batch, h, i); 0 and -inf for empty rows.

    The subtracted maximum cancels in every derivative, so it is detached.
    """
    if scores.shape[-1] == 0:
        return scores @ v, scores.new_full(scores.shape[:-1], float("-inf"))
    maximum = scores.detach().amax(-1, keepdim=True)
    maximum = torch.where(maximum == float("-inf"), 0.0, maximum)
    weights = (scores - maximum).exp()
    total = weights.sum(-1, keepdim=True)
    empty = total == 0
    total = torch.where(empty, 1.0, total)
    lse = torch.where(empty, float("-inf"), maximum + total.log())
    return (weights @ v) / total, lse.squeeze(-1)
