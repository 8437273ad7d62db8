"""Torch's own scaled_dot_product_attention behind the norm: differentiable torch calls, chosen before the operator.

On a CPU it is a tiled kernel with O(n) memory, forward and backward. It turns to an O(n^2) computation without a word
where a condition is not met, so `why_not` names every condition that is relied on; `attention` expects it to be None.
What it does not serve, `chunked` does.

Conditions found in torch 2.13 (see tests/test_sdpa.py): one head dim for q, k and v; rows contiguous; no gradient for
the mask; the mask in float32 or the dtype of q; never a mask and is_causal together, and is_causal aligned to the top
left. Rows without a visible key come out as 0, with gradients of 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from .normalize import keep_rows, l2norm

HAS_BFLOAT16_PRODUCTS = bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())
MIN_BFLOAT16_KEYS = 256


def is_faster(q: Tensor, k: Tensor) -> bool:
    """Whether it beats `chunked`, as measured forward and backward on an AVX-512 CPU, with lengths of 16 to 4096.

    float32: by 1.1 to 2 forward, and 0.9 to 1.7 with the backward. float64: no less. float16: 5 times slower, from 256
    keys on. bfloat16: by 1.2 to 1.6 from 256 keys on where the CPU multiplies bfloat16, 2 times slower at 64 keys.
    """
    if q.dtype == torch.bfloat16:
        return HAS_BFLOAT16_PRODUCTS and k.shape[3] >= MIN_BFLOAT16_KEYS
    return q.dtype != torch.float16


def why_not(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    return_lse: bool,
    toeplitz: bool = False,
) -> str | None:
    """The reason why `attention` cannot serve this with O(n) memory, None if it can. Tensors as in `Problem`."""
    nq, nk = q.shape[3], k.shape[3]
    if q.device.type != "cpu":
        return f"it serves CPU tensors, got {q.device}"
    if return_lse:
        return "it returns no log-sum-exp"
    if toeplitz:
        return "it takes attn_bias as a dense tensor only, not as a PositionBias"
    if v.shape[-1] != q.shape[-1]:
        return f"it needs one head dim for q, k and v, got {q.shape[-1]} and {v.shape[-1]}"
    if q.numel() == 0 or k.numel() == 0:
        return f"it needs sizes of at least 1, got q {tuple(q.shape)}, k {tuple(k.shape)}"
    if causal and nq != 1:
        if mask is not None or bias is not None:
            return "it takes no mask or attn_bias together with causal"
        if nq < nk:
            return f"it aligns causal to the top left, got {nq} queries for {nk} keys"
    return None if bias is None else _why_not_with(bias, q, mask)


def _why_not_with(bias: Tensor, q: Tensor, mask: Tensor | None) -> str | None:
    if mask is not None:
        return "it takes no mask together with attn_bias"
    if bias.requires_grad and torch.is_grad_enabled():
        return "it makes no gradient of attn_bias in O(n) memory"
    if bias.dtype != q.dtype and not (bias.dtype == torch.float32 and q.element_size() < 4):
        return f"it takes attn_bias in {q.dtype}, got {bias.dtype}"
    if not _merges_in_place(bias, q):
        return "it takes no attn_bias that is shared over one of two batch dims"
    return None


def _merges_in_place(bias: Tensor, q: Tensor) -> bool:
    """Whether the two batch dims of the bias become one without a copy of the bias."""
    if q.shape[0] == 1 or q.shape[1] == 1 or (bias.shape[0] == 1 and bias.shape[1] == 1):
        return True
    return bias.shape[0] != 1 and bias.shape[1] != 1 and bias.stride(0) == bias.shape[1] * bias.stride(1)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    scale: Tensor | None,
    scale_value: float,
    groups: int,
    causal: bool,
    l2norm_qk: bool,
) -> Tensor:
    """out (b0, b1, h, i, d) of a problem (see `Problem` for the arguments) for which `why_not` is None."""
    batch = q.shape[:2]
    nq, nk = q.shape[3], k.shape[3]
    # Branches, because a comparison of sizes that torch.compile traces is not a bool.
    if nq == 1:  # the last query sees every key
        causal = False
    is_grouped = True if q.shape[2] != k.shape[2] else False  # noqa: SIM210
    with torch.autocast(q.device.type, enabled=False):
        if mask is not None:  # a masked key or value may be NaN
            k, v = (_keep_rows(x, mask[:, :, None, :, None]) for x in (k, v))
        if l2norm_qk:
            q, k = l2norm(q, groups), l2norm(k, groups)
        # Torch hides keys from causal scores with -inf before it multiplies by its scale: that has to be positive.
        if scale is not None:
            q, scale_value = (q * scale[:, None, None]).to(q.dtype), 1.0
        elif scale_value <= 0:
            q, scale_value = q * scale_value, 1.0
        num_empty = max(nq - nk, 0) if causal else 0  # leading queries that see no key
        q, k, v = (_rows_contiguous(x.flatten(0, 1)) for x in (q[..., num_empty:, :], k, v))
        out = scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=_mask_of(mask, bias, batch),
            is_causal=causal,
            scale=scale_value,
            enable_gqa=is_grouped,
        )
        return pad(out, (0, 0, num_empty, 0)).unflatten(0, batch) if num_empty else out.unflatten(0, batch)


def _mask_of(mask: Tensor | None, bias: Tensor | None, batch: torch.Size) -> Tensor | None:
    """bool (b | 1, 1, 1, j) or float (b | 1, h | 1, i | 1, j | 1), b = b0 * b1."""
    if mask is not None:
        return mask.expand(*batch, -1).flatten(0, 1)[:, None, None, :]
    if bias is None:
        return None
    return bias.detach().flatten(0, 1)


def _keep_rows(x: Tensor, visible: Tensor) -> Tensor:
    """torch.where(visible, x, 0): six times faster in eager mode, 5 per cent of the attention at 512 keys."""
    return torch.where(visible, x, 0.0) if torch.compiler.is_compiling() else _KeepRows.apply(x, visible)


class _KeepRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, visible):
        ctx.save_for_backward(visible)
        return keep_rows(x, visible)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0], None  # finite, for the attention gives hidden keys no gradient


def _rows_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
