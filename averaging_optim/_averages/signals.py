"""Signals wait while values are under way, so that Ctrl-C leaves none of them half-way."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import FrameType


@contextmanager
def signals_deferred_around(context: AbstractContextManager[None]) -> Iterator[None]:
    """Enter and leave the context without being interrupted; its body may be."""
    stack = ExitStack()
    try:
        with signals_deferred():
            stack.enter_context(context)
        yield
    finally:
        with signals_deferred():
            stack.close()


@contextmanager
def signals_deferred() -> Iterator[None]:
    """Let every signal that has a handler in Python wait until the block is left.

    Python runs such handlers in its main thread, between any two instructions. Some
    raise, as that of Ctrl-C does; some save a checkpoint.
    """
    waiting: list[tuple[int, FrameType | None]] = []
    handlers = _handlers()
    for number in handlers:
        signal.signal(number, lambda *received: waiting.append(received))
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number, frame in waiting:
            handlers[number](number, frame)


def _handlers() -> dict[int, Callable[[int, FrameType | None], object]]:
    """Return signal → its handler in Python; none outside the main thread, which has them all."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    # Others are a number, or None where the handler is in C.
    return {number: each for number, each in handlers.items() if callable(each)}
