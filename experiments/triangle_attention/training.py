"""One run: a network in training, its rows of metrics, save and load."""

from __future__ import annotations

import time
import warnings
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..shared.checkpoint import load_checkpoint, save_checkpoint
from ..shared.config import DTYPES
from ..shared.cuda_graph import GraphedCall
from .network import ARMS, PairNetwork
from .task import Batch, Task, make_batch

HELD_OUT_SEED = 1_000_003
EAGER_STEPS = 3  # before a capture: libraries set themselves up, kernels compile


@dataclass(frozen=True)
class Setting:
    """Everything that a result depends on but the arm and the seed."""

    task: Task = field(default_factory=Task)
    dim: int = 64
    depth: int = 3
    heads: int = 4
    dim_head: int = 16
    batch_size: int = 16
    steps: int = 600
    lr: float = 2e-3  # peak; linear warmup over a twentieth of the steps, then linearly down to a tenth
    eval_every: int = 50
    eval_size: int = 256
    dtype: str = "bf16"  # autocast, or fp32
    device: str = "cuda"


class Training:
    """`step` steps are done, `rows` holds {step, train_rmse, rmse} of every `eval_every` of them.

    A GPU replays the step as a CUDA graph: the launches of so small a network take longer than its work.
    """

    def __init__(self, arm: str, setting: Setting, seed: int) -> None:
        self.arm, self.setting, self.seed = arm, setting, seed
        self.step, self.seconds = 0, 0.0
        self.rows: list[dict[str, float]] = []
        self.network = make_network(arm, setting, seed)
        self._cuda = torch.device(setting.device).type == "cuda"
        self._lr = torch.tensor(setting.lr, device=setting.device)
        self._optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=self._lr, weight_decay=0.01, fused=True, capturable=self._cuda
        )
        self._generator = torch.Generator(setting.device).manual_seed(seed)
        self._held_out = held_out_batch(setting)
        self._batch = make_batch(setting.task, setting.batch_size, torch.Generator(setting.device).manual_seed(0))
        self._loss_sum = torch.zeros((), device=setting.device)
        self._graph, self._eager_steps = GraphedCall(), 0
        self._capturable = self._cuda
        self._stream = torch.cuda.Stream() if self._cuda else None

    @property
    def finished(self) -> bool:
        return self.step >= self.setting.steps

    def run_to_next_row(self) -> None:
        """Up to `eval_every` steps, then one row."""
        began = time.perf_counter()
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(self._stream):  # None: nothing
            self._loss_sum.zero_()
            steps = min(self.setting.eval_every, self.setting.steps - self.step)
            for _ in range(steps):
                self._next_step()
            train_rmse = (self._loss_sum / steps).sqrt().item()  # waits for the device
            self.seconds += time.perf_counter() - began
            self.rows.append({"step": self.step, "train_rmse": train_rmse, "rmse": self.evaluate()})

    def evaluate(self) -> float:
        """Root mean square error over the missing pairs of the held-out samples, in edges of the cube."""
        parts = zip(*(x.split(self.setting.batch_size) for x in _tensors(self._held_out)), strict=True)
        with torch.no_grad():
            sums = torch.stack([torch.stack(self._squared_errors(Batch(*part))) for part in parts]).double().sum(0)
        return (sums[0] / sums[1]).sqrt().item()

    def result(self) -> dict[str, Any]:
        """As JSON. ms_per_step without validation; the first steps, which compile, included."""
        parameters = sum(parameter.numel() for parameter in self.network.parameters())
        ms = self.seconds * 1000 / max(1, self.step)
        who = {"arm": self.arm, "seed": self.seed, "setting": asdict(self.setting)}
        return who | {"parameters": parameters, "ms_per_step": ms, "rows": self.rows}

    def save(self, path: Path) -> None:
        state = {"network": self.network.state_dict(), "optimizer": self._optimizer.state_dict()}
        plain = {"step": self.step, "seconds": self.seconds, "rows": self.rows, "setting": asdict(self.setting)}
        save_checkpoint(path, {**state, **plain, "generator": self._generator.get_state()})

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of the same setting; ValueError for one of another."""
        state = load_checkpoint(path)
        if state["setting"] != asdict(self.setting):
            raise ValueError(f"{path}: expected a checkpoint of {asdict(self.setting)}, got {state['setting']}")
        self.network.load_state_dict(state["network"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._optimizer.param_groups[0]["lr"] = self._lr
        self._generator.set_state(state["generator"])
        self.step, self.seconds, self.rows = state["step"], state["seconds"], state["rows"]

    def _next_step(self) -> None:
        self.step += 1
        fresh = make_batch(self.setting.task, self.setting.batch_size, self._generator)
        for kept, new in zip(_tensors(self._batch), _tensors(fresh), strict=True):
            kept.copy_(new)
        self._lr.fill_(learning_rate(self.setting, self.step))
        if self._capturable and self._eager_steps == EAGER_STEPS:
            self._capture()
        if self._graph.captured:
            self._graph.replay()
        else:
            self._optimize()
            self._eager_steps += 1

    def _capture(self) -> None:
        """Once; a step that cannot be captured goes on as it is."""
        self._capturable = False
        try:
            self._graph.capture(self._optimize)
        except RuntimeError as error:
            warnings.warn(f"{self.arm}: no CUDA graph of the step: {error}", RuntimeWarning)

    def _optimize(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        squares, count = self._squared_errors(self._batch)
        loss = squares / count
        loss.backward()
        self._optimizer.step()
        self._loss_sum += loss.detach()

    def _squared_errors(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Sum over the missing pairs, and their number: tensors, for nothing may wait for the device here."""
        device_type, dtype = torch.device(self.setting.device).type, self.setting.dtype
        with torch.autocast(device_type, DTYPES[dtype], enabled=dtype != "fp32"):
            distance = self.network(batch.features, batch.mask)
        return ((distance - batch.target) * batch.missing).square().sum(), batch.missing.sum()


def make_network(arm: str, setting: Setting, seed: int) -> nn.Module:
    """Parameters that two arms share by name are equal: each layer has a seed of its own."""
    network = PairNetwork(ARMS[arm], setting.dim, setting.depth, setting.heads, setting.dim_head)
    for path, module in network.named_modules():
        if isinstance(module, nn.Linear) and bool(module.weight.any()):  # what starts at zero stays there
            torch.manual_seed(zlib.crc32(f"{path} {seed}".encode()))
            module.reset_parameters()
    return network.to(setting.device)


def learning_rate(setting: Setting, step: int) -> float:
    """step counts from 1."""
    warmup = max(1, setting.steps // 20)
    down = (step - warmup) / max(1, setting.steps - warmup)
    return setting.lr * (step / warmup if step < warmup else 1 - 0.9 * down)


def held_out_batch(setting: Setting) -> Batch:
    generator = torch.Generator(setting.device).manual_seed(HELD_OUT_SEED)
    return make_batch(setting.task, setting.eval_size, generator)


def _tensors(batch: Batch) -> tuple[Tensor, ...]:
    return batch.features, batch.mask, batch.target, batch.missing
