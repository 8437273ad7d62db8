"""Many seeds of one small model trained as one: a leading member axis `s`, batched products, one flat weight tensor.

A small model leaves a GPU idle between launches. The members of an ensemble share every launch and nothing else: their
weights, batches, losses, clipped gradients and optimiser states are separate, so that a member learns what it would
learn alone (tests/test_ensemble.py). All weights lie in one tensor (s, p), so that clipping, AdamW and averaging are
one launch each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Weights = dict[str, Tensor]  # name -> (s, *shape)


@dataclass(frozen=True)
class Init:
    """A weight of one member: its shape, and the normal distribution that it is drawn from."""

    shape: tuple[int, ...]
    std: float = 0.0
    mean: float = 0.0


def matrix(fan_in: int, fan_out: int, gain: float = 1.0) -> Init:
    """(fan_in, fan_out), for `linear`; gain 0 starts at zero."""
    return Init((fan_in, fan_out), gain / math.sqrt(fan_in))


class Members:
    """The weights of all members. `flat`: (s, p) float32, a leaf; `seeds`: one a member, deciding its first weights."""

    def __init__(self, inits: Mapping[str, Init], seeds: Sequence[int], device: torch.device | str) -> None:
        self.inits = dict(inits)
        self.seeds = tuple(seeds)
        rows = torch.stack([self._draw(seed) for seed in seeds])
        self.flat = rows.to(device).requires_grad_()

    def unpack(self, flat: Tensor, dtype: torch.dtype = torch.float32) -> Weights:
        """Views of `flat` by name; its gradient comes back as one concatenation."""
        sizes = [math.prod(init.shape) for init in self.inits.values()]
        parts = flat.to(dtype).split(sizes, dim=1)
        named = zip(self.inits.items(), parts, strict=True)
        return {name: part.unflatten(1, init.shape) if init.shape else part[:, 0] for (name, init), part in named}

    @property
    def parameters_each(self) -> int:
        return self.flat.shape[1]

    def _draw(self, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        drawn = [
            init.mean + init.std * torch.randn(math.prod(init.shape), generator=generator)
            for init in self.inits.values()
        ]
        return torch.cat(drawn)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (s, ..., i), weight (s, i, o), bias (s, o) -> (s, ..., o), in the dtype of the weight."""
    rows = x.to(weight.dtype).flatten(1, -2)
    out = torch.bmm(rows, weight) if bias is None else torch.baddbmm(bias[:, None], rows, weight)
    return out.unflatten(1, x.shape[1:-1])


def embed(index: Tensor, table: Tensor) -> Tensor:
    """index (s, ...) int64, table (s, rows, d) -> (s, ..., d): each member reads its own table."""
    members, rows = table.shape[:2]
    first = torch.arange(members, device=index.device).view(-1, *[1] * (index.ndim - 1)) * rows
    return F.embedding(index + first, table.flatten(0, 1))


def per_member(values: Tensor) -> Tensor:
    """(s, ...) -> (s,): the mean of all that belongs to a member."""
    return values.float().flatten(1).mean(1)


def clip_per_member(gradient: Tensor, max_norm: float) -> tuple[Tensor, Tensor]:
    """gradient (s, p) with each member's norm brought down to at most `max_norm`, as clip_grad_norm_ does for one.

    Also the norms (s,) that they had.
    """
    norm = torch.linalg.vector_norm(gradient, dim=1)
    return gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0)[:, None], norm
