"""Time and memory of steps that take turns."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from tqdm import tqdm
from training_arms import TrainingStep

WARM_UPS = 2  # the first makes the optimiser's state, and compiles

Record = dict[str, Any]
"""arm, compiled, seq_len, batch, status; of "ok": ms, ms_min, ms_max, rounds, tokens_per_s, peak_bytes, first loss,
fused_calls, stock_calls; of "oom" and "unsupported" the reason."""


def measure_memory(record: Record, build: Callable[[], TrainingStep]) -> TrainingStep | None:
    """Build, warm up; the peak of one step, model and optimiser included, goes to the record. None: out of memory."""
    before = _allocated()
    step = None
    try:
        step = build()
        record["loss"] = step.step().item()
        for _ in range(WARM_UPS - 1):
            step.step()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        step.step()
        record |= {"status": "ok", "peak_bytes": torch.cuda.max_memory_allocated() - before if _cuda(step) else None}
        return step
    except torch.OutOfMemoryError as error:
        record |= {"status": "oom", "reason": str(error).splitlines()[0][:200]}
    except AssertionError as error:  # of x-transformers: options that do not go together
        record |= {"status": "unsupported", "reason": str(error)[:200]}
    del step
    free()
    return None


def measure(prepared: Sequence[tuple[Record, TrainingStep]], rounds: int, label: str, device: str) -> None:
    """Round after round every arm takes one step, each round starting with another one; medians go to the records."""
    times: list[list[float]] = [[] for _ in prepared]
    for turn in tqdm(range(rounds), desc=label, leave=False, disable=not prepared):
        order = [(turn + i) % len(prepared) for i in range(len(prepared))]
        timed = (_time_events if device == "cuda" else _time_wall)([prepared[i][1] for i in order])
        for i, ms in zip(order, timed, strict=True):
            times[i].append(ms)
    for (record, _), measured in zip(prepared, times, strict=True):
        record |= {"ms": statistics.median(measured), "ms_min": min(measured), "ms_max": max(measured)}
        tokens = record["batch"] * record["seq_len"]
        record |= {"rounds": rounds, "tokens_per_s": tokens * 1000 / record["ms"]}


def copy_rate() -> float:
    """TB/s, read + written, of a large copy: 4.2 on an H200 that nobody else uses."""
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda")
    target, pairs = torch.empty_like(source), []
    for _ in range(8):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        target.copy_(source)
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return 2 * source.numel() / statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e9


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _time_events(steps: Sequence[TrainingStep]) -> list[float]:
    """Milliseconds on the device, launch gaps included where the host is slower; no wait between two steps."""
    pairs = []
    for step in steps:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step.step()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairs]


def _time_wall(steps: Sequence[TrainingStep]) -> list[float]:
    times = []
    for step in steps:
        start = time.perf_counter()
        step.step()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def _allocated() -> int:
    free()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def _cuda(step: TrainingStep) -> bool:
    return step.device == "cuda"
