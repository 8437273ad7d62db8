"""A task's arms and seeds at once: train at one length, evaluate up to the longest, one JSON file a run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from ..shared.attend import AttentionArm, compute_dtype, learned_scale
from ..shared.captured import Batch, Lane, Pool, Schedule, seeded, train_lanes
from ..shared.ensemble import Members, Weights, per_member
from ..shared.environment import environment
from ..shared.waves import is_done, waves, write_result
from .config import SharpnessConfig
from .model import Decoder, Probe, decoder_inits, start_mimetic
from .tasks import TASKS, Sequences

PROBED = 4  # sequences of a member whose attention is looked at
TOKENS_AT_ONCE = 2**19  # in an evaluation


def run_name(task: str, arm: str, seed: int) -> str:
    return f"{task}-{arm}-seed{seed}"


class Wave:
    """The missing runs of one task, trained together."""

    def __init__(
        self, config: SharpnessConfig, task: str, arms: dict[str, AttentionArm], seeds: Sequence[int], device: str
    ) -> None:
        self.config, self.task, self.arms, self.seeds, self.device = config, task, arms, tuple(seeds), device
        self.pool = Pool(self._batches, config.chunk)
        self.models = {name: Decoder(config, arm, device) for name, arm in arms.items()}
        schedule = Schedule(config.steps, config.lr, config.warmup)
        self.lanes = {
            name: Lane(
                start_mimetic(Members(decoder_inits(config, arm), self.seeds, device)),
                partial(_losses, self.models[name]),
                schedule,
                self.pool,
                compute_dtype(device),
            )
            for name, arm in arms.items()
        }
        self._began = time.perf_counter()
        self.rows: dict[str, list[dict[str, Any]]] = {name: [] for name in arms}

    def train(self, should_stop: Callable[[], bool], progress: tqdm) -> bool:
        """False if it was stopped before the end."""
        self._began = time.perf_counter()
        return train_lanes(self.lanes, self.pool, self.config.steps, should_stop, partial(self._after_chunk, progress))

    @torch.no_grad()
    def results(self) -> dict[tuple[str, int], dict[str, Any]]:
        """(arm, seed) -> what its JSON file holds."""
        evaluations = {name: self._evaluate(name) for name in self.arms}
        return {
            (name, seed): {
                **identity(self.config, self.task, arm),
                "arm": name,
                "seed": seed,
                "environment": environment(),
                "parameters": self.lanes[name].members.parameters_each,
                "scales": self._scales(name, member),
                "rows": [
                    {"step": row["step"], "train_loss": row["losses"][member], "seconds": row["seconds"]}
                    for row in self.rows[name]
                ],
                "evaluations": [{key: _of(value, member) for key, value in row.items()} for row in evaluations[name]],
            }
            for name, arm in self.arms.items()
            for member, seed in enumerate(self.seeds)
        }

    def _batches(self, chunk: int) -> Batch:
        """Of `chunk` steps, a function of the seed and the chunk alone: arms of one seed see the same."""
        size, length = self.config.chunk, self.config.train_length
        drawn = [self._draw(size * self.config.batch_size, length, "train", seed, chunk) for seed in self.seeds]
        return {
            name: torch.stack([getattr(one, name).unflatten(0, (size, -1)) for one in drawn], dim=1)
            for name in ("tokens", "positions", "answers")
        }

    def _draw(self, rows: int, length: int, *key: int | str) -> Sequences:
        return TASKS[self.task](rows, length, self.config.vocabulary, seeded(self.device, self.task, length, *key))

    def _after_chunk(self, progress: tqdm, step: int, losses: dict[str, list[float]]) -> None:
        seconds = round(time.perf_counter() - self._began, 2)  # of all lanes
        for name, values in losses.items():
            self.rows[name].append({"step": step, "losses": values, "seconds": seconds})
        progress.update(self.config.chunk * len(losses) * len(self.seeds))

    def _evaluate(self, name: str) -> list[dict[str, Any]]:
        """At every length, with the scale of training and with one that grows as log n from there."""
        rows = []
        for length in self.config.lengths:
            fixed, growing = 1.0, math.log(length) / math.log(self.config.train_length)
            for scaling, factor in {"fixed": fixed, "log n": growing}.items():
                if scaling == "fixed" or factor != 1.0:
                    rows.append({"length": length, "scaling": scaling, **self._score(name, length, factor)})
        return rows

    def _score(self, name: str, length: int, factor: float) -> dict[str, list[float]]:
        """accuracy; loss in nats; top: mean over asked queries of the largest probability in any layer and head."""
        drawn = self._draw(self.config.eval_sequences, length, "test")  # the same for all arms and seeds
        weights, model = self.lanes[name].weights(), self.models[name]
        scores: list[tuple[Tensor, Tensor]] = []
        top = torch.empty(0)
        for rows in torch.arange(self.config.eval_sequences).split(max(1, TOKENS_AT_ONCE // length // len(self.seeds))):
            probe = Probe(PROBED)
            tokens, positions = (x[rows].expand(len(self.seeds), -1, -1) for x in (drawn.tokens, drawn.positions))
            logits = model(weights, tokens, positions, factor, None if scores else probe)
            scores.append(_scores(logits, drawn.answers[rows]))
            top = top if probe.top == [] else per_member(torch.stack(probe.top).amax((0, 3)))
        accuracy, loss = (torch.cat(values, dim=1) for values in zip(*scores, strict=True))
        return {"accuracy": per_member(accuracy).tolist(), "loss": per_member(loss).tolist(), "top": top.tolist()}

    def _scales(self, name: str, member: int) -> list[list[float]]:
        """The learned scale of each layer's heads; empty where none is learned."""
        weights = self.lanes[name].weights()
        return [
            learned_scale(value[member].float()).tolist() for key, value in weights.items() if key.endswith("log_scale")
        ]


def _losses(model: Decoder, weights: Weights, batch: Batch) -> Tensor:
    logits = model(weights, batch["tokens"], batch["positions"])
    loss = F.cross_entropy(logits.flatten(0, 2), batch["answers"].flatten(), reduction="none")
    return per_member(loss.view_as(batch["answers"]))


def _scores(logits: Tensor, answers: Tensor) -> tuple[Tensor, Tensor]:
    """logits (s, b, t, vocabulary), answers (b, t) -> right or not, and loss, (s, b, t)."""
    answers = answers.expand(len(logits), -1, -1)
    loss = F.cross_entropy(logits.flatten(0, 2), answers.flatten(), reduction="none").view_as(answers)
    return (logits.argmax(-1) == answers).float(), loss


def _of(value: Any, member: int) -> Any:
    return value[member] if isinstance(value, list) else value


def identity(config: SharpnessConfig, task: str, arm: AttentionArm) -> dict[str, Any]:
    """What a run's result depends on besides its seed."""
    return {"config": config.to_dict(), "task": task, "attention": asdict(arm)}


def run_missing(
    config: SharpnessConfig,
    tasks: Sequence[str],
    arms: dict[str, AttentionArm],
    seeds: Sequence[int],
    together: int,
    device: str,
    out: Path,
    should_stop: Callable[[], bool],
    progress: tqdm,
) -> bool:
    """Trains what is not in `out`, task by task; False if it was stopped."""
    for task in tasks:
        missing = {
            name: tuple(
                seed for seed in seeds if not is_done(out, run_name(task, name, seed), identity(config, task, arm))
            )
            for name, arm in arms.items()
        }
        progress.update(sum(len(seeds) - len(found) for found in missing.values()) * config.steps)
        for names, group in waves(missing, together):
            began = time.perf_counter()
            wave = Wave(config, task, {name: arms[name] for name in names}, group, device)
            if not wave.train(should_stop, progress):
                return False
            for (name, seed), result in wave.results().items():
                write_result(out, run_name(task, name, seed), {**result, "seconds": time.perf_counter() - began})
    return True
