"""All arms with all seeds at once: train, evaluate on the way, one JSON file a run."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..shared.attend import AttentionArm, compute_dtype
from ..shared.captured import Batch, Lane, Pool, Schedule, seeded, train_lanes
from ..shared.ensemble import Members, Weights, per_member
from ..shared.environment import environment
from ..shared.waves import is_done, waves, write_result
from .config import ImageConfig
from .data import Digits
from .diffusion import add_noise, level_losses, sample, signal_shares
from .frechet import Judge
from .model import DiT, dit_inits

EVALUATIONS = 3  # at every third of the steps; the last with all sample seeds, the others with one
GRID = 40  # images of the first seed that are kept to be looked at


def run_name(arm: str, seed: int) -> str:
    return f"{arm}-seed{seed}"


class Wave:
    """The missing runs of some arms and seeds, trained together."""

    def __init__(
        self, config: ImageConfig, arms: dict[str, AttentionArm], seeds: Sequence[int], digits: Digits, device: str
    ) -> None:
        self.config, self.arms, self.seeds = config, arms, tuple(seeds)
        self.judge = Judge(digits)
        self.digits = digits.to(device)
        self.shares = signal_shares(config.noise_levels).to(device)
        self.pool = Pool(self._batches, config.chunk)
        self.models = {name: DiT(config, arm, device) for name, arm in arms.items()}
        schedule = Schedule(config.steps, config.lr, config.warmup, ema=config.ema)
        self.lanes = {
            name: Lane(
                Members(dit_inits(config, arm), self.seeds, device),
                partial(self._losses, self.models[name]),
                schedule,
                self.pool,
                compute_dtype(device),
            )
            for name, arm in arms.items()
        }
        self._began = time.perf_counter()
        self.results: dict[tuple[str, int], dict[str, Any]] = {
            (name, seed): self._empty_result(name, seed) for name in arms for seed in seeds
        }

    def train(self, should_stop: Callable[[], bool], progress: tqdm) -> bool:
        """False if it was stopped before the end: then there are no results."""
        self._began = time.perf_counter()
        return train_lanes(self.lanes, self.pool, self.config.steps, should_stop, partial(self._after_chunk, progress))

    def _batches(self, chunk: int) -> Batch:
        """Of `chunk` steps, a function of the seed and the chunk alone: arms of one seed see the same."""
        size, batch, device = self.config.chunk, self.config.batch_size, self.digits.train.device
        drawn = []
        for seed in self.seeds:
            generator = seeded(device, "digits", seed, chunk)
            index = torch.randint(len(self.digits.train), (size, batch), generator=generator, device=device)
            level = torch.randint(len(self.shares), (size, batch), generator=generator, device=device)
            noise = torch.randn(size, batch, self.digits.train.shape[1], generator=generator, device=device)
            drawn.append((index, level, noise))
        index, level, noise = (torch.stack(values, dim=1) for values in zip(*drawn, strict=True))
        return {"index": index, "level": level, "noise": noise}

    def _losses(self, model: DiT, weights: Weights, batch: Batch) -> Tensor:
        images, labels = self.digits.train[batch["index"]], self.digits.train_labels[batch["index"]]
        noised = add_noise(images, batch["noise"], self.shares[batch["level"]].float())
        return per_member((model(weights, noised, batch["level"], labels) - batch["noise"]).square())

    def _after_chunk(self, progress: tqdm, step: int, losses: dict[str, list[float]]) -> None:
        seconds = round(time.perf_counter() - self._began, 2)  # of all lanes
        for name, values in losses.items():
            for seed, value in zip(self.seeds, values, strict=True):
                self.results[name, seed]["rows"].append({"step": step, "train_loss": value, "seconds": seconds})
        progress.update(self.config.chunk * len(self.results))
        if step * EVALUATIONS // self.config.steps > (step - self.config.chunk) * EVALUATIONS // self.config.steps:
            self._evaluate(step)

    @torch.no_grad()
    def _evaluate(self, step: int) -> None:
        last = step == self.config.steps
        for name, lane in self.lanes.items():
            predict = partial(self.models[name], lane.weights())
            test, labels, count = self.digits.test, self.digits.test_labels, self.config.eval_levels
            losses = level_losses(predict, test, labels, self.shares, count, len(self.seeds)).tolist()
            samples = [self._samples(predict, seed) for seed in range(self.config.sample_seeds if last else 1)]
            for member, seed in enumerate(self.seeds):
                labels = self.digits.train_labels
                scores = [self.judge.scores(images[member], labels) for images in samples]
                row = {"step": step, "level_losses": losses[member], "scores": scores}
                self.results[name, seed]["evaluations"].append(row)
                if last:
                    self.results[name, seed]["grid"] = _as_text(samples[0][member, :GRID])
                    self.results[name, seed]["seconds"] = time.perf_counter() - self._began

    def _samples(self, predict: Callable[..., Tensor], sample_seed: int) -> Tensor:
        """(s, n, 64): as many images as the training split has, of its classes; all arms start from the same noise."""
        train = self.digits.train
        noise = torch.randn(train.shape, generator=seeded("cpu", "sample", sample_seed)).to(train.device)
        noise, labels = (x.expand(len(self.seeds), *x.shape) for x in (noise, self.digits.train_labels))
        return sample(predict, noise, labels, self.shares, self.config.sampling_steps)

    def _empty_result(self, name: str, seed: int) -> dict[str, Any]:
        return {
            **identity(self.config, self.arms[name], self.digits),
            "arm": name,
            "seed": seed,
            "environment": environment(),
            "parameters": self.lanes[name].members.parameters_each,
            "baseline": self.judge.baseline,
            "rows": [],
            "evaluations": [],
        }


def identity(config: ImageConfig, arm: AttentionArm, digits: Digits) -> dict[str, Any]:
    """What a run's result depends on besides its seed."""
    return {"config": config.to_dict(), "attention": asdict(arm), "data_sha256": digits.sha256}


def run_missing(
    config: ImageConfig,
    arms: dict[str, AttentionArm],
    seeds: Sequence[int],
    digits: Digits,
    together: int,
    device: str,
    out: Path,
    should_stop: Callable[[], bool],
    progress: tqdm,
) -> bool:
    """Trains what is not in `out`. An arm's missing seeds train together; False if it was stopped."""
    missing = {
        name: tuple(seed for seed in seeds if not is_done(out, run_name(name, seed), identity(config, arm, digits)))
        for name, arm in arms.items()
    }
    done = sum(len(seeds) - len(found) for found in missing.values())
    progress.update(done * config.steps)
    for names, group in waves(missing, together):
        wave = Wave(config, {name: arms[name] for name in names}, group, digits, device)
        if not wave.train(should_stop, progress):
            return False
        for (name, seed), result in wave.results.items():
            write_result(out, run_name(name, seed), result)
    return True


def _as_text(images: Tensor) -> list[str]:
    """Each image as 64 characters, one a pixel: its 17 levels as 0-9a-g."""
    levels = ((images.float().cpu() + 1) * 8).round().long().clamp(0, 16)
    return ["".join("0123456789abcdefg"[level] for level in image) for image in levels.tolist()]
