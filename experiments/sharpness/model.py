"""A decoder of two layers without positions: what it does at other lengths is left to its attention alone.

Order reaches it by a causal convolution over three tokens in front of each attention (as the token shift of RWKV, Peng
et al. 2023), so that a key can hold the token before it. Embeddings are tied; only asked positions are predicted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared.attend import FIRST_SCALE, AttentionArm, attend, logits
from ..shared.ensemble import Init, Weights, embed, linear, matrix
from .config import SharpnessConfig

TAPS = 3
MLP_RATIO = 2


def decoder_inits(config: SharpnessConfig, arm: AttentionArm) -> dict[str, Init]:
    """Every arm draws the same first weights: a learned scale draws none and comes last."""
    d = config.dim
    inits = {"embedding": Init((config.vocabulary, d), 0.05), "norm": Init((d,), mean=1.0)}
    for layer in range(config.depth):
        inits |= {
            f"{layer}.norm1": Init((d,), mean=1.0),
            f"{layer}.qkv": matrix(d, 3 * d),
            f"{layer}.taps": Init((TAPS, d), 0.5),
            f"{layer}.out": matrix(d, d),
            f"{layer}.norm2": Init((d,), mean=1.0),
            f"{layer}.up": matrix(d, MLP_RATIO * d),
            f"{layer}.down": matrix(MLP_RATIO * d, d),
        }
    if arm.learned:
        inits |= {f"{i}.log_scale": Init((config.heads,), mean=math.log(FIRST_SCALE)) for i in range(config.depth)}
    return inits


@dataclass
class Probe:
    """Filled on the way through the model: each layer's largest attention probability at the asked positions."""

    sequences: int  # of each member that are looked at
    top: list[Tensor] = field(default_factory=list)  # a layer: (s, sequences, h, t)


class Decoder:
    """The model of one arm: a function of weights."""

    def __init__(self, config: SharpnessConfig, arm: AttentionArm) -> None:
        self.config, self.arm = config, arm

    def __call__(
        self, weights: Weights, tokens: Tensor, positions: Tensor, factor: float = 1.0, probe: Probe | None = None
    ) -> Tensor:
        """tokens (s, b, n), positions (s, b, t) -> logits of what follows there (s, b, t, vocabulary) float32.

        factor: of all attention logits; `probe` is filled if given.
        """
        x = embed(tokens, weights["embedding"]).float()  # (s, b, n, d): the residual stream is float32
        for layer in range(self.config.depth):
            x = x + self._attention(weights, layer, x, positions, factor, probe)
            hidden = F.gelu(linear(_norm(x, weights[f"{layer}.norm2"]), weights[f"{layer}.up"]))
            x = x + linear(hidden, weights[f"{layer}.down"])
        asked = x.gather(2, positions[..., None].expand(-1, -1, -1, x.shape[-1]))
        return linear(_norm(asked, weights["norm"]), weights["embedding"].transpose(1, 2)).float()

    def _attention(
        self, weights: Weights, layer: int, x: Tensor, positions: Tensor, factor: float, probe: Probe | None
    ) -> Tensor:
        mixed = _convolve(_norm(x, weights[f"{layer}.norm1"]), weights[f"{layer}.taps"])
        qkv = linear(mixed, weights[f"{layer}.qkv"])
        heads = qkv.unflatten(-1, (3, self.config.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (3, s, b, h, n, d)
        q, k, v = heads.unbind(0)
        log_scale = weights.get(f"{layer}.log_scale")
        if probe is not None:
            few = slice(0, probe.sequences)
            probe.top.append(_top(self.arm, q[:, few], k[:, few], positions[:, few], log_scale, factor))
        out = attend(self.arm, q, k, v, causal=True, log_scale=log_scale, factor=factor)
        return linear(out.transpose(2, 3).flatten(-2), weights[f"{layer}.out"])


def _norm(x: Tensor, gain: Tensor) -> Tensor:
    """Layer norm with each member's own gain (s, d), in the gain's dtype."""
    return F.layer_norm(x, x.shape[-1:]).to(gain.dtype) * gain[:, None, None]


def _convolve(x: Tensor, taps: Tensor) -> Tensor:
    """x (s, b, n, c), taps (s, 3, c): position i gets a weighted sum of positions i, i - 1 and i - 2."""
    padded, length = F.pad(x, (0, 0, TAPS - 1, 0)), x.shape[2]
    mixed = x * taps[:, None, None, 0]
    for lag in range(1, TAPS):
        mixed = torch.addcmul(mixed, padded[:, :, TAPS - 1 - lag :][:, :, :length], taps[:, None, None, lag])
    return mixed


def _top(arm: AttentionArm, q: Tensor, k: Tensor, positions: Tensor, log_scale: Tensor | None, factor: float) -> Tensor:
    """(s, b, h, t): the largest probability of the asked queries over the keys that they see."""
    index = positions[:, :, None, :, None].expand(-1, -1, q.shape[2], -1, q.shape[-1])
    values = logits(arm, q.gather(3, index), k, log_scale, factor)  # (s, b, h, t, n)
    hidden = torch.arange(k.shape[3], device=k.device) > positions[:, :, None, :, None]
    return values.masked_fill(hidden, -math.inf).softmax(-1).amax(-1)
