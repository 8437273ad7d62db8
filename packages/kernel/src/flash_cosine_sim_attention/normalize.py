"""The l2 norm of queries and keys, over the whole head dim or over contiguous groups of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .validation import check_groups

EPS = 1e-12
"""Smallest norm that is divided by, as in `torch.nn.functional.normalize`."""


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def keep_rows(x: Tensor, visible: Tensor) -> Tensor:
    """torch.where(visible, x, 0) for NaN and Inf too, not differentiable: a bitwise product is vectorised on a CPU.

    visible: bool, broadcastable to x.
    """
    integers = _INTEGERS[x.element_size()]
    return (x.view(integers) & -visible.to(integers)).view(x.dtype)


def l2norm(x: Tensor, groups: int = 1) -> Tensor:
    """x (..., d) -> x / |x|_2 over each of `groups` contiguous chunks of d, in the dtype of x.

    Half types are normalised in float32 and rounded once.
    """
    wide = x if x.element_size() >= 4 else x.float()
    chunks = wide.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    norm = chunks.norm(dim=-1, keepdim=True).clamp_min(EPS)
    return (chunks / norm).flatten(-2).to(x.dtype)


def l2norm_tensors(*tensors: Tensor, groups: int = 1) -> tuple[Tensor, ...]:
    """Normalise each tensor over its last dim, as `flash_cosine_sim_attention` does with queries and keys.

    Use it where something stands between norm and attention (rotary embeddings with a scale, say), and pass
    `l2norm_qk=False` to the attention then.

    Args:
        tensors: any number of tensors (..., d), float16, bfloat16, float32 or float64.
        groups: number of contiguous chunks of d that are normalised on their own (d % groups == 0).

    Returns:
        A tuple of tensors of the same shapes and dtypes, each chunk of unit l2 norm. The norm is taken in float32
        (float64 for float64) and is at least 1e-12 where it is divided by.

    Raises:
        TypeError: a tensor is not of a floating dtype, or groups is not an int.
        ValueError: groups does not divide d.
    """
    for index, tensor in enumerate(tensors):
        check_groups(groups, tensor, name=f"tensors[{index}]")
    return tuple(l2norm(tensor, groups) for tensor in tensors)
