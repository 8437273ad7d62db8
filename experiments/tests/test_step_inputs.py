from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from experiments.shared import step_inputs
from experiments.shared.config import RunConfig
from experiments.shared.data import Corpus, train_batch
from experiments.shared.optim import learning_rate
from experiments.shared.step_inputs import StepInputs

Tiny = Callable[..., RunConfig]


@pytest.mark.parametrize("start", [0, 3, 5, 8])
def test_the_tables_give_each_step_its_batch_and_rate(
    tiny: Tiny, corpus: Corpus, monkeypatch: pytest.MonkeyPatch, start: int
):
    monkeypatch.setattr(step_inputs, "BLOCK", 4)
    config = tiny(steps=11, seed=7)
    inputs = StepInputs(config, corpus, torch.device("cpu"))
    for step in range(start, config.steps):
        inputs.seek(step)
        assert torch.equal(inputs.batch(), train_batch(corpus, config.batch_size, config.seq_len, 7, step))
        assert float(inputs.rate()) == pytest.approx(learning_rate(config, step))
        inputs.advance()
        inputs.count()


def test_a_step_taken_twice_is_found_again(tiny: Tiny, corpus: Corpus):
    config = tiny()
    inputs = StepInputs(config, corpus, torch.device("cpu"))
    for step in (2, 5, 2, 0):
        inputs.seek(step)
        assert torch.equal(inputs.batch(), train_batch(corpus, config.batch_size, config.seq_len, 0, step))
