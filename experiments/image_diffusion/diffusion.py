"""Denoising diffusion (DDPM, Ho et al. 2020): the noise is predicted, its mean squared error is the loss.

Sampling is deterministic (DDIM, Song et al. 2021, eta = 0), so that a sample is a function of its first noise, and
arms can start from the same noise. The prediction of the clean image is clipped to the pixels' range, as usual.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Predict = Callable[[Tensor, Tensor, Tensor], Tensor]  # images (s, b, 64), levels (s, b), labels (s, b) -> noise
BETA_FIRST, BETA_LAST = 1e-4, 0.02  # the linear schedule there, at 1000 levels


def signal_shares(levels: int) -> Tensor:
    """(levels,) float64: the variance's share that is image at each level (alpha bar); level 0 has the least noise."""
    betas = torch.linspace(BETA_FIRST, BETA_LAST, levels, dtype=torch.float64) * (1000 / levels)
    return (1 - betas.clamp(max=0.999)).cumprod(0)


def add_noise(images: Tensor, noise: Tensor, shares: Tensor) -> Tensor:
    """images, noise (..., 64), shares (...)."""
    return images * shares[..., None].sqrt() + noise * (1 - shares[..., None]).sqrt()


def sample(predict: Predict, noise: Tensor, labels: Tensor, shares: Tensor, steps: int) -> Tensor:
    """noise (s, b, 64), labels (s, b) -> images (s, b, 64) in [-1, 1], by `steps` evenly spaced levels of `shares`."""
    stride = len(shares) // steps
    levels = list(range(stride - 1, len(shares), stride))[::-1]
    values = shares.tolist()
    x = noise
    for level, following in zip(levels, [*levels[1:], None], strict=True):
        here, there = values[level], 1.0 if following is None else values[following]
        predicted = predict(x, torch.full(labels.shape, level, device=x.device), labels)
        clean = ((x - (1 - here) ** 0.5 * predicted) / here**0.5).clamp(-1, 1)
        predicted = (x - here**0.5 * clean) / (1 - here) ** 0.5  # what the clipped image says
        x = there**0.5 * clean + (1 - there) ** 0.5 * predicted
    return x


def level_losses(predict: Predict, images: Tensor, labels: Tensor, shares: Tensor, count: int, members: int) -> Tensor:
    """(s, count) float64: the mean squared error at `count` evenly spaced levels, of fixed noise, the same for all."""
    generator = torch.Generator().manual_seed(1)
    stride = len(shares) // count
    losses = []
    for level in range(stride // 2, len(shares), stride):
        noise = torch.randn(images.shape, generator=generator).to(images.device)
        noised = add_noise(images, noise, shares[level].float().expand(len(images)))
        inputs = (x.expand(members, *x.shape) for x in (noised, torch.full_like(labels, level), labels))
        losses.append((predict(*inputs) - noise).double().square().mean((1, 2)))
    return torch.stack(losses, dim=1)
