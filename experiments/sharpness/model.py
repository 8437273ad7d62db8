"""A decoder of two layers without positions: what it does at other lengths is left to its attention alone.

Order reaches it by smeared keys (Olsson et al. 2022): a key is a mixture of its token's and of that before it. Tokens
are fixed random directions, in and out: nothing has to be learned token by token. Weights start so that a key is what a
query of the same token is, and values come back as they were (mimetic initialisation, Trockman and Kolter 2023). So
every arm can look things up from the start, and what it learns is how sharply.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared.attend import FIRST_SCALE, AttentionArm, attend, logits
from ..shared.ensemble import Init, Members, Weights, linear, matrix
from .config import SharpnessConfig

OWN_TOKEN = -1.0  # a key starts as sigmoid(-1) = 0.27 of its own token
MLP_RATIO = 2


def decoder_inits(config: SharpnessConfig, arm: AttentionArm) -> dict[str, Init]:
    """Every arm draws the same first weights: a learned scale draws none and comes last."""
    d = config.dim
    inits = {"norm": Init((d,), mean=1.0), "head": Init((d, d))}
    for layer in range(config.depth):
        inits |= {
            f"{layer}.norm1": Init((d,), mean=1.0),
            f"{layer}.qkv": matrix(d, 3 * d),
            f"{layer}.smear": Init((config.heads,), mean=OWN_TOKEN),
            f"{layer}.out": matrix(d, d),
            f"{layer}.norm2": Init((d,), mean=1.0),
            f"{layer}.up": matrix(d, MLP_RATIO * d),
            f"{layer}.down": Init((MLP_RATIO * d, d)),
        }
    if arm.learned:
        inits |= {f"{i}.log_scale": Init((config.heads,), mean=math.log(FIRST_SCALE)) for i in range(config.depth)}
    return inits


def start_mimetic(members: Members) -> Members:
    """In place: W_k = W_q, W_out = W_v^T, the head the identity."""
    with torch.no_grad():
        weights = members.unpack(members.flat)  # views
        weights["head"].copy_(torch.eye(weights["head"].shape[1]))
        for name in (name for name in weights if name.endswith("qkv")):
            q, k, v = weights[name].chunk(3, dim=-1)
            k.copy_(q)
            weights[name.replace("qkv", "out")].copy_(v.transpose(1, 2))
    return members


@dataclass
class Probe:
    """Filled on the way through the model: each layer's largest attention probability at the asked positions."""

    sequences: int  # of each member that are looked at
    top: list[Tensor] = field(default_factory=list)  # a layer: (s, sequences, h, t)


class Decoder:
    """The model of one arm: a function of weights."""

    def __init__(self, config: SharpnessConfig, arm: AttentionArm, device: torch.device | str = "cpu") -> None:
        self.config, self.arm = config, arm
        drawn = torch.randn(config.vocabulary, config.dim, generator=torch.Generator().manual_seed(0))
        self._table = F.normalize(drawn, dim=-1).to(device)  # (vocabulary, d): each token's direction

    def __call__(
        self, weights: Weights, tokens: Tensor, positions: Tensor, factor: float = 1.0, probe: Probe | None = None
    ) -> Tensor:
        """tokens (s, b, n), positions (s, b, t) -> logits of what follows there (s, b, t, vocabulary) float32.

        factor: of all attention logits; `probe` is filled if given.
        """
        x = F.embedding(tokens, self._table) * self.config.dim**0.5  # (s, b, n, d) float32, elements about 1
        for layer in range(self.config.depth):
            x = x + self._attention(weights, layer, x, positions, factor, probe)
            hidden = F.gelu(linear(_norm(x, weights[f"{layer}.norm2"]), weights[f"{layer}.up"]))
            x = x + linear(hidden, weights[f"{layer}.down"])
        asked = x.gather(2, positions[..., None].expand(-1, -1, -1, x.shape[-1]))
        found = linear(_norm(asked, weights["norm"]), weights["head"])
        return (found @ self._table.T.to(found.dtype)).float()

    def _attention(
        self, weights: Weights, layer: int, x: Tensor, positions: Tensor, factor: float, probe: Probe | None
    ) -> Tensor:
        qkv = linear(_norm(x, weights[f"{layer}.norm1"]), weights[f"{layer}.qkv"])
        heads = qkv.unflatten(-1, (3, self.config.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (3, s, b, h, n, d)
        q, k, v = heads.unbind(0)
        k = _smear(k, weights[f"{layer}.smear"])
        log_scale = weights.get(f"{layer}.log_scale")
        if probe is not None:
            few = slice(0, probe.sequences)
            probe.top.append(_top(self.arm, q[:, few], k[:, few], positions[:, few], log_scale, factor))
        out = attend(self.arm, q, k, v, causal=True, log_scale=log_scale, factor=factor)
        return linear(out.transpose(2, 3).flatten(-2), weights[f"{layer}.out"])


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    """Layer norm with each member's own gain (s, d), in the gain's dtype."""
    return F.layer_norm(x, x.shape[-1:]).to(gain.dtype) * gain[:, None, None]


def _smear(k: Tensor, gate: Tensor) -> Tensor:
    """k (s, b, h, n, d), gate (s, h): how much of a key is its own token's, the rest is of the token before."""
    before = F.pad(k[..., :-1, :], (0, 0, 1, 0))
    return torch.lerp(before, k, gate.sigmoid()[:, None, :, None, None])


def _top(arm: AttentionArm, q: Tensor, k: Tensor, positions: Tensor, log_scale: Tensor | None, factor: float) -> Tensor:
    """(s, b, h, t): the largest probability of the asked queries over the keys that they see."""
    index = positions[:, :, None, :, None].expand(-1, -1, q.shape[2], -1, q.shape[-1])
    values = logits(arm, q.gather(3, index), k, log_scale, factor)  # (s, b, h, t, n)
    hidden = torch.arange(k.shape[3], device=k.device) > positions[:, :, None, :, None]
    return values.masked_fill(hidden, -math.inf).softmax(-1).amax(-1)
