"""The one train loop: of every arm, every experiment and the single run."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .checkpoint import load_checkpoint, rng_state, save_checkpoint, set_rng_state
from .config import DTYPES, RunConfig
from .cuda_graph import GraphedCall
from .data import Corpus, val_batches
from .memory import peak_memory_of
from .metrics import BITS_PER_NAT
from .model import AttentionCalls, attention_calls, build_model, learned_scales, next_byte_loss
from .optim import StepTimer, learning_rate, make_optimizer, rates_on_device, set_rates
from .step_inputs import StepInputs

MEMORY_STEP = 2  # the first step with the optimiser's state in place; timing begins after it
NO_CALLS = AttentionCalls(fused=0, stock=0)


class TrainingDivergedError(RuntimeError):
    """The loss is not a finite number."""


class Trainer:
    """A model in training: `step` optimiser steps are done, `rows` holds the metrics, one dict a logged step.

    The state follows from the configuration, the corpus and `step` alone, as far as the device's arithmetic is
    deterministic (the CPU's is). So stopping, saving, loading and going on gives the same weights, bit for bit.

    With `config.cuda_graph` the first steps run as they are, then one is captured and replayed, on a stream of the
    trainer's own. Where the capture fails the run goes on without, with a warning.

    together: this trainer takes turns with others on one GPU. Rows are read one later, so that the host never waits for
    what it has just launched; time and memory, which others share, are not measured.
    """

    def __init__(self, config: RunConfig, corpus: Corpus, together: bool = False) -> None:
        self.config = config
        self.corpus = corpus
        self.device = torch.device(config.device)
        self._stream = torch.cuda.Stream(self.device) if config.cuda_graph else None
        with self._on_stream():
            self.model = build_model(config)
            self.optimizer = make_optimizer(self.model, config)
            self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.dtype == "fp16")
            self._inputs = StepInputs(config, corpus, self.device)
            batches = val_batches(corpus, config.batch_size, config.seq_len, config.eval_batches)
            self._held_out = [batch.to(self.device) for batch in batches]
            self._val_batch = self._held_out[0].clone()  # what a captured validation reads
            self._val_sum = torch.zeros((), device=self.device, dtype=torch.float64)  # nats, of whole windows
            self._loss_sum = torch.zeros((), device=self.device)  # nats, since the last row
            self._grad_norm = torch.zeros((), device=self.device)
        self.step = 0
        self.rows: list[dict[str, Any]] = []
        self.peak_memory = 0  # bytes, of one step
        self._together = together
        self.model.train()
        self._unread: list[tuple[dict[str, Any], dict[str, Tensor]]] = []  # rows whose figures are still on the device
        self._last_row = 0  # its step
        self._step_graph = GraphedCall() if config.cuda_graph else None
        self._val_graph = GraphedCall() if config.cuda_graph else None
        self._graph_calls: dict[GraphedCall, AttentionCalls] = {}
        self._other_calls = NO_CALLS  # that the model's counters do not show: of earlier processes and of replays
        self._timer = StepTimer(self.device)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps

    def run(
        self, should_stop: Callable[[], bool] = lambda: False, on_step: Callable[[Trainer], None] = lambda _: None
    ) -> bool:
        """Trains until the last step, or until `should_stop()` between two steps. True if the last step was reached."""
        self.model.train()
        with self._on_stream():
            self._timer.start()
            while not self.finished and not should_stop():
                self._next_step()
                on_step(self)
            self._read_rows()
        return self.finished

    def run_one_step(self) -> None:
        """For trainers that take turns."""
        with self._on_stream():
            self._next_step()
            if self.finished:
                self._read_rows()

    def evaluate(self) -> float:
        """Bits per byte of the held-out windows, the same ones each time."""
        with self._on_stream():
            return float(self._validate())

    def autocast(self) -> torch.autocast:
        """The context in which the model runs, in training and after."""
        return torch.autocast(self.device.type, DTYPES[self.config.dtype], enabled=self.config.dtype != "fp32")

    def attention_calls(self) -> AttentionCalls:
        """Since the first step, in this process and those before it."""
        return attention_calls(self.model) + self._other_calls

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
            "learned_scales": learned_scales(self.model),
            "rows": self.rows,
        }

    def save(self, path: Path) -> None:
        """Everything that `load` needs to go on as if there had been no interruption."""
        with self._on_stream():
            self._read_rows()
            modules = {name: module.state_dict() for name, module in self._stateful().items()}
            tensors = {"loss_sum": self._loss_sum, "grad_norm": self._grad_norm}
            plain = {"step": self.step, "rows": self.rows, "peak_memory": self.peak_memory}
            calls = asdict(self.attention_calls())
            state = {**modules, **tensors, **plain, "identity": self._identity(), "calls": calls, "rng": rng_state()}
            save_checkpoint(path, state)

    def load(self, path: Path) -> None:
        """Goes on from a checkpoint of the same configuration and corpus; ValueError names what differs."""
        state = load_checkpoint(path)
        _check_same(path, saved=state["identity"], mine=self._identity())
        with self._on_stream():
            for name, module in self._stateful().items():
                module.load_state_dict(state[name])
            if self.config.cuda_graph:
                rates_on_device(self.optimizer, self.device)
            self._loss_sum.copy_(state["loss_sum"])
            self._grad_norm.copy_(state["grad_norm"])
        self.step, self.rows, self.peak_memory = state["step"], state["rows"], state["peak_memory"]
        self._last_row = self.rows[-1]["step"] if self.rows else 0
        self._other_calls = AttentionCalls(**state["calls"])
        set_rng_state(state["rng"])

    def _stateful(self) -> dict[str, Any]:
        return {"model": self.model, "optimizer": self.optimizer, "scaler": self.scaler}

    def _identity(self) -> dict[str, Any]:
        return {**self.config.to_dict(), "corpus_sha256": self.corpus.sha256}

    def _on_stream(self) -> AbstractContextManager[Any]:
        return nullcontext() if self._stream is None else torch.cuda.stream(self._stream)

    def _next_step(self) -> None:
        self._inputs.seek(self.step)
        if self.step == MEMORY_STEP and not self._together:
            self.peak_memory = peak_memory_of(self._optimize, self.device, self._held_tensors)
            self._timer.start()
        elif self.step <= MEMORY_STEP:
            self._optimize()
        else:
            self._step_graph = self._run(self._step_graph, self._optimize)
            self._timer.count_step()
        self._inputs.count()
        self.step += 1
        validate = self.step % self.config.eval_every == 0 or self.finished
        if validate or self.step % self.config.log_every == 0:
            self._add_row(validate)

    def _run(self, graph: GraphedCall | None, function: Callable[[], None]) -> GraphedCall | None:
        """`function`, replayed from its graph if it has one. Returns the graph, None once its capture has failed."""
        if graph is not None and not graph.captured:
            before = attention_calls(self.model)
            try:
                graph.capture(function)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph, the run goes on without: {error}", RuntimeWarning, stacklevel=2)
                self.optimizer.zero_grad(set_to_none=True)  # gradients in the memory of the abandoned capture
                graph = None
            else:
                self._graph_calls[graph] = attention_calls(self.model) - before
            self._other_calls -= attention_calls(self.model) - before  # counted, but not run
        if graph is None:
            function()
        else:
            graph.replay()
            self._other_calls += self._graph_calls[graph]
        return graph

    def _optimize(self) -> None:
        """One step. It reads its inputs on the device and writes there: it may be captured."""
        set_rates(
            self.optimizer, self._inputs.rate() if self.config.cuda_graph else learning_rate(self.config, self.step)
        )
        with self.autocast():
            loss = next_byte_loss(self.model, self._inputs.batch())
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        self._grad_norm.copy_(nn.utils.clip_grad_norm_(self.model.parameters(), self.config.grad_clip))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self._loss_sum += loss.detach()
        self._inputs.advance()

    def _validate(self) -> Tensor:
        """() float64, bits per byte, on the device."""
        self.model.eval()
        self._val_sum.zero_()
        with torch.no_grad():
            for index, batch in enumerate(self._held_out):
                warm = index > 0 or (self._val_graph is not None and self._val_graph.captured)
                if warm and len(batch) == len(self._val_batch):  # the last one may be smaller
                    self._val_batch.copy_(batch)
                    self._val_graph = self._run(self._val_graph, self._validate_batch)
                else:
                    self._add_validation_loss(batch)
        self.model.train()
        return self._val_sum / sum(map(len, self._held_out)) * BITS_PER_NAT

    def _validate_batch(self) -> None:
        self._add_validation_loss(self._val_batch)

    def _add_validation_loss(self, batch: Tensor) -> None:
        with self.autocast():
            self._val_sum += next_byte_loss(self.model, batch).double() * len(batch)

    def _add_row(self, validate: bool) -> None:
        config = self.config
        if not self._together:
            self._timer.stop()
        figures = {
            "train_bpb": self._loss_sum / (self.step - self._last_row) * BITS_PER_NAT,
            "grad_norm": self._grad_norm.clone(),
        }
        self._loss_sum.zero_()
        if validate:
            figures["val_bpb"] = self._validate()
        tokens = self.step * config.batch_size * config.seq_len
        row = {"step": self.step, "tokens": tokens, "lr": learning_rate(config, self.step - 1)}
        self._unread.append((row, figures))
        self._last_row = self.step
        self._read_rows(but=1 if self._together else 0)
        if not self._together:
            self._timer.start()

    def _read_rows(self, but: int = 0) -> None:
        """Brings the figures of all rows `but` the last ones to the host, which waits for them."""
        while len(self._unread) > but:
            row, figures = self._unread.pop(0)
            row |= {name: float(figure) for name, figure in figures.items()}
            if not torch.isfinite(torch.tensor(row["train_bpb"])):
                self._unread.clear()
                raise TrainingDivergedError(f"the loss is {row['train_bpb']} at step {row['step']} of {self.config}")
            self.rows.append(row)

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
