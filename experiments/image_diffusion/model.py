"""A small diffusion transformer (DiT, Peebles and Xie 2023, adaLN-zero), as an ensemble; every pixel is a token.

The condition, noise level and class, sets the scale, shift and gate of every block; gates start at zero, so that every
block starts as the identity. Positions are fixed sines in two dimensions, as there. Blocks have no biases but those of
the condition.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..shared.attend import FIRST_SCALE, AttentionArm, attend
from ..shared.ensemble import Init, Weights, embed, linear, matrix
from .config import ImageConfig
from .data import CLASSES, SIDE

LEVEL_FEATURES = 64  # sines of the noise level
MLP_RATIO = 4


def dit_inits(config: ImageConfig, arm: AttentionArm) -> dict[str, Init]:
    """Every arm draws the same first weights: a learned scale draws none and comes last."""
    d = config.dim
    inits = {"pixel": Init((d,), 1.0), "pixel_bias": Init((d,)), "class": Init((CLASSES, d), 0.5)}
    inits |= {"level1": matrix(LEVEL_FEATURES, d), "level1_bias": Init((d,))}
    inits |= {"level2": matrix(d, d), "level2_bias": Init((d,))}
    for layer in range(config.depth):
        inits |= {f"{layer}.{name}": init for name, init in _block_inits(d).items()}
    inits |= {"last_condition": Init((d, 2 * d)), "last_condition_bias": Init((2 * d,))}
    inits |= {"last": Init((d, 1)), "last_bias": Init((1,))}
    if arm.learned:
        inits |= {f"{i}.log_scale": Init((config.heads,), mean=math.log(FIRST_SCALE)) for i in range(config.depth)}
    return inits


def _block_inits(d: int) -> dict[str, Init]:
    return {
        "condition": Init((d, 6 * d)),
        "condition_bias": Init((6 * d,)),
        "qkv": matrix(d, 3 * d),
        "out": matrix(d, d),
        "up": matrix(d, MLP_RATIO * d),
        "down": matrix(MLP_RATIO * d, d),
    }


class DiT:
    """The model of one arm: a function of weights."""

    def __init__(self, config: ImageConfig, arm: AttentionArm, device: torch.device | str) -> None:
        self.config, self.arm = config, arm
        self._positions = _positions(config.dim).to(device)  # (64, d)
        half = torch.arange(LEVEL_FEATURES // 2, device=device) / (LEVEL_FEATURES // 2)
        self._frequencies = torch.exp(-math.log(10_000) * half)

    def __call__(self, weights: Weights, images: Tensor, levels: Tensor, labels: Tensor) -> Tensor:
        """images (s, b, 64), levels (s, b) int64, labels (s, b) int64 -> the noise in the images (s, b, 64) float32."""
        condition = self._condition(weights, levels, labels)  # (s, b, d)
        pixels = images[..., None] * weights["pixel"][:, None, None] + weights["pixel_bias"][:, None, None]
        x = pixels + self._positions  # (s, b, 64, d) float32, so that little noise is not lost in the pixels' rounding
        for layer in range(self.config.depth):
            x = self._block(weights, str(layer), x, condition)
        shift, scale = _modulation(weights, "last_condition", condition, 2)
        return linear(_adapt(x, shift, scale), weights["last"], weights["last_bias"]).float()[..., 0]

    def _condition(self, weights: Weights, levels: Tensor, labels: Tensor) -> Tensor:
        angles = levels[..., None] * self._frequencies
        sines = torch.cat([angles.cos(), angles.sin()], dim=-1)
        hidden = F.silu(linear(sines, weights["level1"], weights["level1_bias"]))
        level = linear(hidden, weights["level2"], weights["level2_bias"])
        return F.silu(level + embed(labels, weights["class"]))

    def _block(self, weights: Weights, layer: str, x: Tensor, condition: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = _modulation(weights, f"{layer}.condition", condition, 6)
        x = x + gate1 * self._attention(weights, layer, _adapt(x, shift1, scale1))
        hidden = F.gelu(linear(_adapt(x, shift2, scale2), weights[f"{layer}.up"]))
        return x + gate2 * linear(hidden, weights[f"{layer}.down"])

    def _attention(self, weights: Weights, layer: str, x: Tensor) -> Tensor:
        qkv = linear(x, weights[f"{layer}.qkv"])
        heads = qkv.unflatten(-1, (3, self.config.heads, -1)).permute(3, 0, 1, 4, 2, 5)  # (3, s, b, h, n, d)
        q, k, v = heads.unbind(0)
        out = attend(self.arm, q, k, v, log_scale=weights.get(f"{layer}.log_scale"))
        return linear(out.transpose(2, 3).flatten(-2), weights[f"{layer}.out"])


def _modulation(weights: Weights, name: str, condition: Tensor, parts: int) -> tuple[Tensor, ...]:
    """`parts` tensors (s, b, 1, d), the same for all pixels."""
    return linear(condition, weights[name], weights[f"{name}_bias"])[:, :, None].chunk(parts, dim=-1)


def _adapt(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Layer norm without gains of its own, then the condition's; in the dtype of the condition."""
    return torch.addcmul(shift, F.layer_norm(x, x.shape[-1:]).to(shift.dtype), 1 + scale)


def _positions(dim: int) -> Tensor:
    """(64, dim): sines and cosines of the row in one half, of the column in the other."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(dim // 4) / (dim // 4))
    angles = torch.arange(SIDE)[:, None] * frequencies
    line = torch.cat([angles.sin(), angles.cos()], dim=-1)  # (8, dim / 2)
    rows = line[:, None].expand(SIDE, SIDE, -1)
    return torch.cat([rows, rows.transpose(0, 1)], dim=-1).flatten(0, 1)
