"""toeplitz.py against loops over the entries."""

from __future__ import annotations

import pytest
import torch
from flash_cosine_sim_attention.toeplitz import diagonal_sums, toeplitz_matrix

SHAPES = [(1, 1), (1, 7), (7, 1), (4, 4), (3, 8), (8, 3), (17, 4), (16, 4)]


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_matrix(rows, columns):
    diagonals = torch.randn(2, 3, rows + columns - 1)
    matrix = toeplitz_matrix(diagonals, columns)
    assert matrix.shape == (2, 3, rows, columns)
    for a in range(rows):
        for b in range(columns):
            assert torch.equal(matrix[..., a, b], diagonals[..., rows - 1 + b - a])


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_diagonal_sums_are_the_adjoint(rows, columns):
    diagonals = torch.randn(2, 3, rows + columns - 1, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 3, rows, columns, dtype=torch.float64)
    (expected,) = torch.autograd.grad(toeplitz_matrix(diagonals, columns), diagonals, upstream)
    torch.testing.assert_close(diagonal_sums(upstream), expected)
    torch.testing.assert_close(diagonal_sums(upstream.mT.contiguous().mT), expected)
