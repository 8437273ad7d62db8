from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.shared import train
from experiments.shared.config import RunConfig
from experiments.shared.data import Corpus
from experiments.shared.train import Trainer, TrainingDivergedError

Tiny = Callable[..., RunConfig]


def trained(config: RunConfig, corpus: Corpus) -> Trainer:
    trainer = Trainer(config, corpus)
    assert trainer.run()
    return trainer


def assert_same_state(one: Trainer, other: Trainer) -> None:
    """Bit for bit: weights, the optimiser's moments, metrics."""
    assert one.step == other.step
    assert one.rows == other.rows
    for mine, theirs in zip(_tensors(one), _tensors(other), strict=True):
        assert torch.equal(mine, theirs)


def _tensors(trainer: Trainer) -> list[torch.Tensor]:
    moments = trainer.optimizer.state_dict()["state"].values()
    return [*trainer.model.state_dict().values(), *(value for moment in moments for value in moment.values())]


@pytest.mark.parametrize("stop_at", [1, 3, 4, 7])
@pytest.mark.parametrize(
    "options",
    [{"attention": "cosine", "dropout": 0.2}, {"attention": "regular", "dropout": 0.2}, {"dtype": "bf16"}],
    ids=["cosine", "regular", "bf16"],
)
def test_stopped_and_resumed_equals_never_stopped(
    tiny: Tiny, corpus: Corpus, tmp_path: Path, options: dict[str, Any], stop_at: int
):
    config = tiny(**options)
    straight = trained(config, corpus)
    first = Trainer(config, corpus)
    assert not first.run(should_stop=lambda: first.step == stop_at)
    first.save(tmp_path / "checkpoint.pt")
    torch.manual_seed(999)  # what another process would have
    second = Trainer(config, corpus)
    second.load(tmp_path / "checkpoint.pt")
    assert second.step == stop_at
    assert second.run()
    assert_same_state(second, straight)
    assert second.attention_calls() == straight.attention_calls()


def test_the_same_seed_gives_the_same_run_and_another_one_does_not(tiny: Tiny, corpus: Corpus):
    first, second, other = (trained(tiny(seed=seed), corpus) for seed in (4, 4, 5))
    assert_same_state(first, second)
    assert first.rows != other.rows


def test_every_arm_sees_the_same_bytes(tiny: Tiny, corpus: Corpus, monkeypatch: pytest.MonkeyPatch):
    seen: list[torch.Tensor] = []
    original = train.next_byte_loss

    def record(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
        seen.append(batch)
        return original(model, batch)

    monkeypatch.setattr(train, "next_byte_loss", record)
    for attention in ("regular", "cosine", "native"):
        trained(tiny(attention=attention), corpus)
    per_arm = len(seen) // 3
    for index in range(per_arm):
        assert torch.equal(seen[index], seen[per_arm + index])
        assert torch.equal(seen[index], seen[2 * per_arm + index])


def test_a_checkpoint_of_another_run_is_refused(tiny: Tiny, corpus: Corpus, tmp_path: Path):
    Trainer(tiny(), corpus).save(tmp_path / "checkpoint.pt")
    with pytest.raises(ValueError, match=r"of another run. scale: checkpoint 8.0, now 10.0; seed: checkpoint 0, now 1"):
        Trainer(tiny(scale=10.0, seed=1), corpus).load(tmp_path / "checkpoint.pt")
    other = Corpus("other", corpus.train, corpus.val, "another text")
    with pytest.raises(ValueError, match="corpus_sha256: checkpoint"):
        Trainer(tiny(), other).load(tmp_path / "checkpoint.pt")


def test_missing_and_foreign_checkpoints_are_named(tiny: Tiny, corpus: Corpus, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="expected a checkpoint at"):
        Trainer(tiny(), corpus).load(tmp_path / "none.pt")
    torch.save({"weights": 1}, tmp_path / "foreign.pt")
    with pytest.raises(ValueError, match="expected a checkpoint of version 1, got None"):
        Trainer(tiny(), corpus).load(tmp_path / "foreign.pt")


def test_metrics_of_every_logged_step(tiny: Tiny, corpus: Corpus):
    trainer = trained(tiny(steps=9, log_every=3, eval_every=4), corpus)
    assert [row["step"] for row in trainer.rows] == [3, 4, 6, 8, 9]
    assert [row["step"] for row in trainer.rows if "val_bpb" in row] == [4, 8, 9]
    assert all(row["tokens"] == row["step"] * 2 * 32 for row in trainer.rows)
    assert all(0 < row["train_bpb"] < 9 and row["grad_norm"] > 0 for row in trainer.rows)
    result = trainer.result()
    assert result["val_bpb"] == trainer.rows[-1]["val_bpb"]
    assert result["peak_memory"] > 4 * result["parameters"]
    assert result["ms_per_step"] > 0


def test_an_untrained_model_knows_about_nothing(tiny: Tiny, corpus: Corpus):
    assert Trainer(tiny(), corpus).evaluate() == pytest.approx(math.log2(256), abs=0.6)


@pytest.mark.parametrize("attention", ["regular", "cosine", "native"])
def test_it_learns(tiny: Tiny, corpus: Corpus, attention: str):
    trainer = trained(tiny(attention=attention, steps=60, lr=1e-2, eval_every=60, log_every=20, batch_size=4), corpus)
    assert trainer.rows[-1]["val_bpb"] < 4.8


def test_validation_leaves_training_alone(tiny: Tiny, corpus: Corpus):
    often, seldom = (trained(tiny(eval_every=every, dropout=0.2), corpus) for every in (1, 8))
    assert all(torch.equal(a, b) for a, b in zip(_tensors(often), _tensors(seldom), strict=True))


def test_a_loss_that_is_no_number_ends_the_run(tiny: Tiny, corpus: Corpus):
    trainer = Trainer(tiny(), corpus)
    next(trainer.model.parameters()).data.fill_(math.nan)
    with pytest.raises(TrainingDivergedError, match="the loss is nan at step 2"):
        trainer.run()
