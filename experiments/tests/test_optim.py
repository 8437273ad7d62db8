from __future__ import annotations

import pytest
import torch

from experiments.shared.config import RunConfig
from experiments.shared.model import build_model
from experiments.shared.optim import StepTimer, learning_rate, make_optimizer


def test_the_learning_rate_rises_then_falls_to_a_tenth():
    config = RunConfig(steps=100, warmup=10, lr=1.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert rates[9] == max(rates)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (1, 1), (5, 5), (5, 20)])
def test_short_runs_have_a_learning_rate(steps: int, warmup: int):
    config = RunConfig(steps=steps, warmup=warmup, lr=1.0)
    assert all(0 < learning_rate(config, step) <= 1 for step in range(steps))


def test_gains_and_biases_do_not_decay():
    config = RunConfig(dim=32, heads=2, depth=1)
    model = build_model(config)
    decaying, still = make_optimizer(model, config).param_groups
    assert (decaying["weight_decay"], still["weight_decay"]) == (config.weight_decay, 0)
    assert {parameter.ndim for parameter in decaying["params"]} == {2}
    assert len(decaying["params"]) + len(still["params"]) == len(list(model.parameters()))


def test_the_timer_counts_whole_stretches_only():
    timer = StepTimer(torch.device("cpu"))
    assert timer.median_ms() is None
    timer.start()
    timer.stop()  # no step in it
    assert timer.median_ms() is None
    timer.start()
    timer.count_step()
    timer.stop()
    assert timer.median_ms() is not None
