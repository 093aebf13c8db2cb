"""One average: its rule, how often it was updated, its tensors and snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from averaging_optim._averages.store import TensorStore
from averaging_optim._checks import check_real
from averaging_optim._rules import Rule

if TYPE_CHECKING:
    from torch.optim import Optimizer


class Counter:
    """A number that every parameter group holds, so that whatever saves groups saves it."""

    def __init__(self, key: str, optimizer: Optimizer) -> None:
        self.key = key
        self._optimizer = optimizer

    @property
    def value(self) -> int:
        value: int = self._optimizer.param_groups[0][self.key]
        return value

    @value.setter
    def value(self, value: int) -> None:
        for group in self._optimizer.param_groups:
            group[self.key] = value


class Average:
    """What one rule averages.

    stores: key after "averaged_" in a state dict → what is kept under it: the average
        first, under its name, then the snapshots that the rule asks for.
    is_swapped: whether this is the average of a swap, also of one that has no effect.
    """

    def __init__(
        self,
        name: str,
        rule: Rule,
        n_averaged: Counter,
        dtype: torch.dtype | None,
        device: torch.device | None,
    ) -> None:
        self.name = name
        self.rule = rule
        self.n_averaged = n_averaged
        self.stores = {key: TensorStore(dtype, device) for key in store_keys(name, rule)}
        self.tensors, *self.snapshots = self.stores.values()
        self.is_swapped = False

    def share(self) -> float:
        """Return the share of the weights in the next update.

        Raises:
            ValueError: the rule gives one outside [0, 1].
        """
        n_averaged = self.n_averaged.value
        if self.snapshots:
            n_averaged = min(n_averaged, len(self.snapshots))
        return self._share_after(n_averaged)

    def writes_back(self) -> bool:
        """Return whether the weights take the average's values at the next update."""
        return self.rule.writes_back(self.n_averaged.value + 1)

    def rebuild_from_snapshots(self, sources: Sequence[Tensor]) -> None:
        """Leave the oldest snapshot out, if the average is of as many weights as may be."""
        n_averaged, size = self.n_averaged.value, len(self.snapshots)
        if size == 0 or n_averaged <= size:
            return
        for i in range(size):
            # Snapshot j lies at j % size, so that the oldest is the one to come next.
            snapshot = self.snapshots[(n_averaged + i) % size]
            self.tensors.move_toward_other(snapshot, sources, self._share_after(i))

    def count_update(self, sources: Sequence[Tensor]) -> None:
        """Note that the average was updated, with a snapshot of the weights in it."""
        n_averaged = self.n_averaged.value
        if self.snapshots:
            self.snapshots[n_averaged % len(self.snapshots)].copy_from(sources)
        self.n_averaged.value = n_averaged + 1

    def _share_after(self, n_averaged: int) -> float:
        if n_averaged == 0:
            return 1.0
        share = self.rule.weight(n_averaged)
        check_real(f"rules[{self.name!r}].weight({n_averaged})", share, "[0, 1]")
        return float(share)


def store_keys(name: str, rule: Rule) -> list[str]:
    """Return the names under which an average and its snapshots are kept."""
    return [name, *(f"{name}_{i}" for i in range(1, rule.snapshots + 1))]
