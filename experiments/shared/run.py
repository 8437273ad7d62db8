"""One run in a folder of its own: train, checkpoint, resume, and the files that remain."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .config import RunConfig
from .data import Corpus
from .metrics import write_csv, write_json
from .progress import Progress
from .sample import sample_text
from .train import Trainer

CHECKPOINT = "checkpoint.pt"
RESULT = "result.json"


def run_one(
    config: RunConfig,
    corpus: Corpus,
    folder: Path,
    should_stop: Callable[[], bool],
    progress: Progress,
    resume: bool = False,
    checkpoint_every: int = 0,
) -> dict[str, Any] | None:
    """One run's result; None if it was stopped, its checkpoint saved.

    resume: take the result of a finished run, go on from a checkpoint, or start if there is neither.
    checkpoint_every: steps between checkpoints on the way; 0 saves at the end and when stopped only.
    """
    if resume and (done := _finished_result(folder, config, corpus)):
        progress.skip(config.steps)
        return done
    trainer = _prepare(config, corpus, folder, resume)
    progress.skip(trainer.step)

    def after_step(trainer: Trainer) -> None:
        progress.advance(trainer)
        if checkpoint_every and trainer.step % checkpoint_every == 0:
            trainer.save(folder / CHECKPOINT)

    finished = trainer.run(should_stop, after_step)
    trainer.save(folder / CHECKPOINT)
    return _write_result(trainer, folder) if finished else None


def _prepare(config: RunConfig, corpus: Corpus, folder: Path, resume: bool) -> Trainer:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESULT).unlink(missing_ok=True)
    trainer = Trainer(config, corpus)
    if not resume:
        (folder / CHECKPOINT).unlink(missing_ok=True)
    elif (folder / CHECKPOINT).exists():
        trainer.load(folder / CHECKPOINT)
    return trainer


def _finished_result(folder: Path, config: RunConfig, corpus: Corpus) -> dict[str, Any] | None:
    """The result in `folder`, if it is of this very configuration and corpus."""
    if not (folder / RESULT).exists():
        return None
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return result if (result["config"], result["corpus_sha256"]) == (config.to_dict(), corpus.sha256) else None


def _write_result(trainer: Trainer, folder: Path) -> dict[str, Any]:
    """result.json, metrics.csv and sample.txt of a finished run."""
    result = {**trainer.result(), "sample": sample_text(trainer)}
    write_csv(folder / "metrics.csv", trainer.rows)
    (folder / "sample.txt").write_text(result["sample"], encoding="utf-8")
    write_json(folder / RESULT, result)
    return result
