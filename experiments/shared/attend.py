"""The attention of an arm, for ensembles: torch's softmax of scaled dot products, or cosine-sim attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from flash_cosine_sim_attention import flash_cosine_sim_attention
from torch import Tensor

KINDS = ("regular", "cosine", "cosine-torch")
LARGEST_SCALE = 100.0  # of a learned one, as in Swin Transformer V2 (Liu et al. 2022)
FIRST_SCALE = 10.0  # likewise


@dataclass(frozen=True)
class AttentionArm:
    """Which attention a model has: what an experiment's arms differ in.

    kind: "regular": softmax(q k / sqrt(d)) v; "cosine": softmax(scale * cos(q, k)) v by `flash_cosine_sim_attention`;
        "cosine-torch": the same by F.normalize and torch's own attention, to tell a kernel from its mathematics.
    scale: factor of the cosine; 0 learns one a head, starting from 10.
    groups: of the l2 norm: the logits reach scale * groups.
    """

    kind: str = "regular"
    scale: float = 8.0
    groups: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.scale < 0 or self.groups < 1:
            raise ValueError(f"expected scale >= 0 and groups >= 1, got {self.scale} and {self.groups}")
        if self.kind == "cosine-torch" and self.learned:
            raise ValueError("scale: expected a fixed one for cosine-torch, got 0 (learned)")

    @property
    def learned(self) -> bool:
        return self.kind != "regular" and self.scale == 0

    @property
    def bound(self) -> float:
        """The largest logit; inf for regular attention, and what a learned scale may grow to."""
        if self.kind == "regular":
            return math.inf
        return (LARGEST_SCALE if self.learned else self.scale) * self.groups


def learned_scale(log_scale: Tensor) -> Tensor:
    """exp of the weight, at most 100."""
    return log_scale.clamp(max=math.log(LARGEST_SCALE)).exp()


def attend(
    arm: AttentionArm,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = False,
    log_scale: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """q, k, v: (s, b, h, n, d) -> (s, b, h, n, d). All logits are multiplied by `factor`.

    log_scale: (s, h), logarithm of the learned scale of each member's heads.
    """
    if arm.kind == "regular":
        return _sdpa(q, k, v, factor / math.sqrt(q.shape[-1]), causal)
    if arm.kind == "cosine-torch":
        return _sdpa(unit(q, arm.groups), unit(k, arm.groups), v, arm.scale * factor, causal)
    if not arm.learned:
        return _fused(q, k, v, arm.scale * factor, arm.groups, causal)
    assert log_scale is not None
    scale = learned_scale(log_scale.float()).flatten() * factor
    q, k, v = (x.transpose(0, 1).flatten(1, 2) for x in (q, k, v))  # (b, s h, n, d): one scale a head
    out = _fused(q, k, v, scale, arm.groups, causal)
    return out.unflatten(1, log_scale.shape).transpose(0, 1)


def logits(arm: AttentionArm, q: Tensor, k: Tensor, log_scale: Tensor | None = None, factor: float = 1.0) -> Tensor:
    """(s, b, h, i, j) float32: what `attend` takes the softmax of, written out for looking at a few queries."""
    q, k = q.float(), k.float()
    if arm.kind == "regular":
        return q @ k.transpose(-1, -2) * (factor / math.sqrt(q.shape[-1]))
    cosines = unit(q, arm.groups) @ unit(k, arm.groups).transpose(-1, -2)
    if log_scale is None:
        return cosines * (arm.scale * factor)
    return cosines * (learned_scale(log_scale.float())[:, None, :, None, None] * factor)


def unit(x: Tensor, groups: int) -> Tensor:
    """x (..., d) with each of `groups` chunks of d at unit norm."""
    return F.normalize(x.float().unflatten(-1, (groups, -1)), dim=-1).flatten(-2).to(x.dtype)


def _fused(q: Tensor, k: Tensor, v: Tensor, scale: float | Tensor, groups: int, causal: bool) -> Tensor:
    out = flash_cosine_sim_attention(q, k, v, scale=scale, groups=groups, causal=causal)
    assert isinstance(out, Tensor)
    return out


def _sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool) -> Tensor:
    members = q.shape[0]
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale).unflatten(0, (members, -1))


def compute_dtype(device: torch.device | str) -> torch.dtype:
    """bfloat16 on a GPU, where that is what models train in; float32 on the CPU."""
    return torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32
