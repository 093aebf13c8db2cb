"""What is kept out of compiled graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Counters change with every step, and a compiled graph would hold them as constants; of locks
# and signals it knows nothing.
uncompiled: Callable[[_Function], _Function] = torch.compiler.disable
