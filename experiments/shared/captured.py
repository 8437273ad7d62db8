"""Training steps that are captured in a CUDA graph and replayed: small models wait for launches otherwise.

A `Lane` is one arm with all its members (ensemble.py) on a stream of its own. The lanes of an experiment take the same
batches from one `Pool`, in turns, so that what one lane leaves of the GPU another takes.
On the CPU a lane runs its steps plainly; nothing else differs.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .config import require_device
from .cuda_graph import GraphedCall
from .ensemble import Members, Weights, clip_per_member

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
    """One arm in training. `average`: (s, p), the exponential moving average of the weights."""

    def __init__(self, members: Members, loss_of: LossOf, schedule: Schedule, pool: Pool, dtype: torch.dtype) -> None:
        self.members, self.dtype = members, dtype
        self._loss_of, self._schedule, self._pool = loss_of, schedule, pool
        flat, device = members.flat, members.flat.device
        self.average = flat.detach().clone()
        self._tables = (schedule.learning_rates().to(device), schedule.averaging().to(device))
        self._step = torch.zeros(1, dtype=torch.int64, device=device)
        self._lr = torch.zeros((), device=device)
        self._optimizer = torch.optim.AdamW(
            [flat], lr=self._lr, betas=BETAS, weight_decay=0.0, fused=True, capturable=flat.is_cuda
        )
        self._loss_sum = torch.zeros(len(members.seeds), device=device)
        self._loss_steps = 0
        self._plain_steps = 0
        self._graph = GraphedCall()
        self.stream = torch.cuda.Stream(device) if flat.is_cuda else None

    def step(self) -> None:
        """One step of every member, on this lane's stream."""
        self._loss_steps += 1
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
        (gradient,) = torch.autograd.grad(loss.sum(), flat)
        flat.grad = clip_per_member(gradient, self._schedule.grad_clip)
        rate, share = (table.index_select(0, self._step)[0] for table in self._tables)
        self._lr.copy_(rate)
        self._optimizer.step()
        if self._schedule.ema:
            self.average.lerp_(flat.detach(), share)
        self._loss_sum += loss.detach()
        self._step += 1


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
