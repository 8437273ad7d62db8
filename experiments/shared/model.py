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
from x_transformers.x_transformers import Attention

from .config import RunConfig

NUM_BYTES = 256
LEARNED_SCALE = "cosine_scale"  # the parameter's name in an attention module
NORM_OPTIONS: dict[str, dict[str, Any]] = {
    "pre": {"pre_norm": True},
    "post": {"pre_norm": False},
    "deepnet": {"pre_norm": False},  # and what `_deepnet` adds
    "sandwich": {"pre_norm": True, "sandwich_norm": True},
}


@dataclass(frozen=True)
class AttentionCalls:
    """Of the layers that the plugin has enabled: how often the fused attention ran, and how often the stock one."""

    fused: int
    stock: int

    def __add__(self, other: AttentionCalls) -> AttentionCalls:
        return AttentionCalls(self.fused + other.fused, self.stock + other.stock)

    def __sub__(self, other: AttentionCalls) -> AttentionCalls:
        return AttentionCalls(self.fused - other.fused, self.stock - other.stock)


def build_model(config: RunConfig) -> TransformerWrapper:
    """The model of one run on its device, seeded, with its attention chosen."""
    if config.model != "x-transformers":
        raise ValueError(
            f"model: expected x-transformers for a run of its own, got {config.model}: see run_ensembles.py"
        )
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
            **_deepnet_options(config),
            **_attention_options(config),
        ),
    )
    if config.norm == "deepnet":
        _deepnet_initialize(model, config)
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


def _deepnet_options(config: RunConfig) -> dict[str, Any]:
    """The residual stream is multiplied by alpha = (2 N)^(1/4) before a branch is added and normalised.

    DeepNet, Wang et al. 2022 (arXiv 2203.00555), decoder only: N = depth layers of one attention and one feed-forward.
    """
    return {"scale_residual_constant": (2 * config.depth) ** 0.25} if config.norm == "deepnet" else {}


def _deepnet_initialize(model: nn.Module, config: RunConfig) -> None:
    """Xavier, times beta = (8 N)^(-1/4) for all but the projections to queries and keys; biases are 0. Same paper."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name.startswith("attn_layers."):
            queries_or_keys = name.endswith((".to_q", ".to_k"))
            nn.init.xavier_normal_(module.weight, gain=1.0 if queries_or_keys else (8 * config.depth) ** -0.25)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


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
    if config.learned_scale:
        _learn_scales(model, config)
    elif config.plugin_mode == "accelerate":  # the model knows its scale and groups
        xtransformers_cosine_sim.enable(model, mode="accelerate", backend=backend)
    else:
        xtransformers_cosine_sim.enable(
            model, mode="convert", scale=config.scale, groups=config.groups, backend=backend
        )


def _learn_scales(model: nn.Module, config: RunConfig) -> None:
    """A parameter (heads,) in each attention module, with which the plugin then computes."""
    attentions = [(path, module) for path, module in model.named_modules() if isinstance(module, Attention)]
    for path, attention in attentions:
        first = torch.full((config.heads,), config.scale, device=config.device)
        attention.register_parameter(LEARNED_SCALE, nn.Parameter(first))
        xtransformers_cosine_sim.enable(
            model,
            mode="convert",
            scale=attention.get_parameter(LEARNED_SCALE),
            groups=config.groups,
            layers=path,
            backend=config.backend or None,
        )


def learned_scales(model: nn.Module) -> list[list[float]]:
    """Layer by layer the scales of the heads; empty where they are not learned."""
    return [p.tolist() for name, p in model.named_parameters() if name.endswith(LEARNED_SCALE)]
