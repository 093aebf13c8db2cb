"""Something done at one instruction of a swap's own code, found by tracing it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any


class AtInstruction:
    """Do something once as many instructions have run as said.

    left: how many more would have to run.

    Args:
        number: 0 to count them alone.
        file: of which alone to count instructions.
    """

    def __init__(self, number: int, act: Callable[[], object], file: str = "") -> None:
        self.left, self.act = number, act
        self.place = f"averaging_optim/_averages/{file}"

    def trace(self, frame: FrameType, event: str, arg: object) -> Any:
        if self.place not in frame.f_code.co_filename:
            return None
        frame.f_trace_opcodes = True
        if event in ("call", "opcode"):
            self.left -= 1
            if self.left == 0:
                self.act()
        return self.trace

    def __enter__(self) -> None:
        self.former = sys.gettrace()  # that of a debugger, or what measures coverage
        sys.settrace(self.trace)

    def __exit__(self, *_: object) -> None:
        sys.settrace(self.former)
