"""Ctrl-C and SIGTERM, which must not come in between."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def handled_signals(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """
    Have Ctrl-C and SIGTERM call a function; nothing happens outside of the main thread, which alone gets signals.

    :param handler: Called with the signal's number and the current frame
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, previous in before.items():
            # None: a handler that was not set by Python
            signal.signal(number, signal.SIG_DFL if previous is None else previous)


@contextmanager
def delayed_signals() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM take effect at the end of the block."""
    arrived: list[int] = []
    try:
        with handled_signals(lambda number, _: arrived.append(number)):
            yield
    finally:
        for number in dict.fromkeys(arrived):
            signal.raise_signal(number)
