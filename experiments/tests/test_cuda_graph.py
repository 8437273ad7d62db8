"""The trainer's side of a captured step, with a stand-in that runs the function instead of replaying its graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from experiments.shared.config import RunConfig
from experiments.shared.cuda_graph import GraphedCall
from experiments.shared.data import Corpus
from experiments.shared.train import Trainer

Tiny = Callable[..., RunConfig]


class StandIn(GraphedCall):
    replays = 0

    def capture(self, function: Callable[[], object]) -> None:
        self.function = function

    @property
    def captured(self) -> bool:
        return hasattr(self, "function")

    def replay(self) -> None:
        self.replays += 1
        self.function()


class Refusing(GraphedCall):
    def capture(self, function: Callable[[], object]) -> None:
        function()
        raise RuntimeError("operation not permitted when stream is capturing")


def with_graphs(config: RunConfig, corpus: Corpus, kind: type[GraphedCall]) -> Trainer:
    trainer = Trainer(config, corpus)
    trainer._step_graph, trainer._val_graph = kind(), kind()
    return trainer


def test_later_steps_and_validations_are_replayed(tiny: Tiny, corpus: Corpus):
    ordinary, graph = Trainer(tiny(), corpus), with_graphs(tiny(), corpus, StandIn)
    assert ordinary.run()
    assert graph.run()
    assert graph.rows == ordinary.rows
    steps, validations = graph._step_graph, graph._val_graph
    assert isinstance(steps, StandIn)
    assert isinstance(validations, StandIn)
    assert steps.replays == 8 - 3  # the first three are not
    assert validations.replays == 2 * 2 - 1  # twice, of two batches; the very first one is not


def test_a_capture_that_fails_is_said_and_the_run_goes_on(tiny: Tiny, corpus: Corpus):
    trainer = with_graphs(tiny(eval_every=100), corpus, Refusing)
    with pytest.warns(RuntimeWarning, match="no CUDA graph, the run goes on without: operation not permitted"):
        assert trainer.run()
    assert trainer._step_graph is None
    assert trainer.rows[-1]["step"] == 8


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "bf16"), ("cuda", "fp16")])
def test_where_there_is_no_capture_it_is_refused(device: str, dtype: str):
    with pytest.raises(ValueError, match=r"cuda_graph: expected a CUDA device and fp32 or bf16 .* got"):
        RunConfig(cuda_graph=True, device=device, dtype=dtype)
