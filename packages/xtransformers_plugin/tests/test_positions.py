"""positions.py: the bias of each module is the module's own, and where it is served no (h, i, j) tensor is made."""

from __future__ import annotations

import pytest
import torch
from x_transformers import Decoder, Encoder
from x_transformers.x_transformers import AlibiPositionalBias, DynamicPositionBias, RelativePositionBias
from xtransformers_cosine_sim import counters, enable, enabled, positions
from xtransformers_cosine_sim.testing import difference, native_scale, random_loss, run

MODULES = {
    "alibi": lambda: AlibiPositionalBias(heads=6),
    "alibi of some heads": lambda: AlibiPositionalBias(heads=3, total_heads=6),
    "t5": lambda: RelativePositionBias(scale=4.0, heads=6),
    "t5 causal": lambda: RelativePositionBias(scale=0.5, causal=True, heads=6, num_buckets=8, max_distance=30),
    "dynamic": lambda: DynamicPositionBias(dim=8, heads=6, depth=2),
    "dynamic of logarithms": lambda: DynamicPositionBias(dim=8, heads=6, depth=1, log_distance=True, norm=True),
}
OPTIONS = [{"alibi_pos_bias": True}, {"rel_pos_bias": True}, {"dynamic_pos_bias": True}]
QK_NORM = {"attn_qk_norm": True, "attn_qk_norm_scale": native_scale(6.0)}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (300, 300), (7, 90)])
def test_the_bias_of_each_module(name, queries, keys):
    try:
        module = MODULES[name]()
        expected = module(queries, keys)
    except (AttributeError, TypeError) as error:
        pytest.skip(f"this x-transformers has no such module: {error}")
    bias = positions.descriptor(module, keys).materialize(queries, keys)
    torch.testing.assert_close(bias, expected, rtol=0, atol=1e-6)
    parameters = [p for p in module.parameters() if p.requires_grad]
    if parameters:
        upstream = torch.randn_like(expected)
        gradients = [torch.autograd.grad(x, parameters, upstream) for x in (bias, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-4)


def refuse(monkeypatch, model) -> None:
    """Whoever asks the model's position module for its (h, i, j) tensor fails."""

    def fail(*_):
        raise AssertionError("an (h, i, j) tensor was made")

    monkeypatch.setattr(model.attn_layers.rel_pos, "forward", fail)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("heads", [{}, {"attn_kv_heads": 2}, {"attn_one_kv_head": True}], ids=str)
@pytest.mark.parametrize("stack", [Decoder, Encoder])
def test_served_without_a_tensor_of_pairs(options, heads, stack, language_model, ids, monkeypatch):
    model = language_model(stack, **QK_NORM, **options, **heads)
    mask = torch.arange(21) < torch.tensor([[21], [13]])

    def call(m):
        return random_loss(m, ids, mask=mask, rows=mask)

    stock = run(model, call)
    with enabled(model, strict=True):
        refuse(monkeypatch, model)
        found = difference(run(model, call), stock)
    assert found.within(1e-5), found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(
    "more", [{"attn_num_mem_kv": 2}, {"attn_max_attend_past": 5}, {"attn_add_zero_kv": True}], ids=str
)
def test_with_its_tensor_where_more_joins_the_bias(options, more, language_model, ids):
    model = language_model(**QK_NORM, **options, **more)
    stock = run(model, lambda m: random_loss(m, ids))
    with enabled(model, strict=True):
        found = difference(run(model, lambda m: random_loss(m, ids)), stock)
    assert found.within(1e-5), found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_call_that_runs_stock_gets_its_bias(options, language_model, ids):
    model = language_model(**QK_NORM, attn_dropout=0.3, **options)
    torch.manual_seed(3)
    stock = run(model, lambda m: random_loss(m, ids))
    with enabled(model, strict=False):
        torch.manual_seed(3)
        found = difference(run(model, lambda m: random_loss(m, ids)), stock)
        assert counters(model).fused == 0
    assert found.within(1e-6), found


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_scale_of_each_head_beside_grouped_kv_heads(options, language_model, ids, monkeypatch):
    """Heads are regrouped with their scales and their positions, as those of a dense bias are."""
    model = language_model(**options, attn_kv_heads=2)
    enable(model, mode="convert", scale=torch.tensor([3.0, 4.0, 5.0, 6.0]))
    with monkeypatch.context() as patch:
        patch.setattr(positions, "takes_out", lambda *_: False)
        dense = run(model, lambda m: random_loss(m, ids))
    refuse(monkeypatch, model)
    found = difference(run(model, lambda m: random_loss(m, ids)), dense)
    assert found.within(1e-5), found
