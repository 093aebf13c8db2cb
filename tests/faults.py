"""Something done in the middle of a swap: at one of its calls of torch, or at any instruction."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class AtCall(TorchDispatchMode):
    """Do something before or after one of the calls that copy, allocate or compute."""

    def __init__(self, number: int, act: Callable[[], object], written: bool = False) -> None:
        TorchDispatchMode.__init__(self)
        self.calls = itertools.count(1)
        self.number, self.act, self.written = number, act, written

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.is_view or next(self.calls) != self.number:
            return func(*args, **(kwargs or {}))
        if not self.written:
            self.act()
        result = func(*args, **(kwargs or {}))
        if self.written:
            self.act()
        return result


def run_out_of_memory() -> None:
    raise torch.OutOfMemoryError("injected")


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
