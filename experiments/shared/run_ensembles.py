"""The runs of a question with all seeds and learning rates of an arm as one model: many times as many in the same time.

Fewer launches, and nothing but launches is shared: a member of an ensemble learns what it would learn alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .captured import Batch, Lane, Pool, Schedule, train_lanes, use_device
from .config import DTYPES, RunConfig
from .data import Corpus, train_batch, val_batches
from .decoder import Decoder, decoder_inits, start_deepnet
from .ensemble import Members
from .logit_probe import TOKENS, LogitProbe
from .metrics import BITS_PER_NAT
from .optim import learning_rate
from .together import Job, Observer

CHUNK = 50  # steps whose batches wait on the device, and a row of the metrics
Held = Sequence[Tensor]  # chunks (windows, n + 1) of the held-out text
VAL_TOKENS = 2**14  # of a member at once: there is no gradient to keep


class EnsembleRun:
    """All seeds of one arm at all its learning rates; `jobs` of one rate are neighbours."""

    def __init__(self, jobs: Sequence[Job], pool: Pool) -> None:
        self.jobs = jobs
        self.config = jobs[0].config
        device = torch.device(self.config.device)
        self.members = Members(decoder_inits(self.config), [job.config.seed for job in jobs], device)
        if self.config.norm == "deepnet":
            start_deepnet(self.members, self.config.depth)
        self.decoder = Decoder(self.config, device)
        rates = [job.config.lr / self.config.lr for job in jobs]
        schedule = Schedule(self.config.steps, self.config.lr, self.config.warmup, self.config.grad_clip)
        self.lane = Lane(self.members, self._losses, schedule, pool, DTYPES[self.config.dtype], rates)
        self.rows: list[list[dict[str, Any]]] = [[] for _ in jobs]

    def _losses(self, weights: dict[str, Tensor], batch: Batch) -> Tensor:
        return self.decoder.losses(weights, batch["windows"])

    def note(self, step: int, losses: list[float], norms: tuple[list[float], list[float]], held_out: Held) -> None:
        """A row of every member's metrics."""
        validate = step % self.config.eval_every == 0 or step == self.config.steps
        columns = {"train_bpb": [loss * BITS_PER_NAT for loss in losses]}
        columns["grad_norm"], columns["grad_norm_max"] = norms
        if validate:
            columns |= {"val_bpb": self.validate(held_out), "max_logit": self.largest_logits(held_out[0])}
        for index, (job, rows) in enumerate(zip(self.jobs, self.rows, strict=True)):
            row = {name: values[index] for name, values in columns.items()}
            rows.append({"step": step, "lr": learning_rate(job.config, step - 1), **row})

    def validate(self, held_out: Held) -> list[float]:
        """Bits per byte of each member on the same windows."""
        weights, members = self.lane.weights(), len(self.jobs)
        with torch.no_grad():
            sums = [
                self.decoder.losses(weights, windows.expand(members, -1, -1)).double() * len(windows)
                for windows in held_out
            ]
        mean = torch.stack(sums).sum(0) / sum(map(len, held_out)) * BITS_PER_NAT
        return [float(value) for value in mean]

    @torch.no_grad()
    def largest_logits(self, windows: Tensor) -> list[float]:
        """Of each member, over the first of the held-out windows."""
        probe = LogitProbe(self.config)
        tokens = windows[: max(1, TOKENS // self.config.seq_len), :-1].long()
        self.decoder.watch = probe.watch
        self.decoder(self.lane.weights(), tokens.expand(len(self.jobs), -1, -1))
        self.decoder.watch = None
        return probe.take()

    def results(self) -> list[tuple[Job, dict[str, Any]]]:
        return [(job, self._result(index)) for index, job in enumerate(self.jobs)]

    def _result(self, index: int) -> dict[str, Any]:
        rows = self.rows[index]
        last = rows[-1]["val_bpb"]
        finite = math.isfinite(last)
        scales = [
            weight[index].exp().tolist()
            for name, weight in self.members.unpack(self.members.flat.detach()).items()
            if name.endswith("log_scale")
        ]
        return {
            "parameters": self.members.parameters_each,
            "val_bpb": last if finite else None,
            "diverged_at": None if finite else _first_bad(rows),
            "learned_scales": scales,
            "skipped_steps": self.lane.skipped_steps()[index] if self.config.dtype == "fp16" else None,
            "rows": rows,
        }


def _first_bad(rows: list[dict[str, Any]]) -> int:
    return next((row["step"] for row in rows if not math.isfinite(row["train_bpb"])), rows[-1]["step"])


def run_ensembles(
    jobs: Iterable[Job], corpus: Corpus, together: int, should_stop: Callable[[], bool], observer: Observer
) -> bool:
    """Trains all jobs, `together` arms at a time, whose rates, seeds, batches and number of steps agree.

    False if it was stopped: runs that are not finished begin anew the next time.
    """
    waves = _waves(list(jobs), together)
    return all(not should_stop() and _run_wave(wave, corpus, should_stop, observer) for wave in waves)


def _run_wave(wave: list[list[Job]], corpus: Corpus, should_stop: Callable[[], bool], observer: Observer) -> bool:
    config, seeds = wave[0][0].config, [job.config.seed for job in wave[0]]
    device = use_device(config.device)
    pool = Pool(lambda chunk: _windows(corpus, config, seeds, chunk, device), CHUNK)
    runs = {f"{arm[0].name}": EnsembleRun(arm, pool) for arm in wave}
    count = config.batch_size * config.eval_batches
    held_out = torch.cat(val_batches(corpus, 1, config.seq_len, count)).to(torch.uint8).to(device)
    held_out = held_out.split(max(1, VAL_TOKENS // config.seq_len))

    def after_chunk(step: int, losses: dict[str, list[float]]) -> None:
        for name, run in runs.items():
            run.note(step, losses[name], run.lane.gradient_norms(), held_out)
        observer.steps(((step - 1) % CHUNK + 1) * len(seeds) * len(runs))

    lanes = {name: run.lane for name, run in runs.items()}
    with warnings.catch_warnings():
        if device.type == "cuda":  # the plain path where a kernel was to serve
            warnings.filterwarnings("error", message="flash_cosine_sim_attention runs on its plain")
        finished = train_lanes(lanes, pool, config.steps, should_stop, after_chunk)
    if finished:
        for run in runs.values():
            for job, result in run.results():
                observer.result(job, result)
    return finished


def _windows(corpus: Corpus, config: RunConfig, seeds: Sequence[int], chunk: int, device: torch.device) -> Batch:
    """(CHUNK, s, b, n + 1) uint8: to each member the batches that its seed alone would see."""
    steps = range(chunk * CHUNK, (chunk + 1) * CHUNK)
    different = list(dict.fromkeys(seeds))
    batches = [
        torch.stack([train_batch(corpus, config.batch_size, config.seq_len, seed, step) for seed in different])
        for step in steps
    ]
    windows = torch.stack(batches).to(torch.uint8).to(device)
    return {"windows": windows[:, [different.index(seed) for seed in seeds]]}


def _waves(jobs: list[Job], together: int) -> list[list[list[Job]]]:
    """Jobs that differ in seed and learning rate alone are one ensemble; ensembles of the same shapes run at once."""
    ensembles: dict[tuple[str, RunConfig], list[Job]] = {}
    for job in jobs:
        ensembles.setdefault((job.arm, replace(job.config, seed=0, lr=1.0)), []).append(job)
    alike: dict[tuple[Any, ...], list[list[Job]]] = {}
    for (_, config), found in ensembles.items():
        members = sorted(found, key=lambda job: (job.config.lr, job.config.seed))
        seeds = tuple(job.config.seed for job in members)
        shape = (config.steps, config.batch_size, config.seq_len, config.eval_every)
        alike.setdefault((seeds, shape), []).append(members)
    return [group[first : first + together] for group in alike.values() for first in range(0, len(group), together)]
