"""The canonical form: two batch dims, views, and the bias shared where it can be."""

from __future__ import annotations

import pytest
import torch
from flash_cosine_sim_attention.problem import canonicalize, restore


def canonical(q_shape, bias_shape=None, k_shape=None, mask_shape=None, batch_dim=False):
    q = torch.randn(*q_shape)
    k = torch.randn(*(k_shape or q_shape))
    bias = None if bias_shape is None else torch.randn(*bias_shape)
    mask = None if mask_shape is None else torch.ones(*mask_shape).bool()
    return (q, *canonicalize(q, k, k, mask, bias, 8, batch_dim))


@pytest.mark.parametrize(
    ("q_shape", "expected"),
    [
        ((6, 5, 8), (6, 1, 1, 5, 8)),
        ((2, 3, 5, 8), (2, 1, 3, 5, 8)),
        ((2, 4, 3, 5, 8), (2, 4, 3, 5, 8)),
        ((2, 4, 6, 3, 5, 8), (48, 1, 3, 5, 8)),
    ],
)
def test_queries_get_two_batch_dims(q_shape, expected):
    caller, q, *_ = canonical(q_shape)
    assert q.shape == expected
    assert q.data_ptr() == caller.data_ptr()
    assert restore(q, caller).shape == q_shape
    assert restore(q[..., 0], caller).shape == q_shape[:-1]


@pytest.mark.parametrize(
    ("q_shape", "bias_shape", "batch_dim", "expected"),
    [
        ((2, 3, 5, 8), (3, 5, 5), False, (1, 1, 3, 5, 5)),
        ((2, 3, 5, 8), (2, 5, 5), True, (2, 1, 1, 5, 5)),
        ((2, 3, 5, 8), (1, 5, 5), False, (1, 1, 1, 5, 5)),
        ((6, 5, 8), (6, 5, 5), False, (6, 1, 1, 5, 5)),
        ((2, 3, 5, 8), (2, 1, 1, 5), False, (2, 1, 1, 1, 5)),
        ((2, 4, 3, 5, 8), (2, 1, 3, 5, 5), False, (2, 1, 3, 5, 5)),
        ((2, 4, 3, 5, 8), (4, 3, 5, 5), False, (1, 4, 3, 5, 5)),
        ((2, 4, 6, 3, 5, 8), (2, 4, 1, 3, 5, 5), False, (8, 1, 3, 5, 5)),
        ((2, 4, 6, 3, 5, 8), (2, 1, 1, 3, 5, 5), False, (2, 1, 3, 5, 5)),
        ((2, 4, 6, 3, 5, 8), (6, 3, 5, 5), False, (1, 6, 3, 5, 5)),
        ((2, 4, 6, 3, 5, 8), (2, 1, 6, 3, 5, 5), False, (48, 1, 3, 5, 5)),  # mixed: expanded over the batch
    ],
)
def test_bias_keeps_what_it_shares(q_shape, bias_shape, batch_dim, expected):
    _, q, _, _, _, bias, _, _ = canonical(q_shape, bias_shape, batch_dim=batch_dim)
    assert bias.shape == expected
    assert all(size in (1, full) for size, full in zip(bias.shape, (*q.shape[:4], q.shape[3]), strict=True))


@pytest.mark.parametrize("mask_shape", [(5,), (1, 5), (2, 5), (2, 1)])
def test_mask_covers_all_keys(mask_shape):
    *_, mask, _, _, _ = canonical((2, 3, 5, 8), mask_shape=mask_shape)
    assert mask.shape in ((2, 1, 5), (1, 1, 5))


def test_single_head_keys():
    _, _, k, v, *_ = canonical((2, 3, 5, 8), k_shape=(2, 7, 8))
    assert k.shape == v.shape == (2, 1, 1, 7, 8)


def test_learned_scale_becomes_one_value_a_head():
    q = torch.randn(2, 3, 5, 8)
    scale = torch.tensor(8.0, dtype=torch.bfloat16, requires_grad=True)
    *_, tensor, value = canonicalize(q, q, q, None, None, scale, False)
    assert (tensor.shape, tensor.dtype, value) == ((3,), torch.float32, 0.0)
    tensor.sum().backward()
    assert scale.grad == 3
