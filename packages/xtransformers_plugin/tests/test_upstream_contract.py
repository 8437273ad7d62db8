"""What the plugin takes for granted of x-transformers. A failure here says what moved in a new version."""

from __future__ import annotations

import ast
import inspect
import textwrap

import pytest
import torch
from x_transformers import x_transformers as upstream
from x_transformers.attend import Attend, Intermediates
from x_transformers.x_transformers import Attention, AttentionLayers
from xtransformers_cosine_sim import seam

VERSION = "x-transformers moved: "


def calls(function: object, name: str) -> list[ast.Call]:
    """Calls of `name` or `<anything>.name` in the source of a class."""
    tree = ast.parse(inspect.getsource(function))
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [node for node in found if getattr(node.func, "id", getattr(node.func, "attr", None)) == name]


def test_the_signature_of_attend():
    parameters = list(inspect.signature(Attend.forward).parameters)[1:]
    expected = ["q", "k", "v", *seam.FORWARD_KEYWORDS]
    added, gone = set(parameters) - set(expected), set(expected) - set(parameters)
    assert not added, f"{VERSION}Attend.forward takes {sorted(added)}; teach seam.FORWARD_KEYWORDS and the table"
    assert not gone, f"{VERSION}Attend.forward no longer takes {sorted(gone)}"
    assert parameters[:5] == expected[:5], f"{VERSION}q, k, v, mask, attn_bias are not the first parameters any more"


def test_one_constructor_and_one_call_site():
    assert len(calls(upstream, "Attend")) == 1, f"{VERSION}Attend is constructed elsewhere too"
    sites = calls(upstream, "attend")
    assert len(sites) == 1, f"{VERSION}self.attend is called in {len(sites)} places"
    given = {keyword.arg for keyword in sites[0].keywords}
    assert len(sites[0].args) == 3, f"{VERSION}not q, k, v alone are positional"
    assert given <= set(seam.FORWARD_KEYWORDS), f"{VERSION}the call passes {given - set(seam.FORWARD_KEYWORDS)}"
    assert {"mask", "attn_bias", "causal"} <= given, f"{VERSION}the call passes only {given}"


@pytest.mark.parametrize("options", [{}, {"flash": True}, {"qk_norm": True}, {"causal": True, "add_zero_kv": True}])
def test_the_attributes_of_attend(options):
    attend = Attention(dim=32, heads=2, dim_head=16, **options).attend
    unknown = seam.attributes_of(attend).keys() - seam.HARMLESS_ATTRIBUTES - seam.SWITCH_ATTRIBUTES
    assert not unknown, f"{VERSION}Attend has new attributes {sorted(unknown)}; teach seam.py and the table"
    gone = (seam.HARMLESS_ATTRIBUTES | seam.SWITCH_ATTRIBUTES) - seam.attributes_of(attend).keys()
    gone -= {"sdp_context_manager", "flash_attn_varlen_func"}  # of the flash paths
    assert not gone, f"{VERSION}Attend lost {sorted(gone)}: how are these options told now?"


def test_the_attributes_of_attention_and_its_stack():
    attention = Attention(dim=32, heads=2, dim_head=16)
    wanted = ("qk_norm", "qk_norm_groups", "qk_norm_dim_scale", "q_rmsnorm", "k_rmsnorm", "scale", "to_q")
    assert not [name for name in wanted if not hasattr(attention, name)], f"{VERSION}Attention lost an attribute"
    assert attention.scale == 16**-0.5, f"{VERSION}Attention.scale is not dim_head ** -0.5"
    stack = AttentionLayers(dim=32, depth=1, rotary_pos_emb=True, rotary_emb_dim=32)
    wanted = ("rotary_pos_emb", "polar_pos_emb", "residual_attn", "cross_residual_attn")
    assert not [name for name in wanted if not hasattr(stack, name)], f"{VERSION}AttentionLayers lost an attribute"
    assert hasattr(stack.rotary_pos_emb, "scale"), f"{VERSION}xpos is told in another way"


def test_qk_norm_is_read_in_the_forward_of_attention_alone():
    """`enable` sets it to False where the pass normalises: nobody else may take that for a regular model."""

    def reads(source: object) -> int:
        nodes = ast.walk(ast.parse(textwrap.dedent(inspect.getsource(source))))
        return sum(isinstance(x, ast.Attribute) and x.attr == "qk_norm" and isinstance(x.ctx, ast.Load) for x in nodes)

    assert reads(Attention.forward) == reads(upstream) == 2, f"{VERSION}qk_norm is read elsewhere, or for something new"


def test_the_keywords_of_attention_that_bring_other_keys():
    parameters = inspect.signature(Attention.forward).parameters
    for name in ("rotary_pos_emb", "context_rotary_pos_emb", "polar_pos_emb", "additional_key_values"):
        assert name in parameters, f"{VERSION}Attention.forward has no {name}: site rows of the table look for it"


def test_the_fields_of_intermediates():
    maps = {"qk_similarities", "pre_softmax_attn", "post_softmax_attn"}
    fields = {name: field.default for name, field in Intermediates.__dataclass_fields__.items()}
    assert maps <= fields.keys(), f"{VERSION}attention maps have other names"
    assert all(fields[name] is None for name in fields), f"{VERSION}a field of Intermediates has no default of None"


def test_what_arrives_at_the_seam():
    """4 dims, unit norm where the probe says so, bool mask over keys, scale not applied, tiled kv heads."""
    torch.manual_seed(0)
    attention = Attention(dim=32, heads=4, dim_head=8, kv_heads=2, qk_norm=True, qk_norm_scale=2.0, causal=True)
    seen = {}
    attention.attend.register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(kwargs, qkv=args), with_kwargs=True
    )  # fmt: skip
    _, intermediates = attention(
        torch.randn(2, 5, 32), mask=torch.ones(2, 5, dtype=torch.bool), return_intermediates=True
    )
    q, k, v = seen["qkv"]
    assert (q.shape, k.shape, v.shape) == ((2, 4, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8))
    assert (seen["mask"].shape, seen["mask"].dtype) == ((2, 1, 1, 5), torch.bool)
    assert seen["causal"] is True
    if seam.queries_arrive_unit():
        norms = torch.cat([q, k], dim=1).norm(dim=-1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    similarity = attention.attend.scale * q @ k.repeat(1, 2, 1, 1).transpose(-1, -2)
    torch.testing.assert_close(intermediates.qk_similarities, similarity, msg=lambda m: f"{VERSION}head order: {m}")


def test_asking_the_probe_leaves_the_random_state_alone():
    seam.queries_arrive_unit.cache_clear()
    before = torch.get_rng_state()
    seam.queries_arrive_unit()
    assert torch.equal(torch.get_rng_state(), before)
