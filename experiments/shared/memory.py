"""Peak memory of one training step, in bytes: what the allocator hands out, not what the process maps."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else the profiler writes its own start and stop into the progress bar


def peak_memory_of(step: Callable[[], object], device: torch.device, held: Callable[[], Iterable[Tensor]]) -> int:
    """Runs `step` once and returns the most bytes of tensors alive at one time in it.

    On CUDA this is the caching allocator's peak. On the CPU every allocation that the profiler records is summed and
    added to the bytes of `held()`, the tensors alive before the step. Unlike the resident set size it is the same in
    every run and does not remember earlier runs of the same process.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        step()
        return torch.cuda.max_memory_allocated(device)
    before = sum(tensor.untyped_storage().nbytes() for tensor in held())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    return before + _highest_sum(_allocations(profiler))


def _allocations(profiler: torch.profiler.profile) -> list[int]:
    """Bytes allocated (positive) and freed (negative), in order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "trace.json")
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    records = [event for event in events if event.get("name") == "[memory]"]
    return [event["args"]["Bytes"] for event in sorted(records, key=lambda event: event["ts"])]


def _highest_sum(changes: list[int]) -> int:
    total = highest = 0
    for change in changes:
        total += change
        highest = max(highest, total)
    return highest
