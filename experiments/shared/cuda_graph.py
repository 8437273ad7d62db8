"""A function captured once into a CUDA graph and replayed: a small model's step is bound by its thousand launches."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Callable

import torch


class GraphedCall:
    """A function's launches on a CUDA stream of the caller's, the default stream excepted: it allows no capture.

    The function takes and returns nothing, touches the same tensors each time and reads none of them back to the host.
    Call it a few times as it is first (libraries set themselves up, kernels compile), then `capture`, then `replay`.
    """

    def __init__(self) -> None:
        self._graph: torch.cuda.CUDAGraph | None = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def capture(self, function: Callable[[], object]) -> None:
        """Records the launches and runs none of them. A RuntimeError leaves the device usable, and nothing captured.

        `torch.cuda.graph` does the same after it has waited for the whole device and emptied the allocator's cache:
        with other runs at work on streams of their own, both would cost all of them.
        """
        graph = torch.cuda.CUDAGraph()
        collecting = gc.isenabled()
        gc.disable()  # another graph's end must not fall into this one's capture
        try:
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                function()
            except BaseException:
                _abandon(graph)
                raise
            graph.capture_end()
        finally:
            if collecting:
                gc.enable()
        self._graph = graph

    def replay(self) -> None:
        assert self._graph is not None, "expected capture() before replay()"
        self._graph.replay()


def _abandon(graph: torch.cuda.CUDAGraph) -> None:
    """Ends a capture that failed; what it says then adds nothing to the first error."""
    with contextlib.suppress(RuntimeError):
        graph.capture_end()
