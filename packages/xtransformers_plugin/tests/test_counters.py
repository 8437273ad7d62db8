"""Counters: eager, compiled, in fallback, from several threads."""

from __future__ import annotations

import threading

import pytest
import torch
from xtransformers_cosine_sim import UnsupportedCallError, counters, disable, enable, reset
from xtransformers_cosine_sim.testing import difference, native_scale, random_loss, run

NATIVE = {"attn_qk_norm": True, "attn_qk_norm_scale": native_scale(6.0)}


def test_counts_per_layer_and_in_all(language_model, ids):
    model = language_model(**NATIVE)
    assert counters(model).layers == {}
    enable(model)
    for _ in range(3):
        model(ids)
    counted = counters(model)
    assert (counted.fused, counted.stock) == (6, 0)
    assert [layer.fused for layer in counted.layers.values()] == [3, 3]
    assert str(counted).splitlines()[:2] == ["fused 6, stock 0", "  attn_layers.layers.0.1: fused 3, stock 0"]
    reset(model)
    assert counters(model).fused == 0


def test_fallback_counts_each_reason(language_model, ids):
    model = language_model(attn_dropout=0.1, **NATIVE)
    enable(model, strict=False)
    model(ids)
    model.eval()(ids)
    counted = counters(model)
    assert (counted.fused, counted.stock) == (2, 2)
    assert "1 x attn_dropout: active dropout of attention weights" in str(counted)


@pytest.mark.parametrize(
    ("options", "dynamic"),
    [({"rotary_pos_emb": True}, False), ({"rel_pos_bias": True, "attn_kv_heads": 2}, False), ({}, True)],
    ids=str,
)
def test_compiled_whole_and_counted(options, dynamic, language_model, ids):
    model = language_model(**NATIVE, **options)
    stock = run(model, lambda m: random_loss(m, ids))
    enable(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for _ in range(2):
        assert difference(run(model, lambda _: random_loss(compiled, ids)), stock).within(1e-5)
    counted = counters(model)
    assert (counted.fused, counted.stock) == (4, 0)


def test_enabled_after_it_was_compiled(language_model, ids):
    """The class of `attend` is a guard of the graph: no stale stock graph, and none left after disable."""
    model = language_model(**NATIVE)
    compiled = torch.compile(model, backend="eager")
    compiled(ids)
    enable(compiled)
    compiled(ids)
    assert (counters(compiled).fused, counters(compiled).stock) == (2, 0)
    disable(compiled)
    _, maps = compiled(ids, return_attn=True)
    assert len(maps) == 2


def test_compiled_fallback_is_counted_as_stock(language_model, ids):
    model = language_model(attn_softclamp_logits=True, **NATIVE)
    enable(model, strict=False)
    torch.compile(model, backend="eager")(ids)
    counted = counters(model)
    assert (counted.fused, counted.stock) == (0, 2)


def test_a_refused_call_in_one_thread_does_not_reach_another(language_model, ids):
    """The reason for stock travels from Attention to Attend per thread."""
    model = language_model(**NATIVE)
    attention = model.attn_layers.layers[0][1]
    enable(attention, strict=False)
    x, extra = torch.randn(1, 5, 32), (torch.randn(1, 4, 2, 16), torch.randn(1, 4, 2, 16))
    expected = {False: attention(x), True: attention(x, additional_key_values=extra)}
    wrong = []

    def work(with_extra: bool) -> None:
        for _ in range(20):
            out = attention(x, additional_key_values=extra) if with_extra else attention(x)
            if not torch.equal(out, expected[with_extra]):
                wrong.append(with_extra)

    threads = [threading.Thread(target=work, args=(with_extra,)) for with_extra in (False, True, False, True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_keys_from_outside_are_refused_by_position_too(language_model):
    attention = language_model(**NATIVE).attn_layers.layers[0][1]
    enable(attention)
    names = ("x", "context", "mask", "context_mask", "attn_mask", "rel_pos", "attn_bias", "rotary_pos_emb")
    angles = torch.randn(1, 5, 16)
    arguments = [torch.randn(1, 5, 32), *[None] * (len(names) - 2), (angles, angles.abs() + 1)]
    with pytest.raises(UnsupportedCallError, match="rotary_pos_emb with an xpos scale"):
        attention(*arguments)
