"""The per-model flag: opt-in, idempotent, reversible."""

from __future__ import annotations

import inspect

import pytest
from x_transformers.x_transformers import Attention, AttentionLayers
from xtransformers_cosine_sim import UnsupportedLayerError, counters, install_flag, uninstall_flag
from xtransformers_cosine_sim.counters import enabled_layers
from xtransformers_cosine_sim.testing import native_scale

NATIVE = {"attn_qk_norm": True, "attn_qk_norm_scale": native_scale(6.0)}


@pytest.fixture(autouse=True)
def _installed():
    install_flag()
    install_flag()
    yield
    uninstall_flag()
    uninstall_flag()


def test_a_flagged_model_runs_fused(language_model, ids):
    model = language_model(attn_use_cosine_sim_kernel=True, **NATIVE)
    model(ids)
    assert counters(model).fused == 2


@pytest.mark.parametrize("flag", [False, None])
def test_an_unflagged_model_is_untouched(language_model, flag):
    assert not enabled_layers(language_model(attn_use_cosine_sim_kernel=flag, **NATIVE))
    assert not enabled_layers(language_model(**NATIVE))


def test_options(language_model, ids):
    model = language_model(attn_use_cosine_sim_kernel={"mode": "convert", "scale": 5})
    model(ids)
    assert counters(model).fused == 2


@pytest.mark.skipif(
    "create_layer_kwargs_iter" not in inspect.getsource(AttentionLayers),
    reason="this x-transformers does not split tuples over layers",
)
def test_layers(language_model, ids):
    options = {"mode": "convert", "scale": 5, "strict": False}
    model = language_model(attn_use_cosine_sim_kernel=(False, options))
    model(ids)
    assert list(counters(model).layers) == ["attn_layers.layers.2.1"]
    assert counters(model).fused == 1


def test_refusals_and_wrong_flags(language_model):
    with pytest.raises(UnsupportedLayerError, match="attn_qk_norm=False"):
        language_model(attn_use_cosine_sim_kernel=True)
    with pytest.raises(TypeError, match="attn_use_cosine_sim_kernel: expected True, False or a dict"):
        language_model(attn_use_cosine_sim_kernel="yes", **NATIVE)


def test_uninstalled_the_keyword_is_unknown_again():
    uninstall_flag()
    with pytest.raises(TypeError, match="use_cosine_sim_kernel"):
        Attention(dim=32, use_cosine_sim_kernel=True)
