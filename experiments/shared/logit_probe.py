"""How large logits become: regular attention's are free, those of cosine-sim attention end at the bound."""

from __future__ import annotations

import torch
from torch import Tensor

from .attend import AttentionArm, logits
from .config import RunConfig

QUERIES = 256  # the last ones of a window, which see the most keys
TOKENS = 1024  # of each member


class LogitProbe:
    """The largest |logit| of each member over all layers and heads: `watch` is called in each layer."""

    def __init__(self, config: RunConfig) -> None:
        kind = "regular" if config.attention == "regular" else "cosine"
        self._arm = AttentionArm(kind, 0.0 if config.learned_scale else config.scale, config.groups)
        self._largest: Tensor | None = None

    def watch(self, q: Tensor, k: Tensor, log_scale: Tensor | None) -> None:
        """q, k: (s, b, h, n, d), causal."""
        n = q.shape[-2]
        first = max(0, n - QUERIES)
        found = logits(self._arm, q[..., first:, :], k, log_scale).abs()
        visible = torch.ones(n - first, n, dtype=torch.bool, device=q.device).tril(first)
        largest = torch.where(visible, found, 0.0).flatten(1).amax(1)
        self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    def take(self) -> list[float]:
        """Of each member, since the last call."""
        assert self._largest is not None, "expected watch() before take()"
        largest, self._largest = self._largest.tolist(), None
        return largest
