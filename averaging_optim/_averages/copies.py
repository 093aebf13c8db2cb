"""Signs that an optimizer trains copies of the weights that it was given (master weights)."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.nn import Parameter

from averaging_optim._averages.sharding import sharding_of


class Given:
    """The parameters that an optimizer was given, and what it has instead when training begins.

    Parameters that take the place of others later are no copies: programs resize weights so.

    has_begun: whether training has begun.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.has_begun = False
        self._ids: set[int] = set()
        self._copies = 0
        self.add(parameters)

    def __getstate__(self) -> dict[str, Any]:
        # The ids are of this process and these parameters, and a copy trains others.
        return {"has_begun": True, "_ids": set(), "_copies": 0}

    def add(self, parameters: Iterable[Tensor]) -> None:
        self._ids.update(map(id, parameters))

    def compare(self, parameters: Sequence[Tensor]) -> None:
        """Look for others in the place of parameters still in use; only before training."""
        # FSDP2 replaces the weights themselves.
        others = [
            each for each in parameters if id(each) not in self._ids and not sharding_of(each)
        ]
        is_copied = others and _any_is_trained(self._ids.difference(map(id, parameters)))
        self._copies = len(others) if is_copied else 0

    def message(self) -> str:
        """Return what to tell, once, before an average is used; nothing if all is well."""
        copies, self._copies = self._copies, 0
        if not copies:
            return ""
        return (
            f"{copies} parameters took the place of those that the optimizer was given, which are "
            "still in use. If they are copies, as DeepSpeed makes, the averages are of the copies, "
            "and a swap doesn't change the model. Use `AveragingOptimizer.of(model, rule)`, and "
            "call its `step()` after each step of DeepSpeed's."
        )


def _any_is_trained(ids: set[int]) -> bool:
    """Return whether a parameter with one of these ids is there."""
    # A weak reference would say so too, but keeps `torch.utils.swap_tensors` from working.
    return any(
        id(each) in ids and isinstance(each, Parameter) and each.requires_grad
        for each in gc.get_objects()
    )
