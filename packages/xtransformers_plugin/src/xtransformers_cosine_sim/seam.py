"""What the plugin takes for granted of x-transformers, asked of the installed version instead of its number."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from x_transformers.attend import Attend
from x_transformers.x_transformers import Attention

FORWARD_KEYWORDS = (
    "mask",
    "attn_bias",
    "prev_attn",
    "attn_delta",
    "row_mask",
    "flash_pack_seq_kwargs",
    "causal",
)
"""The keywords of `Attend.forward` that the plugin knows. Any other that is not None is refused."""

HARMLESS_ATTRIBUTES = frozenset(
    (
        "scale",
        "causal",
        "create_causal_mask",  # only used by the stock paths
        "dropout",  # judged per call: it is inactive in eval mode
        "attn_dropout",
        "logit_softclamp_value",
        "head_attn_sink",
        "add_zero_kv",
        "flash",  # which stock path runs: nothing that this plugin replaces
        "sdp_context_manager",
    )
)
"""Attributes of `Attend` that any value may have."""

SWITCH_ATTRIBUTES = frozenset(
    (
        "attn_fn",
        "inverted_attention",
        "pre_softmax_talking_heads",
        "post_softmax_talking_heads",
        "pre_scale_post_talking_heads",
        "selective",
        "cog_signed",
        "l2_distance",
        "head_learned_sink",
        "softclamp_logits",
        "cope",
        "flash_pack_seq",
        "flash_attn_varlen_func",
    )
)
"""Attributes of `Attend` that a row of the table in options.py judges."""


def attributes_of(attend: Attend) -> dict[str, object]:
    """Instance attributes, submodules, parameters and buffers by name, without those that every Module has."""
    own = {name: value for name, value in vars(attend).items() if name not in vars(torch.nn.Module())}
    return own | dict(attend._modules) | dict(attend._parameters) | dict(attend._buffers)


def unknown_attributes(attend: Attend) -> dict[str, object]:
    """Attributes that this plugin has not been taught and that are switched on, that is neither None nor False."""
    known = HARMLESS_ATTRIBUTES | SWITCH_ATTRIBUTES
    return {
        name: value
        for name, value in attributes_of(attend).items()
        if name not in known and value is not None and value is not False
    }


@lru_cache(maxsize=1)
def queries_arrive_unit() -> bool:
    """Whether a model with qk_norm hands unit q and k (per group) to `Attend`.

    True from 2.26 on. Before that q and k carry a factor qk_norm_scale each, so that scale * groups is no bound for
    the logits; they are still served, with a running maximum.
    """
    seen: list[Tensor] = []
    groups = 2
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.no_grad(), torch.autocast("cpu", enabled=False):
        probe = Attention(
            dim=16, dim_head=8, heads=2, qk_norm=True, qk_norm_groups=groups, qk_norm_scale=3.0, num_mem_kv=1
        )
        probe.attend.register_forward_pre_hook(lambda _, args: seen.extend(args[:2]))
        probe(torch.randn(1, 3, 16))
    norms = torch.cat([x.double().unflatten(-1, (groups, -1)).norm(dim=-1).flatten() for x in seen])
    return bool(((norms - 1).abs() < 0.05).all())
