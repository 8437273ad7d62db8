"""Ctrl-C, and the TERM signal that ends a job: finish the step, save, leave cleanly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

INTERRUPTED = 130  # the exit status that shells give to Ctrl-C


@contextmanager
def stop_requested() -> Iterator[Callable[[], bool]]:
    """Yields a function that tells whether a signal has asked to stop. A second signal acts at once, as without us."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # signals reach the main thread only
        yield asked.is_set
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(_number: int, _frame: FrameType | None) -> None:
        asked.set()
        restore()

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    for number in previous:
        signal.signal(number, ask)
    try:
        yield asked.is_set
    finally:
        restore()
