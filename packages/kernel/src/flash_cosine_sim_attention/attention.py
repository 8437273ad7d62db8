"""The public function: validate, bring into canonical form, choose a path, call it."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import ops  # noqa: F401  (defines the operators)
from .problem import canonicalize, restore
from .reference import plain_cosine_sim_attention
from .validation import check_unit_norm, validate


def flash_cosine_sim_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    attn_bias: Tensor | None = None,
    scale: float | Tensor = 8,
    groups: int = 1,
    causal: bool = False,
    l2norm_qk: bool = True,
    attn_bias_batch_dim: bool = False,
    *,
    return_lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * cos(q_i, k_j) + bias_ij) v_j, fused, with O(n) extra memory, forward and backward."""
    q, k, v = _autocast(q, k, v)
    validate(q, k, v, mask, attn_bias, scale, groups, attn_bias_batch_dim, backend)
    if backend == "plain":
        return plain_cosine_sim_attention(
            q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk, attn_bias_batch_dim, return_lse=return_lse
        )
    if not l2norm_qk and not torch.compiler.is_compiling() and os.environ.get("FLASH_COSINE_SIM_CHECK", "0") == "1":
        check_unit_norm(q, k, groups)
    fields = canonicalize(q, k, v, mask, attn_bias, scale, attn_bias_batch_dim)
    out, lse, _, _ = torch.ops.flash_cosine_sim_attention.forward(*fields, groups, causal, l2norm_qk, backend or "")
    out = restore(out, q)
    return (out, restore(lse, q)) if return_lse else out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast: all in its dtype, float64 excepted, as torch's own attention does."""
    if not all(isinstance(x, Tensor) for x in tensors) or not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
