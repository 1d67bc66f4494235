"""Ctrl-C and requests to terminate, as exceptions that carry the signal's number."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(KeyboardInterrupt):
    """Raised wherever the program is when the signal `number` arrives."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


def interrupt(number: int, frame) -> None:
    """The handler that raises `Interrupted`."""
    raise Interrupted(number)


@contextmanager
def on_signals(handler: Callable) -> Iterator[None]:
    """Let `handler` take `SIGNALS`, but those that the process was told to ignore."""
    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.getsignal(number) for number in SIGNALS}
        before = {number: old for number, old in before.items() if old is not signal.SIG_IGN}
    for number in before:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
