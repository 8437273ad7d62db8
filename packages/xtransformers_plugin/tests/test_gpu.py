"""On a GPU: the CUDA kernels behind the plugin, autocast, generation, the whole model compiled."""

from __future__ import annotations

import pytest
import torch
from x_transformers import AutoregressiveWrapper, Decoder, TransformerWrapper
from xtransformers_cosine_sim import counters, disable, enable, enabled
from xtransformers_cosine_sim.testing import difference, random_loss, run

pytestmark = pytest.mark.gpu

OPTIONS = [
    {"rotary_pos_emb": True},
    {"alibi_pos_bias": True},
    {"rel_pos_bias": True, "attn_kv_heads": 2},
    {"dynamic_pos_bias": True},
    {"attn_data_dependent_alibi": True},
    {"rotary_pos_emb": True, "attn_kv_heads": 2, "attn_num_mem_kv": 3},
    {"attn_qk_norm_groups": 4, "attn_one_kv_head": True},
    {"attn_qk_norm_dim_scale": True},
    {"attn_max_attend_past": 70, "attn_add_zero_kv": True},
]


def build(**options: object) -> TransformerWrapper:
    torch.manual_seed(0)
    options = {"attn_qk_norm": True, "attn_qk_norm_scale": 4.0, "attn_dim_head": 64, "verbose": False} | options
    stack = Decoder(dim=128, depth=2, heads=4, **options)
    return TransformerWrapper(num_tokens=40, max_seq_len=300, attn_layers=stack).cuda()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, 40, (2, 200), device="cuda")


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_as_close_to_float32_as_stock(options, dtype, ids):
    model = build(**options)
    mask = torch.arange(200, device="cuda") < torch.tensor([[200], [151]], device="cuda")

    def call(m, half=True):
        with torch.autocast("cuda", dtype=dtype, enabled=half):
            return random_loss(m, ids, mask=mask, rows=mask)

    exact = run(model, lambda m: call(m, half=False))
    stock_error = difference(run(model, call), exact)
    enable(model)
    fused_error = difference(run(model, call), exact)
    assert (counters(model).fused, counters(model).stock) == (2, 0)
    assert fused_error.loss <= 2 * stock_error.loss + 2e-3
    assert fused_error.gradient <= 2 * stock_error.gradient + 2e-3


@pytest.mark.parametrize("options", [{}, {"rotary_pos_emb": True, "attn_kv_heads": 2}, {"rel_pos_bias": True}], ids=str)
def test_converted_is_as_close_to_the_native_model_as_that_is_to_float32(options, ids):
    native, model = build(**options), build(attn_qk_norm=False, **options)
    model.load_state_dict(native.state_dict())
    exact = run(native, lambda m: random_loss(m, ids))
    enable(model, mode="convert", scale=4.0)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        native_error = difference(run(native, lambda m: random_loss(m, ids)), exact)
        found_error = difference(run(model, lambda m: random_loss(m, ids)), exact)
    assert (counters(model).fused, counters(model).stock) == (2, 0)
    assert found_error.loss <= 2 * native_error.loss + 2e-3
    assert found_error.gradient <= 2 * native_error.gradient + 2e-3


@pytest.mark.parametrize("given", ["mems", "attn_mask"])
def test_float32_with_xl_memories_or_a_mask_over_pairs(given, ids):
    model = build(rotary_pos_emb=True, attn_kv_heads=2)
    memories = [torch.randn(2, 30, 128, device="cuda") for _ in range(2)]
    pairs = (torch.rand(200, 200, device="cuda") < 0.7) | torch.eye(200, dtype=torch.bool, device="cuda")
    keywords = {given: memories if given == "mems" else pairs}
    stock = run(model, lambda m: random_loss(m, ids, **keywords))
    with enabled(model):
        assert difference(run(model, lambda m: random_loss(m, ids, **keywords)), stock).within(1e-4)
        assert counters(model).stock == 0


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_generation_cached_equals_uncached(options, ids):
    model = AutoregressiveWrapper(build(**options)).eval()
    enable(model)
    tokens = [model.generate(ids[:, :50], 20, temperature=0.0, cache_kv=cache_kv) for cache_kv in (False, True)]
    disable(model)
    stock = model.generate(ids[:, :50], 20, temperature=0.0, cache_kv=True)
    assert torch.equal(tokens[0], stock)
    assert torch.equal(tokens[1], stock)


@pytest.mark.parametrize("options", [{}, {"rotary_pos_emb": True}, {"rel_pos_bias": True, "attn_kv_heads": 2}], ids=str)
def test_whole_model_compiled(options, ids):
    model = build(**options)

    def call(m):
        with torch.autocast("cuda", dtype=torch.bfloat16):
            return random_loss(m, ids)

    enable(model)
    eager = run(model, call)
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        assert difference(run(model, lambda _: call(compiled)), eager).within(5e-3)
    assert (counters(model).fused, counters(model).stock) == (6, 0)


def test_long_sequences_need_no_matrix():
    model = build(rotary_pos_emb=True)
    model.max_seq_len = 16384
    enable(model)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    x = torch.randn(1, 16384, 128, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        model.attn_layers(x).sum().backward()
    peak = torch.cuda.max_memory_allocated() - before
    assert peak < 16384**2 * 2  # less than one head's matrix of one layer in half precision
