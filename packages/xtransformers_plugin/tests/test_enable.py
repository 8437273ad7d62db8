"""Switching on and off: all layers or none, nothing left behind, every wrong argument named."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from x_transformers.attend import Attend
from x_transformers.x_transformers import Attention
from xtransformers_cosine_sim import (
    UnsupportedCallError,
    UnsupportedLayerError,
    counters,
    disable,
    enable,
    enabled,
)
from xtransformers_cosine_sim.attend import CosineSimAttend
from xtransformers_cosine_sim.testing import difference, native_scale, random_loss, run

NATIVE = {"attn_qk_norm": True, "attn_qk_norm_scale": native_scale(6.0)}
PATHS = ("attn_layers.layers.0.1", "attn_layers.layers.2.1")


def attends(model: nn.Module) -> list[Attend]:
    return [module.attend for module in model.modules() if isinstance(module, Attention)]


def snapshot(model: nn.Module) -> list[dict]:
    """All that a module holds, by name, to see whether something was left behind."""
    return [
        {name: dict(value) if isinstance(value, dict) else value for name, value in vars(module).items()}
        for module in model.modules()
    ]


def test_enable_returns_paths_and_disable_leaves_nothing_behind(language_model):
    model = language_model(**NATIVE)
    before = snapshot(model)
    keys = list(model.state_dict())
    assert enable(model) == PATHS
    assert all(type(attend) is CosineSimAttend and isinstance(attend, Attend) for attend in attends(model))
    assert list(model.state_dict()) == keys
    assert disable(model) == PATHS
    assert all(type(attend) is Attend for attend in attends(model))
    after = snapshot(model)
    for attributes in after:
        attributes["_non_persistent_buffers_set"] = set(attributes["_non_persistent_buffers_set"])
    assert after == before
    assert disable(model) == ()


def test_one_refused_layer_changes_no_layer(language_model):
    model = language_model(**NATIVE)
    attends(model)[1].softclamp_logits = True
    with pytest.raises(UnsupportedLayerError, match=r"layers\.2\.1: attn_softclamp_logits: logits go through tanh"):
        enable(model)
    assert all(type(attend) is Attend and not hasattr(attend, "cosine_sim") for attend in attends(model))


def test_all_refusals_are_listed_at_once(language_model):
    model = language_model(attn_softclamp_logits=True, attn_use_cope=True)
    with pytest.raises(UnsupportedLayerError) as raised:
        enable(model)
    found = {(refusal.layer, refusal.option) for refusal in raised.value.refusals}
    options = ("attn_qk_norm=False", "attn_softclamp_logits", "attn_use_cope")
    assert found == {(path, option) for path in PATHS for option in options}


def test_fallback_leaves_the_refused_layer_stock_and_serves_the_others(language_model, ids):
    model = language_model(**NATIVE)
    attends(model)[1].softclamp_logits = True
    stock = run(model, lambda m: random_loss(m, ids))
    assert enable(model, strict=False) == PATHS[:1]
    assert difference(run(model, lambda m: random_loss(m, ids)), stock).within(1e-5)
    counted = counters(model)
    assert (counted.fused, counted.stock) == (1, 1)
    assert counted.layers[PATHS[1]].reasons == {"attn_softclamp_logits: logits go through tanh": 1}


@pytest.mark.parametrize("layers", ["*.2.1", ("nothing", "*layers.2.*"), lambda path, attention: path == PATHS[1]])
def test_layers_chooses(language_model, layers):
    model = language_model(**NATIVE)
    assert enable(model, layers=layers) == PATHS[1:]
    assert [type(attend) for attend in attends(model)] == [Attend, CosineSimAttend]


def test_layers_that_match_nothing(language_model):
    with pytest.raises(ValueError, match=r"layers: 'decoder\.\*' matches none of attn_layers\.layers\.0\.1, "):
        enable(language_model(**NATIVE), layers="decoder.*")


def test_a_model_without_attention():
    with pytest.raises(ValueError, match=r"expected x_transformers Attention layers, found none in Linear"):
        enable(nn.Linear(2, 2))


def test_a_bare_attention(ids):
    attention = Attention(dim=32, heads=2, dim_head=16, qk_norm=True, softclamp_logits=True)
    with pytest.raises(UnsupportedLayerError, match=r"\(the module itself\): attn_softclamp_logits"):
        enable(attention)
    assert enable(Attention(dim=32, heads=2, dim_head=16, qk_norm=True)) == ("",)


def test_twice_is_an_error(language_model):
    model = language_model(**NATIVE)
    enable(model, layers="*.0.1")
    with pytest.raises(ValueError, match=r"already enabled, call disable\(model\) first: attn_layers\.layers\.0\.1"):
        enable(model)
    assert type(attends(model)[1]) is Attend


def test_the_context_manager_gives_back_what_it_took(language_model, ids):
    model = language_model(**NATIVE)
    enable(model, layers="*.0.1")

    def fail_inside() -> None:
        with enabled(model, layers="*.2.1"):
            assert [type(attend) for attend in attends(model)] == [CosineSimAttend] * 2
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert [type(attend) for attend in attends(model)] == [CosineSimAttend, Attend]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"mode": "fast"}, ValueError, "mode: expected 'accelerate' or 'convert', got 'fast'"),
        ({"scale": 8}, TypeError, "accelerate takes both from the model"),
        ({"groups": 2}, TypeError, "accelerate takes both from the model"),
        ({"mode": "convert"}, TypeError, "scale: mode='convert' needs it"),
        ({"mode": "convert", "scale": "8"}, TypeError, "scale: expected a finite number, got '8'"),
        ({"mode": "convert", "scale": float("inf")}, TypeError, "scale: expected a finite number, got inf"),
        ({"mode": "convert", "scale": torch.tensor(8)}, TypeError, "expected a tensor of a floating dtype"),
        ({"mode": "convert", "scale": torch.ones(3)}, ValueError, r"one per head, 4, got shape \(3,\)"),
        ({"mode": "convert", "scale": 8, "groups": 0}, TypeError, "groups: expected a positive int, got 0"),
        ({"mode": "convert", "scale": 8, "groups": True}, TypeError, "groups: expected a positive int, got True"),
        ({"mode": "convert", "scale": 8, "groups": 3}, ValueError, "groups: expected a divisor of the head dim 16"),
    ],
)
def test_arguments(language_model, options, error, message):
    model = language_model(**(NATIVE if options.get("mode") != "convert" else {}))
    with pytest.raises(error, match=message):
        enable(model, **options)
    assert all(type(attend) is Attend for attend in attends(model))


def test_groups_that_a_rotation_would_straddle(language_model):
    model = language_model(attn_dim_head=12, rotary_pos_emb=True, rotary_emb_dim=6)
    with pytest.raises(UnsupportedLayerError, match="rotary_pos_emb needs an even group size, got 12 / 4"):
        enable(model, mode="convert", scale=4, groups=4)
    enable(model, mode="convert", scale=4, groups=3)


def test_copies_are_enabled_and_independent(language_model, ids):
    model = language_model(**NATIVE)
    stock = run(model, lambda m: random_loss(m, ids))
    enable(model)
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    buffer = io.BytesIO()
    torch.save(model, buffer)
    copies.append(torch.load(io.BytesIO(buffer.getvalue()), weights_only=False))
    for other in copies:
        assert difference(run(other, lambda m: random_loss(m, ids)), stock).within(1e-5)
        assert counters(other).fused == 2
        assert disable(other) == PATHS
        assert difference(run(other, lambda m: random_loss(m, ids)), stock).within(0)
    assert counters(model).fused == 0


def test_state_dicts_move_between_enabled_and_stock(language_model):
    enabled_model, stock = language_model(**NATIVE), language_model(**NATIVE)
    enable(enabled_model)
    stock.load_state_dict(enabled_model.state_dict())
    enabled_model.load_state_dict(stock.state_dict())
    assert [name for name, _ in enabled_model.named_parameters()] == [name for name, _ in stock.named_parameters()]


def test_a_learned_scale_of_the_model_trains_and_is_copied_with_it(language_model, ids):
    model = language_model()
    model.temperature = nn.Parameter(torch.full((4,), 6.0))
    enable(model, mode="convert", scale=model.temperature)
    other = copy.deepcopy(model)
    expected = run(model, lambda m: random_loss(m, ids))
    assert "temperature" in expected.gradients
    assert difference(run(other, lambda m: random_loss(m, ids)), expected).within(0)


def test_errors_survive_pickling(language_model):
    model = language_model(attn_dropout=0.5, **NATIVE)
    enable(model)
    with pytest.raises(UnsupportedCallError) as raised:
        model(torch.zeros(1, 3, dtype=torch.long))
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)


def test_dropout_is_only_refused_while_it_is_active(language_model, ids):
    model = language_model(attn_dropout=0.5, **NATIVE)
    enable(model)
    with pytest.raises(UnsupportedCallError, match=r"layers\.0\.1: attn_dropout: active dropout"):
        model(ids)
    model.eval()(ids)
    assert counters(model).fused == 2
