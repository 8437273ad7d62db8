"""Matrices that are constant along each diagonal, by their diagonals: T_ab = diagonals[r - 1 + b - a], for T (r, c).

(r, c) has r + c - 1 diagonals, numbered from the bottom left corner to the top right one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def toeplitz_matrix(diagonals: Tensor, columns: int) -> Tensor:
    """diagonals (..., r + c - 1) -> the matrix (..., r, c)."""
    return diagonals.unfold(-1, columns, 1).flip(-2)


def diagonal_sums(matrix: Tensor) -> Tensor:
    """matrix (..., r, c) -> sums over its diagonals (..., r + c - 1): the adjoint of `toeplitz_matrix`.

    By plain sums in a fixed order, without atomics, in some three times the memory of the matrix.
    """
    rows, columns = matrix.shape[-2:]
    if rows <= columns:
        return _skewed_sum(matrix)
    sums = matrix.new_zeros(*matrix.shape[:-2], rows + columns - 1)
    for start in range(
        0, rows, columns
    ):  # square blocks: the skewed copy of a tall matrix would be much larger than it
        block = matrix[..., start : start + columns, :]
        first = rows - start - block.shape[-2]
        sums[..., first : first + block.shape[-2] + columns - 1] += _skewed_sum(block)
    return sums


def _skewed_sum(matrix: Tensor) -> Tensor:
    """The matrix with row a moved r - 1 - a columns to the right has its diagonals as columns.

    In memory that is a row length shorter by one than that of the sum.
    """
    rows, columns = matrix.shape[-2:]
    width = rows + columns - 1
    skewed = matrix.new_zeros(*matrix.shape[:-2], rows, width)
    strides = (*skewed.stride()[:-2], width - 1, 1)
    torch.as_strided(skewed, matrix.shape, strides, rows - 1).copy_(matrix)
    return skewed.sum(-2)
