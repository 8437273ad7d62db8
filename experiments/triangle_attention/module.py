"""Triangle attention around the starting and the ending node of a pair representation, in cosine form.

Jumper et al. 2021 (AlphaFold 2, supplementary methods), Algorithms 13 and 14. A pair (i, j) reads the pairs (i, k) that
share its first node; how much it reads is biased by the third edge (j, k) of the triangle:

    out_ij = gate_ij * sum_k softmax_k(scale * cos(q_ij, k_ik) + bias_jk) v_ik         starting node
    out_ij = gate_ij * sum_k softmax_k(scale * cos(q_ij, k_kj) + bias_ki) v_kj         ending node

The ending node is the starting node of the transposed representation. Where AlphaFold divides dot products by sqrt(d),
q and k are l2-normalised here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from flash_cosine_sim_attention import flash_cosine_sim_attention
from torch import Tensor, nn

Node = Literal["starting", "ending"]

Attention = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, float], Tensor]
"""(q, k, v, mask, bias, scale) -> out. q, k, v, out (b, rows, h, n, d); mask bool (b, rows, n), True = attend;
bias (b, 1, h, n, n): one for all rows."""


def fused_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:  # fmt: skip
    """This repository's: norm, mask, bias and the bias gradient's sum over rows are one pass; nothing n x n per row."""
    out = flash_cosine_sim_attention(q, k, v, mask, bias, scale)
    assert isinstance(out, Tensor)
    return out


def plain_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None, scale: float
) -> Tensor:  # fmt: skip
    """The same, written out: the logits (b, rows, h, n, n) and their softmax are stored."""
    logits = scale * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)
    logits = logits if bias is None else logits + bias
    if mask is None:
        return logits.softmax(-1).to(v.dtype) @ v
    visible = mask[:, :, None, None]
    weights = logits.masked_fill(~visible, -torch.inf).softmax(-1)
    return weights.masked_fill(~visible, 0.0).to(v.dtype) @ v  # a row that sees nothing: 0 instead of NaN


ATTENTIONS: dict[str, Attention] = {"fused": fused_attention, "plain": plain_attention}


class TriangleAttention(nn.Module):
    """The update of a pair representation by one of the two nodes; the caller adds it to the representation.

    Args:
        dim: channels of the pair representation.
        heads, dim_head: AlphaFold has 4 heads of 32.
        node: "starting" or "ending".
        scale: factor of the cosine.
        attention: a name of ATTENTIONS, or a function.
        pair_bias: False leaves the third edge out: attention along an axis, for comparison.
    """

    def __init__(
        self,
        dim: int = 128,
        heads: int = 4,
        dim_head: int = 32,
        node: Node = "starting",
        scale: float = 8.0,
        attention: str | Attention = "fused",
        pair_bias: bool = True,
    ) -> None:
        super().__init__()
        if node not in ("starting", "ending"):
            raise ValueError(f"node: expected 'starting' or 'ending', got {node!r}")
        self.heads, self.node, self.scale = heads, node, scale
        self.attention = ATTENTIONS[attention] if isinstance(attention, str) else attention
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_bias = nn.Linear(dim, heads, bias=False) if pair_bias else None
        self.to_gate = nn.Linear(dim, heads * dim_head)
        self.to_out = nn.Linear(heads * dim_head, dim)
        nn.init.zeros_(self.to_gate.weight)
        nn.init.ones_(self.to_gate.bias)  # open at first, and the update is zero, as AlphaFold starts
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, pair: Tensor, mask: Tensor | None = None) -> Tensor:
        """pair (b, n, n, dim), mask bool (b, n, n), True = the pair exists -> update (b, n, n, dim).

        Raises ValueError for a pair representation that is not square, and for a mask of another shape.
        """
        _check(pair, mask)
        if self.node == "ending":
            pair, mask = pair.transpose(1, 2), None if mask is None else mask.transpose(1, 2)
        update = self._starting(self.norm(pair), mask)
        return update.transpose(1, 2) if self.node == "ending" else update

    def _starting(self, pair: Tensor, mask: Tensor | None) -> Tensor:
        heads = (self.heads, -1)
        q, k, v = (
            x.unflatten(-1, heads).transpose(2, 3) for x in self.to_qkv(pair).chunk(3, dim=-1)
        )  # (b, i, h, j, d)
        bias = None if self.to_bias is None else self.to_bias(pair).permute(0, 3, 1, 2).unsqueeze(1)  # (b, 1, h, j, k)
        out = self.attention(q, k, v, mask, bias, self.scale).transpose(2, 3).flatten(-2)  # (b, i, j, h d)
        return self.to_out(self.to_gate(pair).sigmoid() * out)


def _check(pair: Tensor, mask: Tensor | None) -> None:
    if pair.ndim != 4 or pair.shape[1] != pair.shape[2]:
        raise ValueError(f"pair: expected (b, n, n, dim), got {tuple(pair.shape)}")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != pair.shape[:3]):
        raise ValueError(f"mask: expected bool {tuple(pair.shape[:3])}, got {mask.dtype} {tuple(mask.shape)}")
