from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.shared.config import RunConfig
from experiments.shared.data import Corpus
from experiments.shared.together import Job, Observer, run_together
from experiments.shared.train import Trainer

Tiny = Callable[..., RunConfig]


class Notes:
    """What an observer hears."""

    def __init__(self) -> None:
        self.steps = 0
        self.results: dict[str, dict[str, Any]] = {}

    def observer(self) -> Observer:
        return Observer(self._count, self._note)

    def _count(self, steps: int) -> None:
        self.steps += steps

    def _note(self, job: Job, result: dict[str, Any]) -> None:
        assert job.name not in self.results
        self.results[job.name] = result


def jobs_of(tiny: Tiny) -> list[Job]:
    arms: dict[str, dict[str, Any]] = {
        "regular": {"attention": "regular"},
        "s 1": {"attention": "cosine", "scale": 1.0},
    }
    return [Job(arm, tiny(seed=seed, **differences)) for seed in (0, 1) for arm, differences in arms.items()]


def alone(config: RunConfig, corpus: Corpus) -> list[dict[str, Any]]:
    trainer = Trainer(config, corpus)
    trainer.run()
    return trainer.rows


@pytest.mark.parametrize("together", [1, 3])
def test_taking_turns_changes_nothing(tiny: Tiny, corpus: Corpus, tmp_path: Path, together: int):
    jobs, notes = jobs_of(tiny), Notes()
    assert run_together(jobs, corpus, tmp_path, together, lambda: False, notes.observer())
    assert notes.steps == len(jobs) * 8
    for job in jobs:
        assert notes.results[job.name]["rows"] == alone(job.config, corpus)
    assert not list(tmp_path.glob("*.pt"))


def test_stopped_and_started_again(tiny: Tiny, corpus: Corpus, tmp_path: Path):
    jobs, notes = jobs_of(tiny), Notes()
    turns = iter(range(100))
    assert not run_together(jobs, corpus, tmp_path, 3, lambda: next(turns) == 5, notes.observer())
    assert len(list(tmp_path.glob("*.pt"))) == 3
    rest = [job for job in jobs if job.name not in notes.results]
    assert run_together(rest, corpus, tmp_path, 3, lambda: False, notes.observer())
    assert notes.steps == len(jobs) * 8
    assert all(notes.results[job.name]["rows"] == alone(job.config, corpus) for job in jobs)


def test_a_diverged_run_is_a_result(tiny: Tiny, corpus: Corpus, tmp_path: Path):
    jobs, notes = [Job("wild", tiny(lr=1e30, warmup=0)), Job("tame", tiny())], Notes()
    assert run_together(jobs, corpus, tmp_path, 2, lambda: False, notes.observer())
    wild, tame = (notes.results[job.name] for job in jobs)
    assert wild["val_bpb"] is None
    assert wild["diverged_at"] > 0
    assert tame["val_bpb"] > 0


def test_an_error_ends_its_run_alone(tiny: Tiny, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    jobs, notes = [Job("bad", tiny(backend="sm80")), Job("good", tiny())], Notes()
    with pytest.raises(RuntimeError, match=r"1 runs ended with an error, see above: bad-lr0.003-seed0"):
        run_together(jobs, corpus, tmp_path, 1, lambda: False, notes.observer())
    assert "'sm80' cannot serve this call" in capsys.readouterr().err
    assert list(notes.results) == [jobs[1].name]


def test_learned_scales_are_learned(tiny: Tiny, corpus: Corpus):
    trainer = Trainer(tiny(attention="cosine", learned_scale=True, scale=4.0), corpus)
    trainer.run()
    scales = torch.tensor(trainer.result()["learned_scales"])
    assert scales.shape == (2, 2)  # layers, heads
    assert ((scales - 4).abs() > 1e-4).all()
    assert trainer.attention_calls().stock == 0
