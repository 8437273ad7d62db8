"""One layer at the seam: head order, masks, biases, the causal rules and dtypes against the definition in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from x_transformers.attend import Attend
from x_transformers.x_transformers import Attention
from xtransformers_cosine_sim import AttentionMapsError, counters, enable

GENERATOR = torch.Generator().manual_seed(3)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=GENERATOR)


def fused_attend(scale: float | Tensor = 6.0, causal: bool = False, **options: object) -> Attend:
    attention = Attention(dim=32, heads=4, dim_head=8, causal=causal, **options)
    enable(attention, mode="convert", scale=scale)
    return attention.attend


def definition(q, k, v, scale, visible=None, bias=None) -> Tensor:
    """float64; query head a reads kv head a % kvh, as x-transformers tiles them; rows that see nothing are 0."""
    q, k, v = q.double(), k.double(), v.double()
    k, v = (x.repeat(1, q.shape[1] // x.shape[1], 1, 1) for x in (k, v))
    scores = scale * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
    scores = scores if bias is None else scores + bias
    scores = scores if visible is None else scores.masked_fill(~visible, float("-inf"))
    return scores.softmax(-1).nan_to_num() @ v


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("bias_shape", [None, (9, 13), (4, 9, 13), (2, 4, 9, 13), (2, 1, 9, 13), (1, 4, 1, 13)])
@pytest.mark.parametrize("mask_shape", [None, (2, 13), (2, 1, 1, 13), (2, 1, 9, 13), (1, 4, 9, 13), (2, 4, 1, 13)])
def test_shapes(kv_heads, bias_shape, mask_shape):
    q, k, v = random(2, 4, 9, 8), random(2, kv_heads, 13, 8), random(2, kv_heads, 13, 5)
    bias = None if bias_shape is None else random(*bias_shape)
    mask = None if mask_shape is None else torch.rand(*mask_shape, generator=GENERATOR) < 0.7
    visible = mask[:, None, None] if mask is not None and mask.ndim == 2 else mask
    out, _ = fused_attend()(q, k, v, mask=mask, attn_bias=bias)
    torch.testing.assert_close(out.double(), definition(q, k, v, 6.0, visible, bias), atol=2e-6, rtol=0)


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (5, 13), (1, 13)])
@pytest.mark.parametrize(("own", "given", "effective"), [(True, None, 1), (True, False, 0), (False, True, 1)])
def test_causal_is_aligned_right_and_the_call_decides(queries, keys, own, given, effective):
    q, k, v = random(2, 4, queries, 8), random(2, 2, keys, 8), random(2, 2, keys, 8)
    mask = torch.rand(2, 1, 1, keys, generator=GENERATOR) < 0.7
    visible = mask & torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries) if effective else mask
    out, _ = fused_attend(causal=own)(q, k, v, mask=mask, causal=given)
    torch.testing.assert_close(out.double(), definition(q, k, v, 6.0, visible), atol=2e-6, rtol=0)


def test_one_query_sees_everything_even_before_the_last_key():
    q, k, v = random(1, 4, 1, 8), random(1, 4, 0, 8), random(1, 4, 0, 8)
    out, _ = fused_attend(causal=True)(q, k, v)
    assert torch.equal(out, torch.zeros(1, 4, 1, 8))


def test_fully_masked_rows_are_zero_with_zero_gradients():
    tensors = [random(2, 4, 6, 8).requires_grad_() for _ in range(3)]
    mask = torch.zeros(2, 1, 6, 6, dtype=torch.bool)
    mask[0] = True
    out, _ = fused_attend(causal=True)(*tensors, mask=mask)
    assert torch.equal(out[1], torch.zeros(4, 6, 8))
    out.sum().backward()
    for tensor in tensors:
        assert torch.isfinite(tensor.grad).all()
        assert torch.equal(tensor.grad[1], torch.zeros(4, 6, 8))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_learned_scale_gets_its_gradient(kv_heads, per_head, with_bias):
    scale = (torch.rand(4 if per_head else 1, generator=GENERATOR) * 8).requires_grad_()
    q, k, v = random(2, 4, 7, 8), random(2, kv_heads, 9, 8), random(2, kv_heads, 9, 8)
    bias, upstream = random(4, 7, 9) if with_bias else None, random(2, 4, 7, 8)
    mask = torch.rand(2, 1, 1, 9, generator=GENERATOR) < 0.7
    out, _ = fused_attend(scale)(q, k, v, mask=mask, attn_bias=bias)
    expected = definition(q, k, v, scale.double().reshape(-1, 1, 1), mask, bias)
    torch.testing.assert_close(out.double(), expected, atol=4e-6, rtol=0)
    (found,) = torch.autograd.grad((out * upstream).sum(), scale)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), scale)
    torch.testing.assert_close(found, wanted, atol=2e-5, rtol=1e-5)


def test_a_learned_scale_on_the_stock_path_of_a_converted_model():
    scale = torch.tensor([1.0, 3.0, 5.0, 7.0])
    attention = Attention(dim=32, heads=4, dim_head=8, dropout=0.5)
    enable(attention, mode="convert", scale=scale, strict=False)
    attention.attend.attn_dropout.p = 0.0  # attend.dropout alone still counts as active
    q, k, v = random(2, 4, 7, 8), random(2, 4, 7, 8), random(2, 4, 7, 8)
    out, _ = attention.attend(q, k, v)
    torch.testing.assert_close(out.double(), definition(q, k, v, scale.reshape(-1, 1, 1)), atol=4e-6, rtol=0)
    assert counters(attention).stock == 1


def test_an_integer_bias_and_the_padded_zero_key():
    q, k, v = random(2, 4, 7, 8), random(2, 2, 7, 8), random(2, 2, 7, 8)
    bias = torch.randint(-3, 3, (4, 7, 7), generator=GENERATOR)
    out, _ = fused_attend(add_zero_kv=True)(q, k, v, attn_bias=bias)
    expected = definition(q, F.pad(k, (0, 0, 1, 0)), F.pad(v, (0, 0, 1, 0)), 6.0, bias=F.pad(bias, (1, 0)))
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=0)


def test_autocast_and_mixed_dtypes_give_one_dtype():
    q, k, v = random(2, 4, 7, 8), random(2, 2, 7, 8), random(2, 2, 7, 8)
    attend = fused_attend()
    expected = definition(q, k, v, 6.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast, _ = attend(q, k, v.bfloat16())
    mixed, _ = attend(q, k, v.bfloat16())
    for out in (under_autocast, mixed):
        assert out.dtype == torch.bfloat16
        torch.testing.assert_close(out.double(), expected, atol=0.03, rtol=0)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 10.0), (torch.float64, 1e-3), (torch.float16, 0.5)])
def test_large_logits_without_a_bound(dtype, scale):
    """rms norms and learned factors carry |q| far from 1: exp must not overflow, and no bit is lost on the way."""
    torch.manual_seed(0)
    attention = Attention(dim=32, heads=2, dim_head=16, qk_norm=True, qk_norm_scale=scale, qk_rmsnorm=True).to(dtype)
    attention.q_rmsnorm.gamma.data.fill_(20.0)
    x = random(2, 9, 32).to(dtype)
    exact = copy.deepcopy(attention).double()(x.double())
    stock_error = (attention(x) - exact).abs().max()
    enable(attention)
    assert (attention(x) - exact).abs().max() <= 2 * stock_error + 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", ["qk_similarities", "pre_softmax_attn", "post_softmax_attn"])
def test_reading_a_map_is_a_named_error(name):
    attention = Attention(dim=32, heads=2, dim_head=16, qk_norm=True)
    enable(attention)
    _, intermediates = attention(random(1, 5, 32), return_intermediates=True)
    assert intermediates.cached_kv is not None
    assert "cached_kv" in repr(intermediates)
    assert intermediates in {intermediates}
    assert copy.copy(intermediates).cached_kv is intermediates.cached_kv
    with pytest.raises(AttentionMapsError, match=rf"{name}: a fused pass makes no \(queries x keys\) matrix"):
        getattr(intermediates, name)


@pytest.mark.parametrize("request_maps", [{"return_attn": True}, {"return_attn_z_loss": True}])
def test_a_model_asked_for_maps_names_the_layer(request_maps, language_model, ids):
    model = language_model(attn_qk_norm=True, attn_qk_norm_scale=6.0)
    enable(model)
    with pytest.raises(AttentionMapsError, match=r"attn_layers\.layers\.0\.1: (pre|post)_softmax_attn"):
        model(ids, **request_maps)
