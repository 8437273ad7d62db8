"""The arms of bench_training_step.py: one x-transformers model, and what serves its attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from x_transformers import Decoder, TransformerWrapper
from x_transformers.attend import Attend, Intermediates
from x_transformers.x_transformers import Attention
from xtransformers_cosine_sim import counters, enable
from xtransformers_cosine_sim.testing import native_scale

SCALE = 8.0
POSITIONS: dict[str, dict[str, Any]] = {
    "absolute": {},
    "rotary": {"rotary_pos_emb": True},
    "alibi": {"alibi_pos_bias": True},
    "t5": {"rel_pos_bias": True},
    "dynamic": {"dynamic_pos_bias": True},
}
"""Beside x-transformers' learned absolute ones, which are always there. Its flash path takes neither t5 nor dynamic."""

QK_NORM = {"attn_qk_norm": True, "attn_qk_norm_scale": native_scale(SCALE)}


@dataclass(frozen=True)
class Size:
    """The defaults of the benchmark are GPT-2 small with an output matrix of its own: 163 million parameters."""

    dim: int
    depth: int
    heads: int
    dim_head: int
    vocab: int
    positions: str = "absolute"

    def describe(self) -> str:
        heads = f"{self.heads} heads of {self.dim_head}"
        return f"width {self.dim}, {self.depth} layers, {heads}, {self.vocab} tokens, {self.positions} positions"


@dataclass(frozen=True)
class Arm:
    """How attention is computed. Equal `function`: equal losses from equal weights."""

    function: str  # "cosine", "softmax" or "none"
    options: dict[str, Any] = field(default_factory=dict)  # of Decoder
    enable: dict[str, Any] | None = None  # options of the plugin's `enable`; None: stock
    stores_matrix: bool = False  # queries x keys: needs the memory of the GPU for itself
    worth_compiling: bool = False


ARMS = {
    "plugin, convert": Arm("cosine", {}, {"mode": "convert", "scale": SCALE}, worth_compiling=True),
    "plugin, accelerate": Arm("cosine", QK_NORM, {"mode": "accelerate"}, worth_compiling=True),
    "plugin, norm apart": Arm("cosine", QK_NORM, {"mode": "accelerate", "fuse_norm": False}),
    "qk-norm, flash": Arm("cosine", {**QK_NORM, "attn_flash": True}, worth_compiling=True),
    "softmax, flash": Arm("softmax", {"attn_flash": True}),
    "no attention": Arm("none"),
    "qk-norm, plain": Arm("cosine", QK_NORM, stores_matrix=True),
    "softmax, plain": Arm("softmax", stores_matrix=True),
}
"""qk-norm is x-transformers' own attn_qk_norm=True, flash its attn_flash=True. "no attention" keeps every projection
and leaves the attention itself out (`add_up`): what is beyond its time is attention, norms included."""


class TrainingStep:
    """`step()` is one step of training: forward, backward, optimiser. It returns the loss, a tensor on the device."""

    def __init__(self, arm: Arm, size: Size, seq_len: int, batch: int, device: str, compiled: bool) -> None:
        with torch.device(device):
            self.model = build_model(arm, size, seq_len)
        self.device = device
        self._forward: Callable[[Tensor], Tensor] = (
            torch.compile(self.model, dynamic=False, fullgraph=True) if compiled else self.model
        )
        self._optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(1)
        self._tokens = torch.randint(0, size.vocab, (batch, seq_len + 1), generator=generator).to(device)

    def step(self) -> Tensor:
        with torch.autocast(self.device, dtype=torch.bfloat16):
            logits = self._forward(self._tokens[:, :-1])
            loss = F.cross_entropy(logits.flatten(0, 1), self._tokens[:, 1:].flatten())
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def calls(self) -> tuple[int, int]:
        """Fused and stock calls of attention; (0, 0) without the plugin."""
        counted = counters(self.model)
        return counted.fused, counted.stock


def build_model(arm: Arm, size: Size, seq_len: int) -> nn.Module:
    """The same weights for every arm: none of the options changes what is drawn."""
    torch.manual_seed(0)
    options = {**arm.options, **POSITIONS[size.positions], "attn_dim_head": size.dim_head, "verbose": False}
    stack = Decoder(dim=size.dim, depth=size.depth, heads=size.heads, **options)
    model = TransformerWrapper(num_tokens=size.vocab, max_seq_len=seq_len, attn_layers=stack)
    if arm.enable is not None:
        enable(model, **arm.enable)
    elif arm.function == "none":
        for module in model.modules():
            if isinstance(module, Attention):
                module.attend = add_up(module.attend)
    return model


def add_up(attend: Attend) -> Attend:
    """In place of an attention: q + k + v, so that every projection still runs, forward and backward."""

    class AddUp(Attend):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, **_: object) -> tuple[Tensor, Intermediates]:
            return q + k + v, Intermediates()

    attend.__class__ = AddUp
    return attend
