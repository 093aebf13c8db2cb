"""Signals wait while a swap is entered or left, so that Ctrl-C never leaves one half-way."""

from __future__ import annotations

import importlib
import signal
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from weakref import WeakSet

_Handler = Callable[[int, FrameType | None], object]
_Received = tuple[_Handler, int, FrameType | None]
# What `signal.getsignal` calls, and makes an enum of, which takes 0.3 ms for all signals.
_getsignal: Callable[[int], object] = importlib.import_module("_signal").getsignal

# Ctrl-C first: from then on it waits for the others to be replaced.
_NUMBERS = sorted(map(int, signal.valid_signals()), key=lambda number: number != signal.SIGINT)


class DeferredSignals:
    """Handlers in Python that wait while they must not interrupt.

    Python runs them in its main thread, between any two instructions. Some raise, as that
    of Ctrl-C does; some save a checkpoint. They are replaced for as long as somebody holds,
    so that the first instructions of leaving are covered too.

    Args:
        must_wait: frame → whether a handler must not run there, nor in what it has called.
    """

    def __init__(self, must_wait: Callable[[FrameType], bool]) -> None:
        self._must_wait = must_wait
        self._holders: WeakSet[object] = WeakSet()
        self._waiting: list[_Received] = []

    def hold(self, holder: object) -> None:
        """Replace all handlers; other threads than the main one have none to replace."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._holders.add(holder)
        for number in _NUMBERS:
            handler = _getsignal(number)
            # Others are a number, or None where the handler is in C.
            if callable(handler) and not isinstance(handler, _Deferred):
                signal.signal(number, _Deferred(handler, self._receive))

    def release(self, holder: object) -> None:
        """Put the handlers back when nobody holds, but for those that were replaced since."""
        self._holders.discard(holder)
        if not self._holders and threading.current_thread() is threading.main_thread():
            # Ctrl-C last, for handlers that are back already may raise meanwhile.
            _put_back(_NUMBERS[::-1])

    def call_waiting(self) -> None:
        """Call the handlers of all signals that have waited, also if one of them raises."""
        waiting, self._waiting = self._waiting, []
        _call_all(waiting)

    def _receive(self, received: _Received) -> None:
        _, _, frame = received
        while frame is not None:
            if self._must_wait(frame):
                self._waiting.append(received)
                return
            frame = frame.f_back
        _call_all([received])


class _Deferred:
    """What stands in the place of one handler, wherever a program puts it meanwhile."""

    def __init__(self, handler: _Handler, receive: Callable[[_Received], None]) -> None:
        self.handler = handler
        self._receive = receive

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self._receive((self.handler, number, frame))


def _put_back(left: list[int]) -> None:
    try:
        while left:
            handler = _getsignal(left[0])
            if isinstance(handler, _Deferred):
                signal.signal(left[0], handler.handler)
            del left[0]
    except BaseException:
        _put_back(left)
        raise


def _call_all(waiting: Sequence[_Received]) -> None:
    if waiting:
        (handler, number, frame), *others = waiting
        try:
            handler(number, frame)
        finally:
            _call_all(others)
