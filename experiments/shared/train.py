"""The one train loop: of every arm, every experiment and the single run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from .config import DTYPES, RunConfig
from .data import Corpus, train_batch, val_batches
from .memory import peak_memory_of
from .metrics import BITS_PER_NAT
from .model import AttentionCalls, attention_calls, build_model, next_byte_loss
from .optim import StepTimer, learning_rate, make_optimizer

MEMORY_STEP = 2  # the first step with the optimiser's state in place; timing begins after it


class TrainingDivergedError(RuntimeError):
    """The loss is not a finite number."""


class Trainer:
    """A model in training: `step` optimiser steps are done, `rows` holds the metrics, one dict a logged step.

    The state follows from the configuration, the corpus and `step` alone, as far as the device's arithmetic is
    deterministic (the CPU's is). So stopping, saving, loading and going on gives the same weights, bit for bit.
    """

    def __init__(self, config: RunConfig, corpus: Corpus) -> None:
        self.config = config
        self.corpus = corpus
        self.device = torch.device(config.device)
        self.model = build_model(config)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "fp16")
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.peak_memory = 0  # bytes, of one step
        self._held_out = val_batches(corpus, config.batch_size, config.seq_len, config.eval_batches)
        self._loss_sum = torch.zeros((), device=self.device)  # nats, since the last row
        self._grad_norm = torch.zeros((), device=self.device)
        self._earlier_calls = AttentionCalls(fused=0, stock=0)
        self._timer = StepTimer(self.device)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps

    def run(
        self, should_stop: Callable[[], bool] = lambda: False, on_step: Callable[[Trainer], None] = lambda _: None
    ) -> bool:
        """Trains until the last step, or until `should_stop()` between two steps. True if the last step was reached."""
        self.model.train()
        self._timer.start()
        while not self.finished and not should_stop():
            self._next_step()
            on_step(self)
        return self.finished

    def evaluate(self) -> float:
        """Bits per byte of the held-out windows, the same ones each time."""
        self.model.eval()
        with torch.no_grad(), self.autocast():
            losses = [
                next_byte_loss(self.model, batch.to(self.device)).double() * len(batch) for batch in self._held_out
            ]
        self.model.train()
        return float(torch.stack(losses).sum()) / sum(map(len, self._held_out)) * BITS_PER_NAT

    def autocast(self) -> torch.autocast:
        """The context in which the model runs, in training and after."""
        return torch.autocast(self.device.type, DTYPES[self.config.dtype], enabled=self.config.dtype != "fp32")

    def attention_calls(self) -> AttentionCalls:
        """Since the first step, in this process and those before it."""
        now = attention_calls(self.model)
        return AttentionCalls(now.fused + self._earlier_calls.fused, now.stock + self._earlier_calls.stock)

    def result(self) -> dict[str, Any]:
        """What a comparison reads, as JSON. peak_memory in bytes; times are None in runs too short to time."""
        ms = self._timer.median_ms()
        calls = self.attention_calls()
        return {
            "config": self.config.to_dict(),
            "corpus_sha256": self.corpus.sha256,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "val_bpb": next((row["val_bpb"] for row in reversed(self.rows) if "val_bpb" in row), None),
            "ms_per_step": ms,
            "tokens_per_s": self.config.batch_size * self.config.seq_len * 1000 / ms if ms else None,
            "peak_memory": self.peak_memory,
            "fused_calls": calls.fused,
            "stock_calls": calls.stock,
            "rows": self.rows,
        }

    def save(self, path: Path) -> None:
        """Everything that `load` needs to go on as if there had been no interruption."""
        modules = {name: module.state_dict() for name, module in self._stateful().items()}
        tensors = {"loss_sum": self._loss_sum, "grad_norm": self._grad_norm}
        plain = {"step": self.step, "rows": self.rows, "peak_memory": self.peak_memory, "identity": self._identity()}
        calls = asdict(self.attention_calls())
        save_checkpoint(path, {**modules, **tensors, **plain, "calls": calls, "rng": rng_state()})

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of the same configuration and corpus; ValueError names what differs."""
        state = load_checkpoint(path)
        _check_same(path, saved=state["identity"], mine=self._identity())
        for name, module in self._stateful().items():
            module.load_state_dict(state[name])
        self.step, self.rows, self.peak_memory = state["step"], state["rows"], state["peak_memory"]
        self._loss_sum, self._grad_norm = state["loss_sum"].to(self.device), state["grad_norm"].to(self.device)
        self._earlier_calls = AttentionCalls(**state["calls"])
        set_rng_state(state["rng"])

    def _stateful(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}

    def _identity(self) -> dict[str, Any]:
        return {**self.config.to_dict(), "corpus_sha256": self.corpus.sha256}

    def _next_step(self) -> None:
        if self.step == MEMORY_STEP:
            self.peak_memory = peak_memory_of(self._optimize, self.device, self._held_tensors)
            self._timer.start()
        else:
            self._optimize()
            self._timer.count_step()
        self.step += 1
        validate = self.step % self.config.eval_every == 0 or self.finished
        if validate or self.step % self.config.log_every == 0:
            self._timer.stop()
            self._add_row(validate)
            self._timer.start()

    def _optimize(self) -> None:
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step)
        batch = train_batch(self.corpus, config.batch_size, config.seq_len, config.seed, self.step).to(self.device)
        with self.autocast():
            loss = next_byte_loss(self.model, batch)
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self._grad_norm.copy_(nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss_sum += loss.detach()

    def _add_row(self, validate: bool) -> None:
        config = self.config
        steps = self.step - (self.rows[-1]["step"] if self.rows else 0)
        row = {
            "step": self.step,
            "tokens": self.step * config.batch_size * config.seq_len,
            "lr": learning_rate(config, self.step - 1),
            "train_bpb": float(self._loss_sum) / steps * BITS_PER_NAT,
            "grad_norm": float(self._grad_norm),
        }
        self._loss_sum = torch.zeros_like(self._loss_sum)
        if not torch.isfinite(torch.tensor(row["train_bpb"])):
            raise TrainingDivergedError(f"the loss is {row['train_bpb']} at step {self.step} of {config}")
        self.rows.append({**row, "val_bpb": self.evaluate()} if validate else row)

    def _held_tensors(self) -> Iterator[Tensor]:
        """Weights, buffers and the optimiser's state: what stays alive between two steps."""
        yield from self.model.parameters()
        yield from self.model.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))


def _check_same(path: Path, saved: dict[str, Any], mine: dict[str, Any]) -> None:
    differences = [
        f"{name}: checkpoint {saved.get(name)!r}, now {mine.get(name)!r}"
        for name in {**saved, **mine}
        if saved.get(name) != mine.get(name)
    ]
    if differences:
        raise ValueError(f"{path} is of another run. {'; '.join(differences)}")
