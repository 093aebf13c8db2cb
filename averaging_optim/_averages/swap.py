"""An average in the place of the weights, for as long as a block lasts."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from types import CodeType, FrameType, TracebackType

from averaging_optim._averages.average import Average
from averaging_optim._averages.signals import DeferredSignals
from averaging_optim._compiling import uncompiled

Move = Callable[[], AbstractContextManager[None]]


@dataclass(frozen=True)
class Combination:
    """A weighted sum of averages and weights.

    name: name of an average, or "weights" → factor.
    """

    name: dict[str, float]


class SwapState:
    """Which average of an optimizer is in the model, if any.

    Swaps to one average may overlap in any order, in any threads: the first that is entered
    moves values, and the last that is left moves them back.

    lock: held by whoever moves or writes averages.
    is_superseded: whether another AveragingOptimizer has wrapped the optimizer since.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.average: Average | Combination | None = None
        self.is_superseded = False
        self._holders = 0
        self._moved = ExitStack()

    def __reduce__(self) -> tuple[type[SwapState], tuple[()]]:
        return SwapState, ()

    def refuse(self, call: str) -> None:
        """Raise a RuntimeError that names the call if an average is in the model."""
        if self.is_superseded:
            self.refuse_if_superseded(call)
        if (average := self.average) is not None:
            raise RuntimeError(
                f"`{call}` is not allowed inside `swap_to_averaged({average.name!r})`. "
                "Leave its block first."
            )

    def refuse_if_superseded(self, call: str) -> None:
        if self.is_superseded:
            raise RuntimeError(
                f"`{call}` is not allowed: the wrapped optimizer has been wrapped again. Use the "
                "new AveragingOptimizer."
            )

    def enter(self, average: Average | Combination, move: Move) -> None:
        if average != self.average:
            self.refuse(f"swap_to_averaged({average.name!r})")
        if self._holders == 0:
            moved = ExitStack()
            moved.enter_context(move())
            self._moved, self.average = moved, average
        self._holders += 1

    def leave(self) -> None:
        self._holders -= 1
        if self._holders == 0:
            try:
                self._moved.close()
            finally:
                self.average = None


@dataclass(frozen=True)
class SwapPart:
    """What a swap does to one optimizer."""

    state: SwapState
    average: Average | Combination
    move: Move

    def enter(self) -> None:
        with self.state.lock:
            self.state.enter(self.average, self.move)

    def leave(self) -> None:
        with self.state.lock:
            self.state.leave()


class Swap:
    """What `swap_to_averaged` returns: a context manager and nothing else.

    Args:
        parts: all of which are entered, or none.
    """

    def __init__(self, parts: Sequence[SwapPart]) -> None:
        self._parts = parts
        self._entered = ExitStack()
        self._phase = "new"

    def __enter__(self) -> None:
        if self._phase != "new":
            raise RuntimeError(
                "`swap_to_averaged()` must be called for each block: this one is in use."
            )
        try:
            self._enter()
            self._phase = "entered"
        except BaseException:
            if self._phase != "new":
                self.__exit__(None, None, None)
            else:
                self._let_signals_through()
            raise

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._phase not in ("inside", "entered"):
            raise RuntimeError(
                "`swap_to_averaged()` must be entered before it is left, and left once."
            )
        try:
            self._leave()
        finally:
            self._let_signals_through()

    # Signals are to find this very code in the frames of entering and leaving, so that it isn't
    # those methods that are kept from being compiled.

    @uncompiled
    def _enter(self) -> None:
        _signals.hold(self)
        with ExitStack() as entered:
            for part in self._parts:
                part.enter()
                entered.callback(part.leave)
            self._entered = entered.pop_all()
        self._phase = "inside"
        _signals.call_waiting()

    @uncompiled
    def _leave(self) -> None:
        self._entered.close()

    def must_wait(self, code: CodeType) -> bool:
        """Return whether signals must wait while this method of the swap runs."""
        return (code, self._phase) in _MOVING

    @uncompiled
    def _let_signals_through(self) -> None:
        try:
            _signals.release(self)
        finally:
            self._phase = "left"
            _signals.call_waiting()


# The second is of the last instructions of entering, after which nobody would leave.
_MOVING = (
    (Swap.__enter__.__code__, "new"),
    (Swap.__enter__.__code__, "entered"),
    (Swap.__exit__.__code__, "inside"),
    (Swap.__exit__.__code__, "entered"),
)


def _is_moving(frame: FrameType) -> bool:
    is_of_swap = frame.f_code in (Swap.__enter__.__code__, Swap.__exit__.__code__)
    return is_of_swap and bool(frame.f_locals["self"].must_wait(frame.f_code))


_signals = DeferredSignals(_is_moving)
