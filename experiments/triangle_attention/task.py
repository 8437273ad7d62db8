"""Distance completion: some distances between hidden points are known, noisily; give the others.

Points are uniform in the unit cube, and each pair is known with the same probability. A missing pair itself says
nothing: a network that treats pairs one by one cannot do better than the mean distance. The other two edges of its
triangles do say something: |d_ik - d_jk| <= d_ij <= d_ik + d_jk for every k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Task:
    """The default: half of the pairs of 24 to 48 points in 3 dimensions, one per cent of noise."""

    points: int = 48
    fewest: int = 24  # samples have fewest to `points` points, the rest is padding
    dims: int = 3
    known: float = 0.5
    noise: float = 0.01  # of the cube's edge


@dataclass(frozen=True)
class Batch:
    features: Tensor  # (b, n, n, 2) float32: noisy distance or 0; 1 = known
    mask: Tensor  # (b, n, n) bool: both points exist
    target: Tensor  # (b, n, n) float32: distance
    missing: Tensor  # (b, n, n) bool: what is asked for


def make_batch(task: Task, size: int, generator: torch.Generator) -> Batch:
    """A batch of `size` samples on the device of `generator`; it follows from the state of `generator` alone."""
    device, n = generator.device, task.points

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator, device=device)

    points = uniform(size, n, task.dims)
    target = (points[:, :, None] - points[:, None]).square().sum(-1).clamp_min(1e-12).sqrt()
    upper = torch.ones(n, n, device=device).triu(1)
    drawn, noise = (x * upper + (x * upper).mT for x in (uniform(size, n, n), _normal(generator, size, n, n)))
    diagonal = torch.eye(n, dtype=torch.bool, device=device)
    known = (drawn < task.known) | diagonal
    target = target.masked_fill(diagonal, 0.0)
    counts = task.fewest + (uniform(size) * (n - task.fewest + 1)).long().clamp_max(n - task.fewest)
    exists = torch.arange(n, device=device) < counts[:, None]
    mask = exists[:, :, None] & exists[:, None]
    known = known & mask
    features = torch.stack([(target + task.noise * noise) * known, known.float()], dim=-1)
    return Batch(features, mask, target, mask & ~known)


def constant_rmse(batch: Batch) -> float:
    """Of the best constant, the mean over what is missing: the bound for a network that treats pairs one by one."""
    return batch.target[batch.missing].std(unbiased=False).item()


def triangle_bounds_rmse(batch: Batch) -> float:
    """Of the middle between max_k |d_ik - d_jk| and min_k d_ik + d_kj over known edges: completion without learning."""
    distance, known = batch.features.unbind(-1)
    upper = torch.full_like(distance, torch.inf)
    lower = torch.zeros_like(distance)
    for k in range(distance.shape[-1]):  # (i, k) and (k, j) beside (i, j)
        one, other = distance[:, :, k, None], distance[:, None, k]
        both = (known[:, :, k, None] * known[:, None, k]) > 0
        upper = torch.where(both, torch.minimum(upper, one + other), upper)
        lower = torch.where(both, torch.maximum(lower, (one - other).abs()), lower)
    error = ((lower + upper) / 2 - batch.target)[batch.missing]
    return error[error.isfinite()].square().mean().sqrt().item()


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, device=generator.device)
