"""Training steps that are captured in a CUDA graph and replayed: small models wait for launches otherwise.

A `Lane` is one arm with all its members (ensemble.py) on a stream of its own. The lanes of an experiment take the same
batches from one `Pool`, in turns, so that what one lane leaves of the GPU another takes.
On the CPU a lane runs its steps plainly; nothing else differs.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import require_device
from .cuda_graph import GraphedCall
from .ensemble import Members, Weights, clip_per_member
from .loss_scale import LossScale

Batch = dict[str, Tensor]  # name -> (s, ...)
LossOf = Callable[[Weights, Batch], Tensor]  # (s,): each member's own loss
FINAL_LR = 0.1  # of the peak
BETAS = (0.9, 0.95)
PLAIN_STEPS = 3  # before the capture: they compile, choose algorithms and make the optimiser's state


@dataclass(frozen=True)
class Schedule:
    """AdamW without weight decay: linear warmup to `lr`, then a cosine down to a tenth. ema 0 keeps no average."""

    steps: int
    lr: float
    warmup: int
    grad_clip: float = 1.0
    ema: float = 0.0

    def learning_rates(self) -> Tensor:
        """(steps,) float32."""
        step = torch.arange(self.steps, dtype=torch.float64)
        after = ((step - self.warmup) / max(1, self.steps - 1 - self.warmup)).clamp(0, 1)
        decay = FINAL_LR + (1 - FINAL_LR) * 0.5 * (1 + torch.cos(math.pi * after))
        return (self.lr * decay * ((step + 1) / max(1, self.warmup)).clamp(max=1)).float()

    def averaging(self) -> Tensor:
        """(steps,) float32: the share of the new weights in the average, large at first."""
        step = torch.arange(self.steps, dtype=torch.float64)
        return (1 - torch.minimum(torch.tensor(self.ema), (1 + step) / (10 + step))).float()


class Pool:
    """The batches of the next `size` steps, name -> (size, s, ...): `make(chunk)`, a function of chunk alone."""

    def __init__(self, make: Callable[[int], Batch], size: int) -> None:
        self.size = size
        self._make = make
        self.batches = make(0)

    def fill(self, chunk: int) -> None:
        """In place: captured steps read from where they were captured."""
        for name, values in self._make(chunk).items():
            self.batches[name].copy_(values)


class Lane:
    """One arm in training. `average`: (s, p), the exponential moving average of the weights.

    rates: of each member, as a multiple of the schedule's learning rate; none: 1 for all. Members of one rate are
        neighbours, since a rate is one launch of the optimiser.
    float16 is trained with loss scaling, a factor a member; `skipped_steps` counts what it left out.
    """

    def __init__(
        self,
        members: Members,
        loss_of: LossOf,
        schedule: Schedule,
        pool: Pool,
        dtype: torch.dtype,
        rates: Sequence[float] = (),
    ) -> None:
        self.members, self.dtype = members, dtype
        self._loss_of, self._schedule, self._pool = loss_of, schedule, pool
        flat, device = members.flat, members.flat.device
        self.average = flat.detach().clone()
        self._tables = (schedule.learning_rates().to(device), schedule.averaging().to(device))
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        found = [(rate, len(list(same))) for rate, same in itertools.groupby(rates or [1.0] * len(members.seeds))]
        self._rates = torch.tensor([rate for rate, _ in found], device=device)
        self._lr = torch.zeros_like(self._rates)
        self._rows = flat.detach().split([count for _, count in found])  # views: what the optimiser moves
        self._optimizer = torch.optim.AdamW(
            [{"params": [rows], "lr": lr} for rows, lr in zip(self._rows, self._lr.unbind(), strict=True)],
            betas=BETAS,
            weight_decay=0.0,
            fused=True,
            capturable=flat.is_cuda,
        )
        self._scale = LossScale(len(members.seeds), device) if dtype == torch.float16 else None
        self._loss_sum = torch.zeros(len(members.seeds), device=device)
        self._norm_sum, self._norm_max = torch.zeros_like(self._loss_sum), torch.zeros_like(self._loss_sum)
        self._loss_steps = self._norm_steps = 0
        self._plain_steps = 0
        self._graph = GraphedCall()
        self.stream = torch.cuda.Stream(device) if flat.is_cuda else None

    def step(self) -> None:
        """One step of every member, on this lane's stream."""
        self._loss_steps += 1
        self._norm_steps += 1
        if self.stream is None:
            self._train()
        else:
            with torch.cuda.stream(self.stream):
                self._replay_or_capture()

    def weights(self) -> Weights:
        """What is evaluated: the average if one is kept, in the dtype of training."""
        return self.members.unpack(self.average if self._schedule.ema else self.members.flat.detach(), self.dtype)

    def mean_loss(self) -> list[float]:
        """Of each member over the steps since the last call. Waits for the device."""
        values = (self._loss_sum / max(1, self._loss_steps)).tolist()
        self._loss_sum.zero_()
        self._loss_steps = 0
        return values

    def gradient_norms(self) -> tuple[list[float], list[float]]:
        """Of each member before clipping, the mean and the largest of the steps since the last call."""
        found = ((self._norm_sum / max(1, self._norm_steps)).tolist(), self._norm_max.tolist())
        self._norm_sum.zero_()
        self._norm_max.zero_()
        self._norm_steps = 0
        return found

    def skipped_steps(self) -> list[int]:
        """Of each member, by loss scaling."""
        return [0] * len(self.members.seeds) if self._scale is None else self._scale.skipped.tolist()

    def _replay_or_capture(self) -> None:
        if not self._graph.captured and self._plain_steps == PLAIN_STEPS:
            self._graph.capture(self._train)
        if self._graph.captured:
            self._graph.replay()
        else:
            self._train()
            self._plain_steps += 1

    def _train(self) -> None:
        flat = self.members.flat
        slot = self._step % self._pool.size
        batch = {name: values.index_select(0, slot)[0] for name, values in self._pool.batches.items()}
        loss = self._loss_of(self.members.unpack(flat, self.dtype), batch)
        scaled = loss if self._scale is None else loss * self._scale.factor
        (gradient,) = torch.autograd.grad(scaled.sum(), flat)
        rate, share = (table.index_select(0, self._step)[0] for table in self._tables)
        torch.mul(self._rates, rate, out=self._lr)
        self._optimize(gradient)
        if self._schedule.ema:
            self.average.lerp_(flat.detach(), share)
        self._loss_sum += loss.detach()
        self._step += 1

    def _optimize(self, gradient: Tensor) -> None:
        """gradient: (s, p), of the scaled losses if they are scaled; a member with one that is not finite stays."""
        finite = None
        if self._scale is not None:
            gradient, finite = self._scale.unscale(gradient)
        clipped, norm = clip_per_member(gradient, self._schedule.grad_clip)
        self._norm_sum += norm
        self._norm_max.copy_(torch.maximum(self._norm_max, norm))
        sizes = [len(rows) for rows in self._rows]
        for rows, part in zip(self._rows, clipped.split(sizes), strict=True):
            rows.grad = part
        if finite is None:
            self._optimizer.step()
            return
        kept = [[value.clone() for value in values] for values in self._moving()]
        self._optimizer.step()
        for values, before, moved in zip(self._moving(), kept, finite.split(sizes), strict=True):
            for value, old in zip(values, before, strict=False):  # no moments before the first step
                value.copy_(torch.where(moved[:, None], value, old))
        assert self._scale is not None
        self._scale.update(finite)

    def _moving(self) -> list[list[Tensor]]:
        """For each rate the weights, and the moments where there are some."""
        state = self._optimizer.state
        moments = ("exp_avg", "exp_avg_sq")
        return [[rows, *(state[rows][name] for name in moments if name in state[rows])] for rows in self._rows]


def train_chunk(lanes: Sequence[Lane], pool: Pool, chunk: int, steps: int) -> None:
    """`steps` steps of all lanes on the batches of `chunk`, in turns. Does not wait for the device at the end."""
    pool.fill(chunk)
    _join(lanes, before=True)
    for _ in range(steps):
        for lane in lanes:
            lane.step()
    _join(lanes, before=False)


def _join(lanes: Sequence[Lane], before: bool) -> None:
    """The lanes begin after what came before them, and what comes next begins after the lanes."""
    for lane in lanes:
        if lane.stream is not None and before:
            lane.stream.wait_stream(torch.cuda.current_stream())
        elif lane.stream is not None:
            torch.cuda.current_stream().wait_stream(lane.stream)


def train_lanes(
    lanes: Mapping[str, Lane],
    pool: Pool,
    steps: int,
    should_stop: Callable[[], bool],
    after_chunk: Callable[[int, dict[str, list[float]]], None],
) -> bool:
    """All lanes from the first step to the last; `after_chunk(step, lane -> mean loss of each member)` on the way.

    False if `should_stop()` ended it between two chunks.
    """
    for chunk in range(-(-steps // pool.size)):
        if should_stop():
            return False
        count = min(pool.size, steps - chunk * pool.size)
        train_chunk(list(lanes.values()), pool, chunk, count)
        after_chunk(chunk * pool.size + count, {name: lane.mean_loss() for name, lane in lanes.items()})
    return True


def use_device(device: str) -> torch.device:
    """The device, set up for reproducible small models; RuntimeError where there is none."""
    require_device(device)
    if torch.device(device).type == "cuda":
        torch.backends.cuda.enable_cudnn_sdp(False)  # torch's flash attention is the regular arm's, whatever the shape
    return torch.device(device)


def seeded(device: torch.device | str, *numbers: int | str) -> torch.Generator:
    """A generator on `device` whose state follows from `numbers` alone."""
    digest = hashlib.sha256("/".join(map(str, numbers)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:6], "big"))
