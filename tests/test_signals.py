"""Signals only set a flag, and go back to what they did before."""

import os
import signal
import threading

import pytest

from sslvit.signals import StopFlag


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2", "SIGINT"])
def test_a_signal_is_noted(name: str) -> None:
    number = signal.Signals[name]
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop.is_set()
        os.kill(os.getpid(), number)
        assert stop.is_set()
        assert stop.received == name
    assert signal.getsignal(number) is before


def test_twice_is_still_a_flag() -> None:
    with StopFlag() as stop:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGUSR2)
        assert stop.received == "SIGUSR2"


def test_the_second_interrupt_interrupts() -> None:
    with StopFlag() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_in_another_thread_it_watches_nothing() -> None:
    seen = []

    def work() -> None:
        with StopFlag() as stop:
            seen.append((stop.is_set(), signal.getsignal(signal.SIGTERM)))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, before)]
    assert signal.getsignal(signal.SIGTERM) is before
