"""What bench_cpu.py times: cases of self-attention with head dim 64, and the ways to compute them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from flash_cosine_sim_attention import flash_cosine_sim_attention, plain_cosine_sim_attention
from torch import Tensor

SCALE, HEAD_DIM = 8.0, 64
LENGTHS = (512, 1024, 2048, 4096, 8192)
KINDS = ("full", "causal", "mask", "mask causal", "bias", "bias gradient")
PASSES = ("forward", "forward + backward")
WORK = 8192
"""heads * length, at most 8 heads: plain attention then needs about 1.5 GB at 8192."""

Attention = Callable[["Inputs"], Tensor]


@dataclass(frozen=True)
class Case:
    """q, k, v (1, heads, length, 64)."""

    length: int
    kind: str
    dtype: str = "float32"

    @property
    def heads(self) -> int:
        return max(min(8, WORK // self.length), 1)

    def __str__(self) -> str:
        return f"{self.kind}, {self.dtype}, {self.heads} heads x {self.length}"


@dataclass(frozen=True)
class Inputs:
    """The tensors of a case; leaves are those that get a gradient."""

    case: Case
    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor
    mask: Tensor | None  # (1, length), a quarter hidden
    bias: Tensor | None  # (heads, length, length)

    @classmethod
    def of(cls, case: Case, seed: int = 0) -> Inputs:
        generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, case.dtype)
        shape, pairs = (1, case.heads, case.length, HEAD_DIM), (case.heads, case.length, case.length)
        q, k, v, dout = (torch.randn(shape, generator=generator).to(dtype) for _ in range(4))
        mask = torch.rand(1, case.length, generator=generator) < 0.75 if "mask" in case.kind else None
        bias = torch.randn(pairs, generator=generator).to(dtype) if "bias" in case.kind else None
        inputs = cls(case, q, k, v, dout, mask, bias)
        for leaf in inputs.leaves():
            leaf.requires_grad_()
        return inputs

    def leaves(self) -> list[Tensor]:
        leaves = [self.q, self.k, self.v]
        return [*leaves, self.bias] if self.case.kind == "bias gradient" and self.bias is not None else leaves

    @property
    def causal(self) -> bool:
        return "causal" in self.case.kind


def ours(x: Inputs) -> Tensor:
    out = flash_cosine_sim_attention(x.q, x.k, x.v, x.mask, x.bias, scale=SCALE, causal=x.causal)
    assert isinstance(out, Tensor)
    return out


def chunked(x: Inputs) -> Tensor:
    out = flash_cosine_sim_attention(x.q, x.k, x.v, x.mask, x.bias, scale=SCALE, causal=x.causal, backend="chunked")
    assert isinstance(out, Tensor)
    return out


def normalize_and_sdpa(x: Inputs) -> Tensor:
    """What one would write with torch alone. A mask and causality together need an n x n mask."""
    q, k = F.normalize(x.q, dim=-1), F.normalize(x.k, dim=-1)
    mask = None if x.mask is None else x.mask[:, None, None, :]
    mask = mask if x.bias is None else x.bias[None]  # of 3 dims it would be served by the n x n computation
    if x.causal and mask is not None:
        mask = mask & torch.ones(x.case.length, x.case.length, dtype=torch.bool).tril()
    is_causal = x.causal and mask is None
    return F.scaled_dot_product_attention(q, k, x.v, attn_mask=mask, is_causal=is_causal, scale=SCALE)


def plain(x: Inputs) -> Tensor:
    out = plain_cosine_sim_attention(x.q, x.k, x.v, x.mask, x.bias, scale=SCALE, causal=x.causal)
    assert isinstance(out, Tensor)
    return out


VARIANTS: dict[str, Attention] = {
    "ours": ours,
    "chunked": chunked,
    "normalize + sdpa": normalize_and_sdpa,
    "plain": plain,
}


def run_of(attention: Attention, x: Inputs, which: str) -> Callable[[], object]:
    """One pass as a function without arguments."""

    def forward() -> Tensor:
        with torch.no_grad():
            return attention(x)

    def forward_backward() -> tuple[Tensor, ...]:
        return torch.autograd.grad(attention(x), x.leaves(), x.dout)

    return forward if which == "forward" else forward_backward
