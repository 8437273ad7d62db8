"""The one model of all arms: a small byte-level x-transformers decoder, and what makes its attention cosine-sim.

Every arm has the same parameters and, from one seed, the same initial weights: neither attn_qk_norm nor the plugin adds
or draws any. The `regular` and `native` arms use x-transformers' own fast path (attn_flash=True), so that the plugin is
measured against the best that is there without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import xtransformers_cosine_sim
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper

from .config import RunConfig

NUM_BYTES = 256
NORM_OPTIONS: dict[str, dict[str, Any]] = {
    "pre": {"pre_norm": True},
    "post": {"pre_norm": False},
    "sandwich": {"pre_norm": True, "sandwich_norm": True},
}


@dataclass(frozen=True)
class AttentionCalls:
    """Of the layers that the plugin has enabled: how often the fused attention ran, and how often the stock one."""

    fused: int
    stock: int


def build_model(config: RunConfig) -> TransformerWrapper:
    """The model of one run on its device, seeded, with its attention chosen."""
    torch.manual_seed(config.seed)
    model = TransformerWrapper(
        num_tokens=NUM_BYTES,
        max_seq_len=config.seq_len,
        use_abs_pos_emb=False,
        attn_layers=Decoder(
            dim=config.dim,
            depth=config.depth,
            heads=config.heads,
            attn_dim_head=config.dim_head,
            attn_flash=True,
            rotary_pos_emb=True,
            rotary_emb_dim=config.dim_head,
            ff_dropout=config.dropout,
            **NORM_OPTIONS[config.norm],
            **_attention_options(config),
        ),
    )
    model = model.to(config.device)
    if config.attention == "cosine":
        _enable_plugin(model, config)
    return model


def _attention_options(config: RunConfig) -> dict[str, Any]:
    """The regular model, which the plugin may convert, or x-transformers' own query-key normalisation."""
    normalised = config.attention == "native" or (config.attention == "cosine" and config.plugin_mode == "accelerate")
    if not normalised:
        return {}
    return {"attn_qk_norm": True, "attn_qk_norm_groups": config.groups, "attn_qk_norm_scale": config.scale}


def next_byte_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean cross entropy in nats a byte. batch: (b, n + 1) int64, of which the last n bytes are predicted."""
    logits = model(batch[:, :-1])  # (b, n, 256)
    return F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())


def attention_calls(model: nn.Module) -> AttentionCalls:
    """Since the model was built; a model without the plugin has none of either."""
    counted = xtransformers_cosine_sim.counters(model)
    return AttentionCalls(fused=counted.fused, stock=counted.stock)


def _enable_plugin(model: nn.Module, config: RunConfig) -> None:
    """Strict: a layer or a call that the fused attention cannot serve raises, it never runs stock unnoticed."""
    backend = config.backend or None
    if config.plugin_mode == "accelerate":  # the model knows its scale and groups
        xtransformers_cosine_sim.enable(model, mode="accelerate", backend=backend)
    else:
        xtransformers_cosine_sim.enable(
            model, mode="convert", scale=config.scale, groups=config.groups, backend=backend
        )
