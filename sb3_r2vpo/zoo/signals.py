"""Ctrl-C and SIGTERM, by which clusters preempt: what is to be saved is saved first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Received:
    """Which signal has come; 0 for none."""

    number: int = 0


class Handling:
    """Whether handlers stay after their block, in a process that is about to exit."""

    keep: bool = False


@contextmanager
def as_interrupt(*numbers: int) -> Iterator[Received]:
    """
    Make signals a ``KeyboardInterrupt``, by which SB3, the Zoo and Optuna know how to end. One is enough: those that come
    after it are ignored until the end of the block, as what the first one has started to save must not be broken.

    :param numbers: Of the signals; in the main thread only, which gets them
    :return: Which one has come
    """
    received = Received()

    def interrupt(number: int, frame: FrameType | None) -> None:
        received.number = number
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    with _handled(interrupt, *numbers):
        yield received


@contextmanager
def uninterrupted() -> Iterator[Handling]:
    """
    Ignore Ctrl-C and SIGTERM, but where a block within handles them.

    :return: Set its ``keep`` where they are to be ignored until the process has ended
    """
    with _handled(signal.SIG_IGN, signal.SIGINT, signal.SIGTERM) as handling:
        yield handling


@contextmanager
def _handled(handler: Any, *numbers: int) -> Iterator[Handling]:
    handling = Handling()
    if threading.current_thread() is not threading.main_thread():
        yield handling
        return
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield handling
    finally:
        for number, before in ({} if handling.keep else previous).items():
            signal.signal(number, before)
