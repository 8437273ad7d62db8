"""From what arrives at `Attend.forward` to what `flash_cosine_sim_attention` takes: views wherever possible."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from flash_cosine_sim_attention import PositionBias, RelativeBias, flash_cosine_sim_attention
from torch import Tensor

from .positions import by_kv_head


def fused_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | PositionBias | None,
    *,
    causal: bool,
    scale: float | Tensor,
    groups: int,
    l2norm_qk: bool,
    bounded: bool,
    add_zero_kv: bool,
    backend: str | None,
) -> Tensor:
    """q (b, h, i, d), k (b, kvh, j, d), v (b, kvh, j, dv) -> (b, h, i, dv); query head a reads kv head a % kvh.

    mask: bool, (b, j) or broadcastable to (b, h, i, j), True = attend. bias: broadcastable to (b, h, i, j);
    or a PositionBias, with a mask over keys only and without add_zero_kv.
    scale: a number, or a tensor of one value or one per query head, with gradient.
    bounded=False: |scale * q.k| may exceed scale * groups, a running maximum is tracked. It needs a number for scale.
    """
    q, k, v = _one_dtype(q, k, v)
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None]
    if add_zero_kv:
        assert not isinstance(bias, PositionBias)
        k, v, mask, bias = _pad_zero_key(k, v, mask, bias)
    key_mask, pair_mask = _split_mask(mask)
    if isinstance(bias, PositionBias):
        assert pair_mask is None
    else:
        bias = _merge_into_bias(bias, pair_mask, q.dtype)
    if not bounded and not isinstance(scale, Tensor):
        q, scale = _claim_a_large_bound(q, scale, groups)
    heads, kv_heads = q.shape[1], k.shape[1]
    tiled = 1 < kv_heads < heads
    if tiled:
        q, k, v, key_mask, bias = _tiled_heads_to_batch(q, k, v, key_mask, bias)
        if isinstance(scale, Tensor) and scale.numel() > 1:
            return _with_scale_per_head(q, k, v, key_mask, bias, scale, groups, causal, l2norm_qk, backend)
    out = flash_cosine_sim_attention(
        q, k, v, key_mask, bias, scale, groups, causal, l2norm_qk, backend=backend
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.transpose(1, 2).flatten(1, 2) if tiled else out


def _one_dtype(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Autocast normalises in float32 and projects in half, so q, k and v may differ: its dtype, else that of v."""
    device_type = q.device.type
    dtype = torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else v.dtype
    return q.to(dtype), k.to(dtype), v.to(dtype)


def _claim_a_large_bound(q: Tensor, scale: float, groups: int) -> tuple[Tensor, float]:
    """q and k of unknown norm: a power of two moves from q to the scale, beyond the bound of any fixed shift.

    The kernel then tracks a maximum, with which the bound is not needed. The power of two rounds nothing, except for
    entries of float16 that become subnormal, hence its smaller one.
    """
    if scale == 0:
        return q, scale
    claim = 128.0 if q.dtype == torch.float16 else 1024.0  # fixed shifts end at 10 and 70, at 600 for float64
    factor = 2.0 ** max(0, math.ceil(math.log2(claim / (abs(scale) * groups))))
    return q / factor, scale * factor


def _pad_zero_key(
    k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """add_zero_kv: a key and value of zeros on the left, always visible, with bias 0."""
    keys = k.shape[-2]
    if mask is not None:
        mask = F.pad(mask.expand(*mask.shape[:-1], keys), (1, 0), value=True)
    if bias is not None:
        bias = F.pad(bias.expand(*bias.shape[:-1], keys), (1, 0))
    return F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), mask, bias


def _split_mask(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """mask broadcastable to (b, h, i, j) -> one over keys (b | 1, j), or one over pairs with 4 dims."""
    if mask is None:
        return None, None
    mask = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    if mask.shape[1:3] == (1, 1):
        return mask[:, 0, 0], None
    return None, mask


def _merge_into_bias(bias: Tensor | None, pair_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """-> (b | 1, h | 1, i | 1, j | 1), -inf where pair_mask forbids; its gradient there is 0."""
    if bias is not None:
        bias = bias if bias.is_floating_point() else bias.to(dtype)
        bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    if pair_mask is None:
        return bias
    zero = torch.zeros((), dtype=dtype, device=pair_mask.device)
    return torch.where(pair_mask, zero if bias is None else bias, float("-inf"))


def _tiled_heads_to_batch(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | PositionBias | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | PositionBias | None]:
    """kv heads become a second batch dim, the r query heads that read one of them its heads: no copy of q, k or v.

    x-transformers tiles: query head a = (r, kvh) reads kv head a % kvh. The kernel's usual grouping, a // r, would
    pair other heads without any error.
    """
    kv_heads = k.shape[1]
    q = q.unflatten(1, (-1, kv_heads)).transpose(1, 2)  # (b, kvh, r, i, d)
    k, v = k.unsqueeze(2), v.unsqueeze(2)  # (b, kvh, 1, j, d)
    if key_mask is not None:
        key_mask = key_mask.unsqueeze(1)  # (b | 1, 1, j)
    if isinstance(bias, PositionBias):
        bias = by_kv_head(bias, kv_heads, q.shape[-2], k.shape[-2])  # (kvh | 1, r | 1)
    elif bias is not None and bias.shape[1] == 1:
        bias = bias.unsqueeze(1)  # (b | 1, 1, 1, i, j)
    elif bias is not None:
        bias = bias.unflatten(1, (-1, kv_heads)).transpose(1, 2)  # (b | 1, kvh, r, i, j)
    return q, k, v, key_mask, bias


def _with_scale_per_head(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, bias: Tensor | PositionBias | None, scale: Tensor,
    groups: int, causal: bool, l2norm_qk: bool, backend: str | None,
) -> Tensor:  # fmt: skip
    """The same from `_tiled_heads_to_batch` on, for one scale per query head: a batch dim has none, so q is copied."""
    kv_heads = k.shape[1]
    per_head = scale.reshape(-1, kv_heads).t().flatten()
    q, k, v = (x.flatten(1, 2) for x in (q, k, v))  # query head (kvh, r) reads kv head kvh
    if isinstance(bias, RelativeBias):
        bias = RelativeBias(bias.table.flatten(0, 1))
    elif isinstance(bias, Tensor):
        bias = bias.flatten(1, 2)
    out = flash_cosine_sim_attention(
        q, k, v, None if key_mask is None else key_mask.squeeze(1), bias,
        per_head, groups, causal, l2norm_qk, backend=backend,
    )  # fmt: skip
    assert isinstance(out, Tensor)
    return out.unflatten(1, (kv_heads, -1)).transpose(1, 2).flatten(1, 2)
