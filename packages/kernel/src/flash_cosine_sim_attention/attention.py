"""The public function: validate, bring into canonical form, choose a path, call it."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from . import backends, common_call, ops, sdpa
from .position_bias import PositionBias
from .problem import canonicalize, restore
from .reference import plain_cosine_sim_attention
from .validation import check_unit_norm, validate


def flash_cosine_sim_attention(
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
    """Cosine-similarity attention, fused: no n x n matrix is ever stored, forward or backward.

        out_i = sum_j softmax_j(scale * cos(q_i, k_j) + bias_ij) v_j        over the keys j that query i sees

    Sizes: i queries, j keys (i != j is cross attention), h query heads, hk kv heads, head dims d and dv; *batch is any
    number of leading dims, e.g. (b,) or AlphaFold's (b, N).

    Args:
        q: (*batch, h, i, d), or with batch and heads merged (b * h, i, d). float32, float16, bfloat16, or float64
            (plain PyTorch paths only). Any strides.
        k: (*batch, hk, j, d) with h % hk == 0, query head a reading kv head a // (h / hk); (*batch, j, d) for a single
            kv head; (b * h, j, d) with merged q.
        v: as k, with head dim dv.
        mask: bool, True = attend, broadcastable to (*batch, j). NaN or Inf in a masked-out key or value reaches no
            output. May be combined with `causal`.
        attn_bias: added to the logits, any floating dtype: (h, i, j); (b, i, j) with `attn_bias_batch_dim` or merged q;
            or 4 or more dims that broadcast to (*batch, h, i, j), e.g. (b, 1, h, i, j) shared over AlphaFold's rows.
            -inf hides a pair. Its gradient is summed over what was broadcast, and computed only if asked for.
            Or a `PositionBias`, `AlibiBias`, `T5Bias` or `RelativeBias`: a function of the relative position with
            O(n) or O(h) parameters and their gradients, for which no (i, j) tensor is ever made. Its heads are h or 1;
            with merged q they may be any divisor of b * h, heads innermost.
        scale: factor of the cosine: a number, or a tensor of one value or one per head (h,): a learned temperature,
            with gradient. On the device of q.
        groups: the l2 norm is taken over each of `groups` contiguous chunks of d, so that the logits reach
            scale * groups (d % groups == 0).
        causal: hide key j from query i unless j <= i + (nk - nq): aligned to the bottom right.
        l2norm_qk: False if q and k come with unit norm per group already (see `l2norm_tensors`); the environment
            variable FLASH_COSINE_SIM_CHECK=1 verifies that promise, which costs a synchronisation.
        attn_bias_batch_dim: read a bias of 3 dims as (b, i, j) instead of (h, i, j).
        return_lse: return the log-sum-exp of each row of logits too.
        backend: force a path (see `backends.py`); None chooses by device, dtype and shape.

    Returns:
        out (*batch, h, i, dv) in the dtype of q, or merged (b * h, i, dv); with `return_lse` also
        lse (*batch, h, i), natural logarithm, float32 (float64 for float64 inputs), differentiable.
        A query that sees no key has output 0, lse -inf and zero gradients.

    Raises:
        TypeError: a wrong type or dtype; q, k, v of different dtypes (under torch.autocast they are cast instead).
        ValueError: shapes, devices, groups or scale that do not fit, an unknown backend, or a forced backend that
            cannot serve the call; with FLASH_COSINE_SIM_CHECK=1, norms that are not 1.

    First derivatives only; `plain_cosine_sim_attention` is differentiable twice. Maths: docs/math.md.

    Example:
        >>> q, k, v = (torch.randn(2, 8, 1024, 64) for _ in range(3))
        >>> flash_cosine_sim_attention(q, k, v, causal=True).shape
        torch.Size([2, 8, 1024, 64])
    """
    may_be_common = attn_bias is None and groups == 1 and l2norm_qk
    if may_be_common:
        known = common_call.attend(q, k, v, mask, scale, causal, backend, return_lse)
        if known is not None:
            return known
    q, k, v = _autocast(q, k, v)
    validate(q, k, v, mask, attn_bias, scale, groups, attn_bias_batch_dim, backend)
    if backend == "plain":
        return plain_cosine_sim_attention(
            q, k, v, mask, attn_bias, scale, groups, causal, l2norm_qk, attn_bias_batch_dim, return_lse=return_lse
        )
    if not l2norm_qk and not torch.compiler.is_compiling() and os.environ.get("FLASH_COSINE_SIM_CHECK", "0") == "1":
        check_unit_norm(q, k, groups)
    fields = canonicalize(q, k, v, mask, attn_bias, scale, attn_bias_batch_dim)
    toeplitz = isinstance(attn_bias, PositionBias)
    if backends.uses_sdpa(*fields[:5], causal, return_lse, toeplitz, backend):
        return restore(sdpa.attention(*fields, groups, causal, l2norm_qk), q)
    out, lse, _, _ = ops.forward(*fields, groups, causal, l2norm_qk, toeplitz, backend or "")
    if may_be_common:
        common_call.remember(q, k, v, mask, scale, causal, backend)
    out = restore(out, q)
    return (out, restore(lse, q)) if return_lse else out


def _autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Under torch.autocast: all in its dtype, float64 excepted, as torch's own attention does."""
    if not all(isinstance(x, Tensor) for x in tensors) or not torch.is_autocast_enabled(tensors[0].device.type):
        return tensors
    dtype = torch.get_autocast_dtype(tensors[0].device.type)
    return tuple(x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in tensors)
