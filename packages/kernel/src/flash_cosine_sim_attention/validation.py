"""The one contract of the public functions: what is accepted, and every error, raised before any work is done.

Each message says what was expected, what came and, where it helps, what to do.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor

from .position_bias import PositionBias

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
BACKENDS = ("plain", "chunked", "sdpa", "sm80", "sm90")
"""Every name that `backend=` takes: see `backends.py` for what each one is and serves."""


def shape_of(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def _check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")


def check_groups(groups: int, tensor: Tensor, name: str) -> None:
    _check_tensor(name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        raise TypeError(f"{name}: expected a dtype of float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if isinstance(groups, bool) or not isinstance(groups, (int, torch.SymInt)):
        raise TypeError(f"groups: expected an int, got {type(groups).__name__}")
    if tensor.ndim < 1:
        raise ValueError(f"{name}: expected at least one dim (..., d), got shape {shape_of(tensor)}")
    if groups < 1 or tensor.shape[-1] % groups != 0:
        raise ValueError(
            f"groups: expected a positive divisor of the head dim, got groups = {groups} "
            f"with {name} of shape {shape_of(tensor)} (head dim {tensor.shape[-1]})"
        )


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """q (*batch, h, i, d), k (*batch, [hk,] j, d), v (*batch, [hk,] j, dv); merged q, k, v (b*h, n, d)."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, tensor)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{name}: expected a dtype of float16, bfloat16, float32 or float64, got {tensor.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(
            f"q, k, v: expected one dtype, got {q.dtype}, {k.dtype}, {v.dtype}; cast them, or use torch.autocast"
        )
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v: expected one device, got {q.device}, {k.device}, {v.device}")
    if q.ndim < 3:
        raise ValueError(f"q: expected (*batch, heads, n, d) or merged (batch * heads, n, d), got shape {shape_of(q)}")
    _check_kv_shapes(q, k, v)


def _check_kv_shapes(q: Tensor, k: Tensor, v: Tensor) -> None:
    def got() -> str:  # built only for an error: torch.compile cannot trace the text of a dynamic shape
        return f"got q {shape_of(q)}, k {shape_of(k)}, v {shape_of(v)}"

    if k.ndim != v.ndim or k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"k, v: expected the same shape up to the head dim, {got()}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q, k: expected the same head dim, {got()}")
    if q.shape[-1] == 0:
        raise ValueError(f"q, k: expected a head dim of at least 1, {got()}")
    if q.ndim == 3:
        if k.ndim != 3 or k.shape[0] != q.shape[0]:
            raise ValueError(f"merged q (batch * heads, n, d): expected k, v merged in the same way, {got()}")
        return
    batch = q.shape[:-3]
    if k.ndim not in (q.ndim, q.ndim - 1) or k.shape[: len(batch)] != batch:
        raise ValueError(
            f"k, v: expected (*batch, kv_heads, n, d), or (*batch, n, d) for a single head, "
            f"with the batch dims of q {tuple(batch)}, {got()}"
        )
    if k.ndim == q.ndim:
        heads, kv_heads = q.shape[-3], k.shape[-3]
        if heads != kv_heads and (kv_heads == 0 or heads % kv_heads != 0):
            raise ValueError(f"k, v: expected a number of kv heads that divides the {heads} query heads, {got()}")


def broadcasts_to(shape: Sequence[int], target: Sequence[int]) -> bool:
    """Whether `shape`, right-aligned, broadcasts to `target` without enlarging it."""
    if len(shape) > len(target):
        return False
    aligned = target[len(target) - len(shape) :]
    return all(size == 1 or size == full for size, full in zip(shape, aligned, strict=True))


def check_mask(mask: Tensor | None, q: Tensor, k: Tensor) -> None:
    """mask: bool, True = attend, broadcastable to (*batch, j)."""
    if mask is None:
        return
    _check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise TypeError(f"mask: expected torch.bool with True = attend, got {mask.dtype}; use mask.bool()")
    if mask.device != q.device:
        raise ValueError(f"mask: expected the device of q, {q.device}, got {mask.device}")
    target = (*batch_shape(q), k.shape[-2])
    if mask.ndim < 1 or not broadcasts_to(mask.shape, target):
        raise ValueError(
            f"mask: expected a shape that broadcasts to (*batch, keys) = {target}, got {shape_of(mask)}; "
            "a mask over (query, key) pairs goes into attn_bias, as 0 and -inf"
        )


def check_position_bias(bias: PositionBias, q: Tensor, k: Tensor) -> None:
    """Its leading dims broadcast to (*batch, h); with merged q they are (heads,), a divisor of batch * heads."""
    if bias.device != q.device:
        raise ValueError(f"attn_bias: expected the device of q, {q.device}, got {bias.device}")
    leading, batch = bias.leading, batch_shape(q)
    if q.ndim == 3:
        if len(leading) != 1 or (leading[0] != 1 and (leading[0] == 0 or batch[0] % leading[0] != 0)):
            raise ValueError(
                f"attn_bias: with merged q expected a {type(bias).__name__} of (heads,), with a number of heads that "
                f"divides batch * heads = {batch[0]}, got {leading}"
            )
    elif not leading or not broadcasts_to(leading, (*batch, num_heads(q))):
        raise ValueError(
            f"attn_bias: expected a {type(bias).__name__} of (heads,), or of dims that broadcast to (*batch, heads) = "
            f"{(*batch, num_heads(q))}, got {leading}"
        )
    bias.check_lengths(q.shape[-2], k.shape[-2])


def check_bias(bias: Tensor | PositionBias | None, q: Tensor, k: Tensor, batch_dim: bool) -> None:
    """attn_bias: (h, i, j); (b, i, j) with batch_dim or merged q; or broadcastable to (*batch, h, i, j) in 4+ dims; or
    a `PositionBias`."""
    if bias is None:
        return
    if isinstance(bias, PositionBias):
        return check_position_bias(bias, q, k)
    if not isinstance(bias, Tensor):
        raise TypeError(f"attn_bias: expected a torch.Tensor or a PositionBias, got {type(bias).__name__}")
    if bias.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"attn_bias: expected a dtype of float16, bfloat16, float32 or float64, got {bias.dtype}; "
            "a boolean mask over keys goes into mask"
        )
    if bias.device != q.device:
        raise ValueError(f"attn_bias: expected the device of q, {q.device}, got {bias.device}")
    batch, heads = batch_shape(q), num_heads(q)
    pairs = (q.shape[-2], k.shape[-2])
    if bias.ndim == 3:
        leading = batch if (batch_dim or q.ndim == 3) else (heads,)
        if len(leading) != 1:
            raise ValueError(
                f"attn_bias: expected a bias of {len(batch) + 3} dims for several batch dims {batch} with "
                f"attn_bias_batch_dim=True, got {shape_of(bias)}; add the missing dims of size 1"
            )
        if not broadcasts_to(bias.shape, (*leading, *pairs)):
            kind = "(batch, i, j)" if (batch_dim or q.ndim == 3) else "(heads, i, j)"
            raise ValueError(f"attn_bias: expected {kind} = {(*leading, *pairs)}, got {shape_of(bias)}")
    elif bias.ndim < 4 or not broadcasts_to(bias.shape, (*batch, heads, *pairs)):
        raise ValueError(
            f"attn_bias: expected 3 dims (heads, i, j), or 4 or more dims that broadcast to (*batch, heads, i, j) = "
            f"{(*batch, heads, *pairs)}, got {shape_of(bias)}"
        )


def check_scale(scale: float | Tensor, q: Tensor) -> None:
    """scale: a number, or a float tensor of one value or one per head."""
    if isinstance(scale, Tensor):
        if scale.dtype not in FLOAT_DTYPES:
            raise TypeError(f"scale: expected a tensor of a floating dtype, got {scale.dtype}")
        if scale.numel() not in (1, num_heads(q)):
            raise ValueError(
                f"scale: expected one value or one per head ({num_heads(q)} values), got shape {shape_of(scale)}"
            )
        if scale.device != q.device:
            raise ValueError(f"scale: expected the device of q, {q.device}, got {scale.device}")
    elif isinstance(scale, bool) or not isinstance(scale, (Real, torch.SymInt, torch.SymFloat)):
        raise TypeError(f"scale: expected a number or a tensor, got {type(scale).__name__}")
    elif not (float("-inf") < scale < float("inf")):
        raise ValueError(f"scale: expected a finite number, got {scale}")


def check_backend(backend: str | None) -> None:
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend: expected None or one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")


def check_unit_norm(q: Tensor, k: Tensor, groups: int) -> None:
    """The promise of l2norm_qk=False: every group of q and k has unit norm, up to the rounding of its dtype, or is 0.

    Rounding each component of a unit vector by at most eps/2 moves the norm by at most eps/2; a rotation in the same
    dtype in between may do so again, twice. Hence the slack of 4 eps, and 1e-5 for the norm's own arithmetic.
    """
    for name, tensor in (("q", q), ("k", k)):
        wide = tensor.detach()
        wide = wide if wide.element_size() >= 4 else wide.float()
        norm = wide.unflatten(-1, (groups, -1)).norm(dim=-1)
        slack = 4 * torch.finfo(tensor.dtype).eps + 1e-5
        wrong = ((norm - 1).abs() > slack) & (norm != 0)
        if bool(wrong.any()):
            worst = float(norm[wrong][(norm[wrong] - 1).abs().argmax()])
            raise ValueError(
                f"{name}: l2norm_qk=False expects unit l2 norm over each of {groups} group(s), within {slack:.2g}; "
                f"got a norm of {worst:.6g}; normalise with l2norm_tensors(q, k, groups={groups})"
            )


def batch_shape(q: Tensor) -> tuple[int, ...]:
    """*batch: for merged q (b*h, i, d) that is (b*h,)."""
    return tuple(q.shape[:1]) if q.ndim == 3 else tuple(q.shape[:-3])


def num_heads(q: Tensor) -> int:
    """h: 1 for merged q, whose heads are batch elements."""
    return 1 if q.ndim == 3 else q.shape[-3]


def validate(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    attn_bias: Tensor | PositionBias | None,
    scale: float | Tensor,
    groups: int,
    attn_bias_batch_dim: bool,
    backend: str | None,
) -> None:
    """Raise TypeError or ValueError unless the arguments fulfil the contract of `flash_cosine_sim_attention`."""
    check_backend(backend)
    check_qkv(q, k, v)
    check_groups(groups, q, name="q")
    check_mask(mask, q, k)
    check_bias(attn_bias, q, k, attn_bias_batch_dim)
    check_scale(scale, q)
