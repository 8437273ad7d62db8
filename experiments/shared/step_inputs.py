"""What changes from step to step, kept on the device: where the batch's windows start, the learning rate, the step.

A captured graph replays the same reads of the same memory, so it finds its batch through a counter that it advances
itself. The ordinary loop reads the same tables: the same bytes in the same order either way.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .config import RunConfig
from .data import Corpus, train_starts
from .optim import learning_rate

BLOCK = 512  # steps in the tables at one time


class StepInputs:
    """`seek(step)` before each step, from the host; `batch`, `rate` and `advance` in the step, on the device."""

    def __init__(self, config: RunConfig, corpus: Corpus, device: torch.device) -> None:
        self._config = config
        self._corpus = corpus
        self._text = corpus.train_on(device)
        self._starts = torch.zeros(BLOCK, config.batch_size, dtype=torch.int64, device=device)
        self._rates = torch.zeros(BLOCK, dtype=torch.float32, device=device)
        self._offsets = torch.arange(config.seq_len + 1, device=device)
        self._row = torch.zeros(1, dtype=torch.int64, device=device)
        self._expected = -1  # the step that the device's counter stands at

    def seek(self, step: int) -> None:
        """Makes `step` the current one; free of work if it follows the last one within a block."""
        if step == self._expected and step % BLOCK:
            return
        config, first = self._config, step - step % BLOCK
        steps = range(first, min(first + BLOCK, config.steps))
        starts = [train_starts(self._corpus, config.batch_size, config.seq_len, config.seed, later) for later in steps]
        self._starts[: len(steps)].copy_(torch.stack(starts))
        self._rates[: len(steps)].copy_(torch.tensor([learning_rate(config, later) for later in steps]))
        self._row.fill_(step - first)
        self._expected = step

    def advance(self) -> None:
        """The device goes on to the next step."""
        self._row += 1

    def count(self) -> None:
        """The host notes that a step was launched."""
        self._expected += 1

    def batch(self) -> Tensor:
        """(batch_size, seq_len + 1) int64."""
        starts = self._starts.index_select(0, self._row).flatten()
        return self._text[starts[:, None] + self._offsets].long()

    def rate(self) -> Tensor:
        """() float32."""
        return self._rates.index_select(0, self._row).squeeze(0)
