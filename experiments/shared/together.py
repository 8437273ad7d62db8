"""Many runs at once on one GPU. One small model leaves most of it idle; eight on streams of their own fill it."""

from __future__ import annotations

import re
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .config import RunConfig
from .data import Corpus
from .train import Trainer, TrainingDivergedError


@dataclass(frozen=True)
class Job:
    """One run of an experiment: an arm with its learning rate and seed."""

    arm: str
    config: RunConfig

    @property
    def name(self) -> str:
        """Of its checkpoint."""
        arm = re.sub(r"[^\w.]+", "-", self.arm)
        return f"{arm}-lr{self.config.lr:g}-seed{self.config.seed}"


@dataclass
class Observer:
    """What the caller wants to hear of: steps launched, and each run's result as soon as there is one."""

    steps: Callable[[int], None]
    result: Callable[[Job, dict[str, Any]], None]


def run_together(
    jobs: Iterable[Job],
    corpus: Corpus,
    checkpoints: Path,
    together: int,
    should_stop: Callable[[], bool],
    observer: Observer,
) -> bool:
    """Trains all jobs in their order, `together` of them at a time, in turns. False if it was stopped, runs saved.

    One process with several streams, because the kernels of different processes never run at the same time; a turn is
    one step, because a stream takes only so many launches ahead, and a host that waits for one fills no other. A run
    whose loss is no number ends with a result that says so. Any other error ends that run alone, and is raised at the
    end.
    """
    waiting = deque(jobs)
    active: list[tuple[Job, Trainer]] = []
    failed: list[str] = []
    while waiting or active:
        if should_stop():
            for job, trainer in active:
                trainer.save(_checkpoint(checkpoints, job))
            return False
        if waiting and len(active) < together:  # one a turn: its first slow steps run while the others' are queued
            _attempt(waiting[0], failed, lambda job: active.append((job, _start(job, corpus, checkpoints, together))))
            waiting.popleft()
        for job, trainer in list(active):
            if not _attempt(job, failed, lambda job, trainer=trainer: _take_turn(job, trainer, observer)):  # type: ignore[misc]
                active.remove((job, trainer))
                _checkpoint(checkpoints, job).unlink(missing_ok=True)
    if failed:
        raise RuntimeError(f"{len(failed)} runs ended with an error, see above: {', '.join(failed)}")
    return True


def _start(job: Job, corpus: Corpus, checkpoints: Path, together: int) -> Trainer:
    trainer = Trainer(job.config, corpus, together=together > 1)
    if (path := _checkpoint(checkpoints, job)).exists():
        trainer.load(path)
    return trainer


def _take_turn(job: Job, trainer: Trainer, observer: Observer) -> bool:
    """Whether the run goes on."""
    try:
        trainer.run_one_step()
        observer.steps(1)
    except TrainingDivergedError:
        observer.result(job, {**trainer.result(), "val_bpb": None, "diverged_at": trainer.step})
        return False
    if trainer.finished:
        observer.result(job, trainer.result())
    return not trainer.finished


def _attempt(job: Job, failed: list[str], action: Callable[[Job], object]) -> bool:
    """False if the action said so, or raised: then the error is shown and the job noted."""
    try:
        return action(job) is not False
    except Exception:
        print(f"{job.name}:\n{traceback.format_exc()}", file=sys.stderr)
        failed.append(job.name)
        return False


def _checkpoint(checkpoints: Path, job: Job) -> Path:
    return checkpoints / f"{job.name}.pt"
