"""Whole models, plugin on and off, same weights: loss and every gradient within 1e-5 in float32."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from x_transformers import AutoregressiveWrapper, Decoder, Encoder, PrefixDecoder, XTransformer
from x_transformers.x_transformers import Attention
from xtransformers_cosine_sim import arguments, counters, disable, enable, enabled, seam
from xtransformers_cosine_sim.testing import difference, native_scale, random_loss, run

TOLERANCE = 1e-5
POSITIONS = [{}, {"rotary_pos_emb": True}, {"alibi_pos_bias": True}, {"rel_pos_bias": True}, {"dynamic_pos_bias": True}]
HEADS = [{}, {"attn_kv_heads": 2}, {"attn_one_kv_head": True}]
EXTRAS = [{}, {"attn_num_mem_kv": 2, "attn_qk_norm_groups": 2}]


def native(scale: float = 6.0, **options: object) -> dict[str, object]:
    """Options of a native qk-norm model whose logits are scale * cosine."""
    return {"attn_qk_norm": True, "attn_qk_norm_scale": native_scale(scale)} | options


def check(model: nn.Module, call, **options: object) -> None:
    """Parity of the enabled model with itself, with all calls fused."""
    stock = run(model, call)
    with enabled(model, **options):
        found = difference(run(model, call), stock)
        counted = counters(model)
    assert found.within(TOLERANCE), found
    assert counted.stock == 0
    assert counted.fused >= len(counted.layers) > 0


@pytest.mark.parametrize("options", [a | b | c for a, b, c in itertools.product(POSITIONS, HEADS, EXTRAS)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
def test_positions_heads_memories_and_key_masks(options, causal, language_model, ids):
    model = language_model(Decoder if causal else Encoder, **native(**options))
    mask = torch.arange(21) < torch.tensor([[21], [13]])
    check(model, lambda m: random_loss(m, ids, mask=mask, rows=mask))


@pytest.mark.parametrize("options", [a | b for a, b in itertools.product(POSITIONS, [*HEADS, *EXTRAS[1:]])], ids=str)
def test_the_norm_may_stay_with_the_model(options, language_model, ids):
    check(language_model(**native(**options)), lambda m: random_loss(m, ids), fuse_norm=False)


@pytest.mark.parametrize(
    ("options", "enable_options"),
    [
        ({"attn_qk_norm_groups": 4, "attn_dim_head": 12, "rotary_pos_emb": True, "rotary_emb_dim": 12}, {}),
        ({"attn_qk_norm_dim_scale": True}, {}),
        ({"attn_qk_rmsnorm": True}, {}),
        ({}, {"strict": False}),  # a refused call runs stock, which needs the norm
    ],
    ids=str,
)
def test_the_norm_stays_with_the_model_where_it_must(options, enable_options, language_model, ids):
    model = language_model(**native(**options))
    enable(model, **enable_options)
    assert all(module.qk_norm for module in model.modules() if isinstance(module, Attention))
    disable(model)
    check(model, lambda m: random_loss(m, ids), **enable_options)


SURROUNDINGS = [
    {"pre_norm": False, "scale_residual": True},  # DeepNet's placement
    {"use_rmsnorm": True, "macaron": True},
    {"gate_residual": True, "use_layerscale": True, "shift_tokens": 1},
    {"weight_tie_layers": True},
    {"integrate_layers": True},
    {"num_residual_streams": 2},
    {"rotary_pos_emb": True, "rotary_emb_dim": 8},
    {"rotary_pos_emb": True, "rotate_num_heads": 2},
]


@pytest.mark.parametrize("options", SURROUNDINGS, ids=str)
def test_what_surrounds_attention_makes_no_difference(options, language_model, ids):
    try:
        model = language_model(**native(**options))
    except AssertionError as error:
        pytest.skip(f"this x-transformers has no such option: {error}")
    check(model, lambda m: random_loss(m, ids))


@pytest.mark.parametrize("options", POSITIONS[:3], ids=str)  # stock flash takes no learned bias
def test_stock_flash_agrees_where_it_serves(options, language_model, ids):
    check(language_model(**native(attn_flash=True, attn_kv_heads=2, **options)), lambda m: random_loss(m, ids))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_encoder_decoder(kv_heads):
    torch.manual_seed(0)
    stack = {"depth": 1, "heads": 4, "num_tokens": 40, "max_seq_len": 32, "attn_dim_head": 8} | native()
    stack = {name: value for name, value in stack.items() if name != "dim"} | {"attn_kv_heads": kv_heads}
    options = {f"{side}_{name}": value for side in ("enc", "dec") for name, value in stack.items()}
    model = XTransformer(dim=32, tie_token_emb=True, enc_rotary_pos_emb=True, dec_rel_pos_bias=True, **options)
    source, target = torch.randint(0, 40, (2, 17)), torch.randint(0, 40, (2, 11))
    check(model, lambda m: m(source, target, mask=torch.arange(17) < torch.tensor([[17], [9]])))


def test_prefix_decoder(language_model, ids):
    """Its mask is over pairs, and its own; learned bias and grouped heads ride along."""
    model = language_model(PrefixDecoder, rel_pos_bias=True, **native(attn_kv_heads=2))
    check(model, lambda m: random_loss(m, ids, prefix_attn_len=7))


def test_pair_mask_with_grouped_heads_and_a_mask_per_head(language_model, ids):
    model = language_model(alibi_pos_bias=True, **native(attn_kv_heads=2))
    per_head = (torch.rand(4, 21, 21) < 0.6) | torch.eye(21, dtype=torch.bool)
    check(model, lambda m: random_loss(m, ids, attn_mask=per_head))


def test_a_bias_of_the_caller_gets_its_gradient(language_model, ids):
    model = language_model(**native(attn_kv_heads=2))
    model.bias = nn.Parameter(torch.randn(4, 21, 21))
    check(model, lambda m: random_loss(m, ids, attn_bias=m.bias))


def test_xl_memories_over_two_segments(language_model, ids):
    model = language_model(wrapper={"max_mem_len": 12}, rotary_pos_emb=True, **native())

    def call(m):
        logits, memories = m(ids, return_mems=True)
        return random_loss(lambda: logits) + random_loss(m, ids.flip(1), mems=memories)

    check(model, call)


@pytest.mark.parametrize("options", [{}, *POSITIONS[1:4], {"attn_kv_heads": 2}, {"attn_num_mem_kv": 2}], ids=str)
def test_cached_generation_equals_uncached(options, language_model, ids):
    model = AutoregressiveWrapper(language_model(**native(**options))).eval()
    stock = model.generate(ids, 12, temperature=0.0, cache_kv=False)
    enable(model)
    for cache_kv in (False, True):
        tokens = model.generate(ids, 12, temperature=0.0, cache_kv=cache_kv)
        assert torch.equal(tokens, stock)
    assert counters(model).stock == 0


@pytest.mark.parametrize("options", [{}, {"rotary_pos_emb": True}, {"attn_kv_heads": 2, "rel_pos_bias": True}], ids=str)
def test_converted_generation_cached_equals_uncached_and_native(options, language_model, ids):
    model = AutoregressiveWrapper(language_model(**options)).eval()
    reference = AutoregressiveWrapper(language_model(**native(6.0), **options)).eval()
    reference.load_state_dict(model.state_dict())
    expected = reference.generate(ids, 12, temperature=0.0, cache_kv=False)
    enable(model, mode="convert", scale=6)
    for cache_kv in (False, True):
        assert torch.equal(model.generate(ids, 12, temperature=0.0, cache_kv=cache_kv), expected)


@pytest.mark.parametrize("options", [{}, {"rotary_pos_emb": True, "attn_kv_heads": 2}], ids=str)
def test_a_wrong_scale_fails_the_check(options, language_model, ids):
    """The check has teeth: one per cent of the scale is far outside of its tolerance, and so is the kv head order."""
    model = language_model(**options)
    model.requires_grad_(True)
    with enabled(model, mode="convert", scale=6):
        right = run(model, lambda m: random_loss(m, ids))
    with enabled(model, mode="convert", scale=6.06):
        wrong = run(model, lambda m: random_loss(m, ids))
    found = difference(wrong, right)
    assert not found.within(TOLERANCE)
    assert found.gradient > 2 * TOLERANCE


def test_the_usual_kv_head_order_fails_the_check(language_model, ids, monkeypatch):
    model = language_model(**native(attn_kv_heads=2))
    stock = run(model, lambda m: random_loss(m, ids))
    monkeypatch.setattr("xtransformers_cosine_sim.arguments._tiled_heads_to_batch", lambda *tensors: tensors)
    plain = arguments.flash_cosine_sim_attention
    monkeypatch.setattr(
        arguments, "flash_cosine_sim_attention", lambda *a, **k: plain(*a, **k).unflatten(1, (-1, 2)).transpose(1, 2)
    )
    with enabled(model):
        found = difference(run(model, lambda m: random_loss(m, ids)), stock)
    assert found.gradient > 100 * TOLERANCE


@pytest.mark.parametrize("placement", [{}, {"pre_norm": False}, {"sandwich_norm": True}], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convert_equals_native(placement, groups, language_model, ids):
    model = language_model(rotary_pos_emb=True, attn_kv_heads=2, **placement)
    reference = language_model(
        rotary_pos_emb=True, attn_kv_heads=2, **placement, **native(5.0, attn_qk_norm_groups=groups)
    )
    reference.load_state_dict(model.state_dict())
    expected = run(reference, lambda m: random_loss(m, ids))
    regular = run(model, lambda m: random_loss(m, ids))
    with enabled(model, mode="convert", scale=5.0, groups=groups):
        converted = run(model, lambda m: random_loss(m, ids))
    assert difference(converted, expected).within(TOLERANCE)
    assert not difference(converted, regular).within(TOLERANCE)


@pytest.mark.parametrize("options", [{}, {"rotary_pos_emb": True, "attn_kv_heads": 2}, {"rel_pos_bias": True}], ids=str)
def test_float64_agrees_to_its_own_rounding(options, language_model, ids):
    model = language_model(**native(**options)).double()
    stock = run(model, lambda m: random_loss(m, ids))
    with enabled(model):
        assert difference(run(model, lambda m: random_loss(m, ids)), stock).within(1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing(use_reentrant, language_model, ids):
    model = language_model(rotary_pos_emb=True, **native(attn_kv_heads=2))

    def call(m):
        x = m.token_emb(ids)
        return random_loss(lambda: checkpoint(m.attn_layers, x, use_reentrant=use_reentrant))

    check(model, call)


def test_autocast_trains_within_its_rounding(language_model, ids):
    """q, k normalised in float32 and v in half arrive together; the result is half and close to stock's."""
    model = language_model(rotary_pos_emb=True, **native(attn_kv_heads=2, attn_num_mem_kv=2))

    def call(m):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return random_loss(m, ids)

    exact = run(model, lambda m: random_loss(m, ids))
    stock_error = difference(run(model, call), exact)
    with enabled(model):
        fused_error = difference(run(model, call), exact)
        assert counters(model).stock == 0
    assert fused_error.loss <= 2 * stock_error.loss + 1e-3
    assert fused_error.gradient <= 2 * stock_error.gradient + 1e-4


def test_stock_flash_ignores_the_causal_override_and_the_plugin_does_not(language_model, ids):
    flash = language_model(**native(attn_flash=True))
    plain = language_model(**native())
    expected = run(plain, lambda m: random_loss(m, ids, causal=False))
    with enabled(flash):
        found = run(flash, lambda m: random_loss(m, ids, causal=False))
    assert difference(found, expected).within(TOLERANCE)


@pytest.mark.parametrize("fuse_norm", [True, False])
def test_the_bound_comes_from_the_model(fuse_norm, language_model, ids, monkeypatch):
    """Scale and groups as the kernel gets them: a number, from which it knows the bound before it starts."""
    model = language_model(**native(3.0, attn_qk_norm_groups=4))
    kernel, seen = arguments.flash_cosine_sim_attention, []

    def spy(q, k, v, mask, bias, scale, groups, causal, l2norm_qk, **options):
        seen.append((scale, groups, l2norm_qk))
        return kernel(q, k, v, mask, bias, scale, groups, causal, l2norm_qk, **options)

    monkeypatch.setattr(arguments, "flash_cosine_sim_attention", spy)
    with enabled(model, fuse_norm=fuse_norm):
        model(ids)
    if seam.queries_arrive_unit():
        assert seen == [(3.0, 4, fuse_norm)] * 2
    else:  # no bound is known: one is claimed that no fixed shift can serve
        assert all(scale * groups >= 1024 for scale, groups, _ in seen)
