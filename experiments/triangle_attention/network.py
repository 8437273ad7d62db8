"""A small stack of pair blocks, in the arms that the experiment compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .module import TriangleAttention


@dataclass(frozen=True)
class Arm:
    """What differs between two networks. attention None: pairs are treated one by one."""

    attention: str | None
    pair_bias: bool = True


ARMS = {
    "triangle, fused": Arm("fused"),
    "triangle, plain": Arm("plain"),
    "axial": Arm("fused", pair_bias=False),
    "pointwise": Arm(None),
}
"""axial: the same modules without the bias of the third edge. pointwise: without attention."""


class Transition(nn.Module):
    """AlphaFold's pair transition (Algorithm 15): a feed-forward network of each pair alone."""

    def __init__(self, dim: int, factor: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.expand = nn.Linear(dim, factor * dim)
        self.contract = nn.Linear(factor * dim, dim)

    def forward(self, pair: Tensor) -> Tensor:
        return self.contract(F.gelu(self.expand(self.norm(pair))))


class PairBlock(nn.Module):
    """Starting node, ending node, transition, each added to the representation."""

    def __init__(self, arm: Arm, dim: int, heads: int, dim_head: int) -> None:
        super().__init__()
        self.nodes = nn.ModuleList()
        if arm.attention is not None:
            options: dict[str, Any] = {"attention": arm.attention, "pair_bias": arm.pair_bias}
            self.nodes.append(TriangleAttention(dim, heads, dim_head, "starting", **options))
            self.nodes.append(TriangleAttention(dim, heads, dim_head, "ending", **options))
        self.transition = Transition(dim)

    def forward(self, pair: Tensor, mask: Tensor) -> Tensor:
        for node in self.nodes:
            pair = pair + node(pair, mask)
        return pair + self.transition(pair)


class PairNetwork(nn.Module):
    """features (b, n, n, 2), mask (b, n, n) -> distances (b, n, n), equal for (i, j) and (j, i)."""

    def __init__(self, arm: Arm, dim: int = 64, depth: int = 3, heads: int = 4, dim_head: int = 16) -> None:
        super().__init__()
        self.embed = nn.Linear(2, dim)
        self.blocks = nn.ModuleList(PairBlock(arm, dim, heads, dim_head) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        self.to_distance = nn.Linear(dim, 1)

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        pair = self.embed(features)
        for block in self.blocks:
            pair = block(pair, mask)
        distance = self.to_distance(self.norm(pair)).squeeze(-1).float()
        return (distance + distance.mT) / 2
