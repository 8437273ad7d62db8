"""Tensors in the form that the CUDA kernels take, and their results back in the caller's.

The form of a (b0, b1, heads, n, d) tensor: d a multiple of 8 (`width`, one for q, k and v), the last dim contiguous,
rows on 16-byte boundaries; any strides otherwise. What has it already is passed on as it is; else one copy is made.
Zeros fill a head dim up: they change neither norms nor products, and what comes back for them is dropped.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kernel_width(head_dim: int, value_head_dim: int, groups: int) -> int:
    """The head dim that the kernel sees: a multiple of 8 with equal groups, and room for v."""
    width = head_dim
    while width % 8 != 0 or width < value_head_dim:
        width += groups
    return width


def has_rows(x: Tensor) -> bool:
    """Whether the last dim is contiguous and rows, each of its own, start on 16-byte boundaries."""
    strides, per_chunk = x.stride(), 16 // x.element_size()
    if x.data_ptr() % 16 or strides[4] != 1 or (strides[3] == 0 and x.shape[3] > 1):
        return False
    if not (strides[0] | strides[1] | strides[2] | strides[3]) % per_chunk:
        return True
    return all(stride % per_chunk == 0 for stride, size in zip(strides[:4], x.shape[:4], strict=True) if size > 1)


def readable(x: Tensor, groups: int, width: int) -> Tensor:
    """x (b0, b1, heads, n, d) -> (b0, b1, heads, n, width), zeros behind each of the `groups` chunks."""
    if x.shape[-1] == width:
        return x if has_rows(x) else x.clone(memory_format=torch.contiguous_format)
    missing = width - x.shape[-1]
    if groups == 1:
        return F.pad(x, (0, missing))
    return F.pad(x.unflatten(-1, (groups, -1)), (0, missing // groups)).flatten(-2)


def writable(target: Tensor, width: int) -> Tensor:
    """The target itself where a kernel can write it, else a tensor to write, for `write_back`."""
    if target.shape[-1] == width and has_rows(target):
        return target
    return workspace(target, (*target.shape[:-1], width), target.dtype)


def write_back(source: Tensor | None, target: Tensor | None, groups: int = 1) -> None:
    """Undoes `writable`: the chunks of `source` (..., width) without their zeros -> target (..., d)."""
    if target is None or source is None or source is target:
        return
    if source.shape == target.shape:
        target.copy_(source)
    else:
        chunks = source.unflatten(-1, (groups, -1))[..., : target.shape[-1] // groups]
        target.copy_(chunks.reshape(target.shape))


def workspace(like: Tensor, shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Tensor:
    """Memory that a kernel fills before it reads it. All workspaces come from here, so that tests can poison them."""
    return like.new_empty(shape, dtype=dtype)


def kernel_bias(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A bias in the dtype of q or in float32, which holds every other dtype that kernels know of."""
    if bias is None or bias.dtype in (dtype, torch.float32):
        return bias
    return bias.to(torch.float32)


def has_bias_rows(bias: Tensor, keys: int) -> bool:
    """Whether TMA reads a bias (..., i | 1, j | 1) as it is: all keys, contiguous, and rows on 16-byte boundaries."""
    per_chunk = 16 // bias.element_size()
    if bias.shape[-1] != keys or (keys > 1 and bias.stride(-1) != 1) or bias.data_ptr() % 16:
        return False
    return all(stride % per_chunk == 0 for stride, n in zip(bias.stride()[:-1], bias.shape[:-1], strict=True) if n > 1)


def bias_with_rows(bias: Tensor, keys: int) -> Tensor:
    """A bias that TMA reads: itself, or a copy whose rows are filled up to 16 bytes."""
    if has_bias_rows(bias, keys):
        return bias
    per_row = 16 // bias.element_size()
    rows = workspace(bias, (*bias.shape[:-1], -(-keys // per_row) * per_row), bias.dtype)
    return rows[..., :keys].copy_(bias)


def writable_bias_gradient(bias: Tensor | None, gradient: Tensor | None) -> Tensor | None:
    """The kernels write the gradient in the dtype of the bias that they read."""
    if bias is None or gradient is None or gradient.dtype == bias.dtype:
        return gradient
    return workspace(gradient, gradient.shape, bias.dtype)
