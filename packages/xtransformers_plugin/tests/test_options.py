"""Every row of the table in options.py, in both modes: served equals stock, refused is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from x_transformers import Decoder, Encoder, TransformerWrapper
from x_transformers.attend import Attend
from x_transformers.x_transformers import Attention
from xtransformers_cosine_sim import UnsupportedCallError, UnsupportedLayerError, counters, enable, enabled, seam
from xtransformers_cosine_sim.attend import CosineSimAttend
from xtransformers_cosine_sim.counters import enabled_layers
from xtransformers_cosine_sim.options import TABLE, Row
from xtransformers_cosine_sim.testing import difference, native_scale, random_loss, run

TOLERANCE = 1e-5
NATIVE_SCALES = {scale: native_scale(scale) for scale in (1.0, 6.0, 12.5)}  # before a test touches the probe
LENGTH = 21
GENERATOR = torch.Generator().manual_seed(7)
IDS = torch.randint(0, 40, (2, LENGTH), generator=GENERATOR)
INPUT = torch.randn(2, LENGTH, 32, generator=GENERATOR)
CONTEXT = torch.randn(2, 13, 32, generator=GENERATOR)
KEY_MASK = torch.arange(LENGTH) < torch.tensor([[LENGTH], [14]])
PAIR_MASK = (torch.rand(LENGTH, LENGTH, generator=GENERATOR) < 0.7) | torch.eye(LENGTH, dtype=torch.bool)
MEMS = [torch.randn(2, 6, 32, generator=GENERATOR) for _ in range(2)]
ANGLES = torch.randn(1, LENGTH, 16, generator=GENERATOR)


@dataclass
class Example:
    """A model that uses the option of a row: of `stack` in a TransformerWrapper, or a bare Attention."""

    options: dict[str, Any] = field(default_factory=dict)
    stack: type = Decoder
    call: Callable[[nn.Module], Tensor] = lambda model: random_loss(model, IDS)
    prepare: Callable[[nn.Module, pytest.MonkeyPatch], object] = lambda model, monkeypatch: None
    native_in_convert: bool = True  # a native qk-norm model of the same weights exists to compare with

    def build(self, qk_norm: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> nn.Module:
        torch.manual_seed(0)
        options = {"dim": 32, "heads": 4, "attn_dim_head": 16} | qk_norm | self.options
        options["attn_qk_norm_scale"] = NATIVE_SCALES[options.get("attn_qk_norm_scale", 6.0)]
        if self.stack is Attention:
            bare = {name.removeprefix("attn_"): value for name, value in options.items()}
            model: nn.Module = Attention(causal=True, **bare)
        else:
            stack = self.stack(depth=2, verbose=False, **options)
            model = TransformerWrapper(num_tokens=40, max_seq_len=64, attn_layers=stack)
        self.prepare(model, monkeypatch)
        return model


def layer(**options: Any) -> list[Example]:
    return [Example(options)]


def each(name: str, *values: Any) -> list[Example]:
    return [Example({name: value}) for value in values]


def bare(**call: Any) -> list[Example]:
    return [Example(stack=Attention, call=lambda model: random_loss(model, INPUT, **call))]


def wrapped(**call: Any) -> list[Example]:
    return [Example(call=lambda model: random_loss(model, IDS, **call))]


def set_on_attend(name: str, value: object) -> list[Example]:
    def prepare(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
        for module in model.modules():
            if isinstance(module, Attention):
                setattr(module.attend, name, value)

    return [Example(prepare=prepare)]


def two_steps(model: nn.Module) -> Tensor:
    """Twenty tokens, then one more with their cached keys and values."""
    logits, cache = model(IDS[:, :-1], return_intermediates=True)
    return random_loss(lambda: logits) + random_loss(model, IDS, cache=cache)


def forget_unit_norm(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(seam, "queries_arrive_unit", lambda: False)


class OtherAttend(Attend):
    pass


def accept_new_keyword(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """An x-transformers of the future: `Attend.forward` takes `novel`, and Attention passes it."""
    stock = Attend.forward
    monkeypatch.setattr(Attend, "forward", lambda self, *args, novel=None, **kwargs: stock(self, *args, **kwargs))
    model.attend.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"novel": torch.ones(())}), with_kwargs=True
    )


def pass_row_mask(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model.attend.register_forward_pre_hook(
        lambda module, args, kwargs: (args, kwargs | {"row_mask": KEY_MASK}), with_kwargs=True
    )


EXAMPLES: dict[str, list[Example]] = {
    "attn_qk_norm=True": layer(attn_qk_norm=True),
    "attn_qk_norm=False": layer(attn_qk_norm=False),
    "attn_qk_norm_scale": each("attn_qk_norm_scale", 1.0, 12.5),
    "attn_qk_norm_groups": each("attn_qk_norm_groups", 2, 4),
    "attn_qk_norm_scale before x-transformers 2.26": [Example(prepare=forget_unit_norm)],
    "attn_qk_norm_dim_scale": layer(attn_qk_norm=True, attn_qk_norm_dim_scale=True),
    "attn_qk_rmsnorm | attn_k_rmsnorm": [
        Example({name: True, "attn_qk_norm_scale": 1.0}) for name in ("attn_qk_rmsnorm", "attn_k_rmsnorm")
    ],
    "attend.scale": set_on_attend("scale", torch.tensor(6.0)),
    "attn_kv_heads": each("attn_kv_heads", 2),
    "attn_one_kv_head": layer(attn_one_kv_head=True),
    "attn_value_dim_head": layer(attn_value_dim_head=24),
    "attn_num_mem_kv": [Example({"attn_num_mem_kv": 3}, native_in_convert=seam.queries_arrive_unit())],
    "attn_add_zero_kv": [
        *layer(attn_add_zero_kv=True, alibi_pos_bias=True),
        Example({"attn_add_zero_kv": True}, call=lambda model: random_loss(model, IDS, attn_mask=PAIR_MASK)),
    ],
    "attn_gate_values | attn_gate_value_heads | attn_head_scale | attn_on_attn": [
        *each("attn_gate_values", True),
        *each("attn_gate_value_heads", True),
        *each("attn_head_scale", True),
        *each("attn_on_attn", True),
    ],
    "attn_value_rmsnorm | attn_laser": [*layer(attn_value_rmsnorm=True), *layer(attn_laser=True)],
    "attn_use_latent_q | attn_use_latent_kv": layer(
        attn_use_latent_q=True, attn_dim_latent_q=24, attn_use_latent_kv=True, attn_dim_latent_kv=24
    ),
    "add_value_residual": layer(add_value_residual=True),
    "rotary_pos_emb": layer(rotary_pos_emb=True),
    "alibi_pos_bias": layer(alibi_pos_bias=True),
    "rel_pos_bias": layer(rel_pos_bias=True),
    "dynamic_pos_bias": layer(dynamic_pos_bias=True),
    "attn_data_dependent_alibi": layer(attn_data_dependent_alibi=True),
    "rotary_xpos": layer(rotary_xpos=True),
    "polar_pos_emb": layer(polar_pos_emb=True),
    "mask": [
        Example(stack=stack, call=lambda model: random_loss(model, IDS, mask=KEY_MASK, rows=KEY_MASK))
        for stack in (Decoder, Encoder)
    ],
    "attn_mask": [
        Example(stack=stack, call=lambda model: random_loss(model, IDS, attn_mask=PAIR_MASK))
        for stack in (Decoder, Encoder)
    ],
    "row_mask": [Example(stack=Attention, call=bare()[0].call, prepare=pass_row_mask)],
    "attn_max_attend_past": each("attn_max_attend_past", 5),
    "causal": wrapped(causal=False),
    "cross_attend": [Example({"cross_attend": True}, call=lambda model: random_loss(model, IDS, context=CONTEXT))],
    "cache": [Example(call=two_steps)],
    "mems": wrapped(mems=MEMS),
    "attn_flash": layer(attn_flash=True),
    "pre_norm | sandwich_norm | pre_and_post_norm": [
        *layer(pre_norm=False),
        *layer(sandwich_norm=True),
        *layer(pre_and_post_norm=True),
    ],
    "attn_sigmoid | attn_hard | attn_sparse_topk | attn_gumbel_softmax | attn_custom_attn_fn": [
        *layer(attn_sigmoid=True),
        *layer(attn_hard=True),
        *layer(attn_sparse_topk=4),
        *layer(attn_gumbel_softmax=True),
        *layer(attn_custom_attn_fn=lambda logits: logits.softmax(dim=-1)),
    ],
    "cross_attn_inverted_attention": [
        Example(
            {"cross_attend": True, "cross_attn_inverted_attention": True},
            stack=Encoder,
            call=lambda model: random_loss(model, IDS, context=CONTEXT),
        )
    ],
    "attn_pre_talking_heads": layer(attn_pre_talking_heads=True),
    "attn_post_talking_heads": layer(attn_post_talking_heads=True),
    "attn_pre_scale_post_talking_heads": layer(attn_pre_scale_post_talking_heads=True),
    "attn_selective": layer(attn_selective=True),
    "attn_cog_signed": layer(attn_cog_signed=True),
    "attn_l2_distance": layer(attn_l2_distance=True),
    "attn_head_learned_sink": layer(attn_head_learned_sink=True),
    "attn_softclamp_logits": layer(attn_softclamp_logits=True),
    "attn_use_cope": layer(attn_use_cope=True),
    "attn_flash_pack_seq": set_on_attend("flash_pack_seq", True),
    "residual_attn | cross_residual_attn": layer(residual_attn=True),
    "a subclass of Attend": set_on_attend("__class__", OtherAttend),
    "an unknown attribute of Attend": set_on_attend("novel_option", 3),
    "attn_dropout": layer(attn_dropout=0.4),
    "prev_attn": bare(prev_attn=torch.randn(2, 4, LENGTH, LENGTH, generator=GENERATOR)),
    "attn_delta": bare(attn_delta=torch.randn(2, 4, LENGTH, LENGTH, generator=GENERATOR)),
    "flash_pack_seq_kwargs": bare(flash_pack_seq_kwargs={}),
    "an unknown keyword": [Example(stack=Attention, call=bare()[0].call, prepare=accept_new_keyword)],
    "rotary_pos_emb with an xpos scale": bare(rotary_pos_emb=(ANGLES, ANGLES.abs() + 0.5)),
    "polar_pos_emb=": bare(polar_pos_emb=(ANGLES, torch.zeros(4, 1, 16))),
    "additional_key_values": bare(additional_key_values=(torch.randn(2, 4, 5, 16), torch.randn(2, 4, 5, 16))),
}

CASES = [
    pytest.param(row, example, mode, id=f"{mode}-{row.option}-{index}".replace(" ", ""))
    for row in TABLE
    for index, example in enumerate(EXAMPLES.get(row.option, ()))
    for mode in ("accelerate", "convert")
]


def test_every_row_has_an_example():
    assert EXAMPLES.keys() == {row.option for row in TABLE}


class Arms:
    """The model that gets enabled, the options for it, and the stock model that it must equal while it is enabled."""

    def __init__(self, example: Example, mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
        scale, groups = example.options.get("attn_qk_norm_scale", 6.0), example.options.get("attn_qk_norm_groups", 1)
        native = {"attn_qk_norm": True}
        self.options: dict[str, Any] = {"mode": mode}
        if mode == "accelerate":
            self.model = self.expected = example.build(native, monkeypatch)
            return
        self.options |= {"scale": scale, "groups": groups}
        self.model = example.build({"attn_qk_norm": False}, monkeypatch)
        forced = Example(example.options | native, example.stack, example.call, example.prepare)
        self.expected = forced.build({}, monkeypatch)


def seeded_run(model: nn.Module, call: Callable[[nn.Module], Tensor]):
    torch.manual_seed(3)  # dropout and gumbel noise
    return run(model, call)


@pytest.mark.parametrize(("row", "example", "mode"), CASES)
def test_row(row: Row, example: Example, mode: str, monkeypatch):
    arms = Arms(example, mode, monkeypatch)
    verdict = row.verdict(mode)
    if verdict in ("served", "unbounded"):
        if mode == "convert" and not example.native_in_convert:
            pytest.skip("this x-transformers scales memory keys and keys differently")
        if verdict == "served" and seam.queries_arrive_unit():
            monkeypatch.setenv("FLASH_COSINE_SIM_CHECK", "1")  # the promise that q, k are unit is verified
        check_served(arms, example, unbounded=verdict == "unbounded")
    elif row.where in ("layer", "stack"):
        check_refused_layer(row, arms, example)
    else:
        check_refused_call(row, arms, example, always=verdict == "always")


def check_served(arms: Arms, example: Example, unbounded: bool) -> None:
    arms.expected.load_state_dict(arms.model.state_dict())
    expected = seeded_run(arms.expected, example.call)
    with enabled(arms.model, **arms.options):
        assert not (unbounded and any(attend.cosine_sim.bounded for attend in enabled_layers(arms.model).values()))
        found = difference(seeded_run(arms.model, example.call), expected)
        counted = counters(arms.model)
    assert found.within(TOLERANCE), found
    assert counted.stock == 0
    assert all(counts.fused > 0 for counts in counted.layers.values())


def check_refused_layer(row: Row, arms: Arms, example: Example) -> None:
    with pytest.raises(UnsupportedLayerError, match=r"attn_layers.layers.\d.1: ") as raised:
        enable(arms.model, **arms.options)
    assert row.option in {refusal.option for refusal in raised.value.refusals}
    assert not any(isinstance(module, CosineSimAttend) for module in arms.model.modules())

    stock = seeded_run(arms.model, example.call)  # in convert mode too: the layer stays a regular one
    with enabled(arms.model, strict=False, **arms.options) as model:
        refused = {refusal.layer for refusal in raised.value.refusals}
        if refused == set(enabled_layers(model)):
            assert difference(seeded_run(model, example.call), stock).within(TOLERANCE)
        else:
            seeded_run(model, example.call)
        counted = counters(model)
    for path, counts in counted.layers.items():
        assert (counts.fused == 0 and counts.stock > 0) == (path in refused)
        assert path not in refused or row.option in " ".join(counts.reasons)


def check_refused_call(row: Row, arms: Arms, example: Example, always: bool) -> None:
    with enabled(arms.model, **arms.options), pytest.raises(UnsupportedCallError) as raised:
        example.call(arms.model)
    assert raised.value.refusal.option == row.option
    with enabled(arms.model, strict=False, **arms.options) as model:
        if always:
            with pytest.raises(UnsupportedCallError):
                example.call(model)
            return
        arms.expected.load_state_dict(model.state_dict())
        found = seeded_run(model, example.call)
        counted = counters(model)
    assert difference(found, seeded_run(arms.expected, example.call)).within(TOLERANCE)
    assert counted.fused == 0
    assert all(row.option in " ".join(counts.reasons) for counts in counted.layers.values())
