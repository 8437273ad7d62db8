"""Loss scaling of float16 that never looks at the device, so that a captured step can use it."""

from __future__ import annotations

import torch
from torch import Tensor

FIRST, SMALLEST, LARGEST = 2.0**16, 2.0**-10, 2.0**24
GROWTH_INTERVAL = 200  # steps: a tenth of GradScaler's, whose trainings are longer


class LossScale:
    """One factor a member (Micikevicius et al. 2018, dynamic): halved where a gradient is not finite, doubled in time.

    `factor`: (s,); `skipped`: (s,) steps that a member did not take.
    """

    def __init__(self, members: int, device: torch.device | str) -> None:
        self.factor = torch.full((members,), FIRST, device=device)
        self.skipped = torch.zeros(members, dtype=torch.int64, device=device)
        self._finite_steps = torch.zeros_like(self.skipped)  # since the factor last changed

    def unscale(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """gradient (s, p) of the scaled losses -> that of the losses, 0 where not finite; and (s,) where it was."""
        finite = gradient.isfinite().all(1)
        return torch.where(finite[:, None], gradient / self.factor[:, None], 0.0), finite

    def update(self, finite: Tensor) -> None:
        """In place, after the step. finite: (s,) bool."""
        self.skipped += ~finite
        counted = torch.where(finite, self._finite_steps + 1, 0)
        grown = counted >= GROWTH_INTERVAL
        factor = torch.where(finite, torch.where(grown, self.factor * 2, self.factor), self.factor / 2)
        self.factor.copy_(factor.clamp(SMALLEST, LARGEST))
        self._finite_steps.copy_(torch.where(grown, 0, counted))
