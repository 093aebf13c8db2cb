"""The optimizer under averages of a model that something else trains."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch.nn import Parameter
from torch.optim import Optimizer


class Idle(Optimizer):
    """Trains nothing. A closure is called, as by any optimizer."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        # Any number but 0, which is how torch.distributed.checkpoint's initialising step is known.
        super().__init__(parameters, {"lr": 1.0})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        return None if closure is None else closure()
