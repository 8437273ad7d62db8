"""l2norm_tensors: unit norm per group, in each tensor's own dtype."""

from __future__ import annotations

import pytest
import torch
from flash_cosine_sim_attention import l2norm_tensors


@pytest.mark.parametrize("groups", [1, 2, 16])
def test_each_group_has_unit_norm(groups):
    (x,) = l2norm_tensors(torch.randn(3, 5, 16) * 100, groups=groups)
    torch.testing.assert_close(x.unflatten(-1, (groups, -1)).norm(dim=-1), torch.ones(3, 5, groups))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_matches_float64_to_one_rounding(dtype):
    x = torch.randn(64, 32).to(dtype)
    (got,) = l2norm_tensors(x)
    exact = torch.nn.functional.normalize(x.double(), dim=-1)
    assert got.dtype == dtype
    limit = torch.finfo(dtype).eps / 2 + (0 if dtype in (torch.float16, torch.bfloat16) else 4 * torch.finfo(dtype).eps)
    assert float((got.double() - exact).abs().max()) <= limit * 1.01


def test_several_tensors_keep_their_dtypes_and_shapes():
    a, b = l2norm_tensors(torch.randn(2, 8), torch.randn(3, 4, 16).half(), groups=4)
    assert (a.dtype, a.shape, b.dtype, b.shape) == (torch.float32, (2, 8), torch.float16, (3, 4, 16))
    assert isinstance(l2norm_tensors(torch.randn(2, 8)), tuple)


def test_half_inputs_beyond_the_range_of_their_squares():
    x = torch.full((1, 64), 3e4).half()
    torch.testing.assert_close(l2norm_tensors(x)[0], torch.full((1, 64), 0.125).half())


def test_zero_vectors_stay_zero():
    assert torch.equal(l2norm_tensors(torch.zeros(2, 8))[0], torch.zeros(2, 8))


def test_gradient():
    x = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: l2norm_tensors(x, groups=2)[0], x)
