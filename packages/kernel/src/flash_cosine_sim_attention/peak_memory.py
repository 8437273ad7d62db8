"""Peak memory of a call on the CPU, from the profiler's record of every allocation: torch's own kernels included."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass

from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read at its first use: no line on stderr for every recording


@dataclass(frozen=True)
class MemoryUse:
    """In bytes, beyond what is held when the call begins. Its results count."""

    peak: int
    largest: int  # the largest single allocation


def peak_memory(run: Callable[[], object]) -> MemoryUse:
    """Memory that run() takes from torch's CPU allocator. Whatever it returns is kept until the end."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        result = run()
    assert recorded.profiler is not None
    events = [event for event in recorded.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = peak = largest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak, largest = max(peak, held), max(largest, event.nbytes())
    del result
    return MemoryUse(peak, largest)
