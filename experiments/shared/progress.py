"""The progress bar, and the estimate of how long all of it takes."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable

from tqdm import tqdm

from .train import Trainer

ESTIMATE_AFTER = 20  # steps: enough to leave the slow first ones behind
LOG_FILE_INTERVAL_S = 15  # where nobody watches, a line now and then


class Progress:
    """One bar over all steps of all runs; `advance` after each step."""

    def __init__(self, total_steps: int, announce: Callable[[str], None] | None = None) -> None:
        interval = 0.2 if sys.stderr.isatty() else LOG_FILE_INTERVAL_S
        self._bar = tqdm(total=total_steps, unit="step", mininterval=interval, maxinterval=interval, dynamic_ncols=True)
        self._announce = announce or self._bar.write
        self._trained = 0
        self._began = 0.0

    def advance(self, _trainer: Trainer) -> None:
        self._bar.update()
        self._trained += 1
        if self._trained == ESTIMATE_AFTER // 2:
            self._began = time.perf_counter()
        if self._trained == ESTIMATE_AFTER:
            self._estimate()

    def add(self, steps: int) -> None:
        """Steps of runs that take turns; the bar estimates for itself."""
        self._bar.update(steps)

    def label(self, text: str) -> None:
        self._bar.set_description(text, refresh=False)

    def skip(self, steps: int) -> None:
        """Steps that an earlier call of the program has done."""
        self._bar.initial += steps
        self._bar.update(steps)

    def close(self) -> None:
        self._bar.close()

    def _estimate(self) -> None:
        seconds = (time.perf_counter() - self._began) / (ESTIMATE_AFTER - ESTIMATE_AFTER // 2)
        remaining = (self._bar.total - self._bar.n) * seconds
        self._announce(
            f"about {seconds * 1000:.0f} ms a step: the remaining {self._bar.total - self._bar.n:,} steps "
            f"will take about {remaining / 60:.1f} minutes, validation aside"
        )
