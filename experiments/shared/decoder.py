"""The byte-level decoder of ensembles: every arm a function of weights, all seeds of an arm in the same launches.

Rotary embeddings (Su et al. 2021), layer norms without gain in one of four places, GELU, no biases. Weights are drawn
from N(0, 1 / fan in), so that a seed has the same first weights in every arm but DeepNet's, whose are rescaled.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from flash_cosine_sim_attention import flash_cosine_sim_attention
from torch import Tensor

from .attend import AttentionArm, attend
from .config import DTYPES, RunConfig
from .ensemble import Init, Members, Weights, embed, linear, matrix, per_member

NUM_BYTES = 256
Watch = Callable[[Tensor, Tensor, Tensor | None], None]  # (q, k, log_scale) of a layer: q, k (s, b, h, n, d)
MLP_RATIO = 4
ROTARY_BASE = 10_000.0


def decoder_inits(config: RunConfig) -> dict[str, Init]:
    """Every arm draws the same first weights: a learned scale draws none and comes last."""
    d = config.dim
    inits = {"table": Init((NUM_BYTES, d), std=1.0), "head": matrix(d, NUM_BYTES, gain=0.5)}
    for layer in range(config.depth):
        inits |= {
            f"{layer}.qkv": matrix(d, 3 * d),
            f"{layer}.out": matrix(d, d),
            f"{layer}.up": matrix(d, MLP_RATIO * d),
            f"{layer}.down": matrix(MLP_RATIO * d, d),
        }
    if config.learned_scale:
        first = math.log(config.scale)
        inits |= {f"{layer}.log_scale": Init((config.heads,), mean=first) for layer in range(config.depth)}
    return inits


def start_deepnet(members: Members, depth: int) -> None:
    """In place: what is added to the residual stream starts smaller, by beta = (8 N)^(-1/4) a matrix.

    DeepNet, Wang et al. 2022 (arXiv 2203.00555), decoder only: values, output and feed-forward; not queries and keys.
    """
    beta = (8 * depth) ** -0.25
    with torch.no_grad():
        for name, weight in members.unpack(members.flat).items():  # views
            if name.endswith("qkv"):
                weight.chunk(3, dim=-1)[2].mul_(beta)
            elif name.endswith((".out", ".up", ".down")):
                weight.mul_(beta)


class Decoder:
    """The model of one arm: a function of weights. `watch`, if set, is called in every layer."""

    def __init__(self, config: RunConfig, device: torch.device | str) -> None:
        self.config = config
        self._alpha = (2 * config.depth) ** 0.25 if config.norm == "deepnet" else 1.0
        self._learned = AttentionArm("cosine", scale=0.0, groups=config.groups)
        self.watch: Watch | None = None
        dtype = DTYPES[config.dtype]
        self._cos, self._sin = (table.to(device, dtype) for table in _rotations(config.seq_len, config.dim_head))

    def losses(self, weights: Weights, windows: Tensor) -> Tensor:
        """windows (s, b, n + 1) of bytes -> (s,) mean cross entropy in nats a byte."""
        windows = windows.long()
        logits = self(weights, windows[:, :, :-1]).float()  # (s, b, n, 256)
        each = F.cross_entropy(logits.flatten(0, -2), windows[:, :, 1:].flatten(), reduction="none")
        return per_member(each.view(len(windows), -1))

    def __call__(self, weights: Weights, tokens: Tensor) -> Tensor:
        """tokens (s, b, n) int64 -> logits (s, b, n, 256)."""
        x = embed(tokens, weights["table"]).float()  # (s, b, n, d), the residual stream
        if self.config.norm in ("post", "deepnet"):
            x = _norm(x)
        for layer in range(self.config.depth):
            x = self._add(x, lambda h, layer=layer: self._attention(weights, layer, h))  # type: ignore[misc]
            x = self._add(x, lambda h, layer=layer: _feed_forward(weights, layer, h))  # type: ignore[misc]
        return linear(_norm(x), weights["head"])

    def _add(self, x: Tensor, branch: Callable[[Tensor], Tensor]) -> Tensor:
        """The residual stream with a branch added, the norm in its place."""
        match self.config.norm:
            case "pre":
                return x + branch(_norm(x))
            case "sandwich":
                return x + _norm(branch(_norm(x)))
            case _:
                return _norm(self._alpha * x + branch(x))

    def _attention(self, weights: Weights, layer: int, h: Tensor) -> Tensor:
        qkv = linear(h, weights[f"{layer}.qkv"])
        qkv = qkv.unflatten(-1, (3, self.config.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (3, s, b, h, n, d)
        q, k = self._rotate(qkv[:2]).unbind(0)
        out = self._attend(q, k, qkv[2], weights.get(f"{layer}.log_scale"))
        return linear(out.transpose(2, 3).flatten(-2), weights[f"{layer}.out"])

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, log_scale: Tensor | None) -> Tensor:
        """(s, b, h, n, d) each -> the same."""
        config = self.config
        if self.watch is not None:
            self.watch(q, k, log_scale)
        if config.attention == "regular":
            return attend(AttentionArm("regular"), q, k, v, causal=True)
        if config.attention == "native":
            return attend(AttentionArm("cosine-torch", config.scale, config.groups), q, k, v, causal=True)
        if log_scale is not None:
            return attend(self._learned, q, k, v, causal=True, log_scale=log_scale)
        out = flash_cosine_sim_attention(
            q, k, v, scale=config.scale, groups=config.groups, causal=True, backend=config.backend or None
        )
        assert isinstance(out, Tensor)
        return out

    def _rotate(self, x: Tensor) -> Tensor:
        """x (..., n, d): neighbours are the coordinates of d / 2 planes, so the norm of any group of planes stays."""
        n = x.shape[-2]
        swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
        return torch.addcmul(x * self._cos[:n], swapped, self._sin[:n])


def _feed_forward(weights: Weights, layer: int, h: Tensor) -> Tensor:
    return linear(F.gelu(linear(h, weights[f"{layer}.up"])), weights[f"{layer}.down"])


def _norm(x: Tensor) -> Tensor:
    return F.layer_norm(x.float(), x.shape[-1:])


def _rotations(length: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """cos, and sin with the sign that the other coordinate enters with: (length, head_dim)."""
    frequencies = ROTARY_BASE ** -(torch.arange(0, head_dim, 2) / head_dim)
    angles = torch.outer(torch.arange(length), frequencies).repeat_interleave(2, dim=1)
    return angles.cos(), angles.sin() * torch.tensor([-1.0, 1.0]).repeat(head_dim // 2)
