"""Parity of two ways to run one model: used by the tests, and by whoever wants to check a model of their own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from . import seam


@dataclass(frozen=True)
class Run:
    """A loss and the gradient of every parameter that got one."""

    loss: Tensor  # ()
    gradients: dict[str, Tensor]


@dataclass(frozen=True)
class Difference:
    """Largest absolute differences between two runs."""

    loss: float
    gradient: float
    parameter: str  # where the gradients differ most

    def within(self, tolerance: float) -> bool:
        return self.loss <= tolerance and self.gradient <= tolerance  # False for NaN


def run(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> Run:
    """Forward and backward of `call(model) -> loss ()`, from gradients of None."""
    model.zero_grad(set_to_none=True)
    loss = call(model)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return Run(loss.detach(), gradients)


def difference(a: Run, b: Run) -> Difference:
    """Raises ValueError when the two runs gave gradients to different parameters."""
    if a.gradients.keys() != b.gradients.keys():
        raise ValueError(f"gradients: parameters differ, {sorted(a.gradients.keys() ^ b.gradients.keys())}")
    largest, where = 0.0, ""
    for name, gradient in a.gradients.items():
        value = (gradient.double() - b.gradients[name].double()).abs().max().item()
        if not value <= largest:  # NaN counts as larger
            largest, where = value, name
    return Difference((a.loss.double() - b.loss.double()).abs().item(), largest, where)


def native_scale(scale: float) -> float:
    """The attn_qk_norm_scale of a native model whose logits are scale * cosine; before 2.26 it is applied thrice."""
    return scale if seam.queries_arrive_unit() else scale ** (1 / 3)


def random_loss(model: nn.Module, *args: Tensor, seed: int = 0, rows: Tensor | None = None, **kwargs: object) -> Tensor:
    """Mean over tokens of output . noise / sqrt(width): each entry gets its own upstream gradient, about as large as
    those of a mean cross entropy.

    rows: bool, shape of the output without its last dim: only these count (padded queries are nobody's business).
    """
    out = model(*args, **kwargs)
    out = out[0] if isinstance(out, tuple) else out
    noise = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed)).to(out)
    per_token = (out * noise).sum(-1) / out.shape[-1] ** 0.5
    return per_token.mean() if rows is None else per_token[rows].mean()
