from __future__ import annotations

import signal
import threading

import pytest

from experiments.shared.interrupt import stop_requested

pytestmark = pytest.mark.skipif(
    threading.current_thread() is not threading.main_thread(), reason="signals reach the main thread only"
)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks(number: signal.Signals):
    before = signal.getsignal(number)
    with stop_requested() as should_stop:
        assert not should_stop()
        signal.raise_signal(number)
        assert should_stop()
    assert signal.getsignal(number) is before


@pytest.fixture
def _python_handles_sigint():
    """It does not where the tests are a shell's background job."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_python_handles_sigint")
def test_the_second_one_acts_at_once():
    with stop_requested() as should_stop:
        signal.raise_signal(signal.SIGINT)
        assert should_stop()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_other_threads_may_use_it():
    asked: list[bool] = []

    def work() -> None:
        with stop_requested() as should_stop:
            asked.append(should_stop())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert asked == [False]
