"""Clocks: how a run is made repeatable, timed, and its memory measured, on a GPU and on the CPU."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch

Run = Callable[[], object]


class ContextLost(RuntimeError):
    """The device answers no more: nothing after this can be measured in this process."""


class Clock(Protocol):
    """How runs are made repeatable and timed on one kind of device."""

    device: torch.device
    name: str
    warm_up_seconds: float

    def stream(self) -> AbstractContextManager[Any]: ...
    def peak_bytes(self, run: Run) -> int | None: ...
    def repeatable(self, run: Run) -> Run: ...
    def time_ms(self, repeats: list[Run]) -> list[float]: ...
    def recover(self) -> None: ...


class CpuClock:
    """time.perf_counter around each call."""

    def __init__(self) -> None:
        self.device, self.name, self.warm_up_seconds = torch.device("cpu"), "perf_counter", 0.0

    def stream(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def peak_bytes(self, run: Run) -> int | None:
        return None

    def repeatable(self, run: Run) -> Run:
        return run

    def time_ms(self, repeats: list[Run]) -> list[float]:
        times = []
        for repeat in repeats:
            start = time.perf_counter()
            repeat()
            times.append((time.perf_counter() - start) * 1e3)
        return times

    def recover(self) -> None:
        gc.collect()


class CudaClock:
    """Events around replays of a CUDA graph ("graph"), or around the calls themselves with their launches ("events").

    Everything runs on one side stream: graphs are captured there, and a backward runs on the stream of its forward.
    """

    def __init__(self, device: torch.device, timer: str = "graph") -> None:
        self.device, self.name, self.warm_up_seconds = device, timer, 0.05  # an idle GPU clocks down
        self._stream = torch.cuda.Stream(device)
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)
        self._flush = torch.empty(max(4 * cache, 1 << 28), dtype=torch.uint8, device=device)

    def stream(self) -> AbstractContextManager[Any]:
        torch.cuda.synchronize(self.device)
        return torch.cuda.stream(self._stream)

    def peak_bytes(self, run: Run) -> int:
        """The most memory that a run holds above what is there before it: outputs, saved tensors, workspaces."""
        torch.cuda.synchronize(self.device)
        before = torch.cuda.memory_allocated(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        run()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before

    def repeatable(self, run: Run) -> Run:
        if self.name == "events":
            return run
        torch.cuda.synchronize(self.device)
        graph, failures = torch.cuda.CUDAGraph(), []
        try:
            with torch.cuda.graph(graph, stream=self._stream):
                try:
                    results = run()
                except Exception as error:
                    failures.append(error)
                    raise
        except Exception as error:  # the end of a capture that failed raises an error of its own
            raise (failures or [error])[0] from None

        def replay(_held: object = (results, run)) -> None:  # what the graph writes to, and what it reads
            graph.replay()

        return replay

    def time_ms(self, repeats: list[Run]) -> list[float]:
        pairs = []
        for repeat in repeats:
            self._flush.zero_()  # takes longer than the host needs to launch what follows
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            repeat()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in pairs]

    def recover(self) -> None:
        """Free what a failed variant held; ContextLost if the device does not answer any more."""
        gc.collect()
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
            torch.zeros(1, device=self.device).item()
        except Exception as error:
            raise ContextLost(brief(error)) from error


def brief(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:200]}"


def ceilings(clock: Clock) -> dict[str, float]:
    """Of the GPU: TFLOP/s of a large bf16 matrix product, TB/s of a large copy, read + written; {} on a CPU."""
    if clock.device.type != "cuda":
        return {}
    n = 8192
    a, b = (torch.randn(n, n, device=clock.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(1 << 31, dtype=torch.uint8, device=clock.device).random_()
    target = torch.empty_like(source)
    runs: list[Run] = [lambda: a @ b, lambda: target.copy_(source)]
    with clock.stream():
        rounds = [clock.time_ms(runs) for _ in range(10)]
    matmul_ms, copy_ms = (statistics.median(times) for times in zip(*rounds, strict=True))
    return {"tflops": 2 * n**3 / matmul_ms / 1e9, "tb_per_s": 2 * source.numel() / copy_ms / 1e9}
