"""One average: its rule, how often it was updated, its tensors and snapshots."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from averaging_optim._averages.moving import numeric_kind
from averaging_optim._averages.rounding import seed_of
from averaging_optim._averages.store import TensorStore
from averaging_optim._averages.teachers import Teacher
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
        for group in self._optimizer.param_groups:
            if self.key in group:  # one that was put in by hand has none yet
                value: int = group[self.key]
                return value
        return 0

    @value.setter
    def value(self, value: int) -> None:
        for group in self._optimizer.param_groups:
            group[self.key] = value


class Average:
    """What one rule averages.

    stores: key after "averaged_" in a state dict → what is kept under it: the average
        first, under its name, then the snapshots that the rule asks for.
    has_counted: whether updates were counted here, also if all weights were frozen.
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
        self.has_counted = False
        self.stores = {key: TensorStore(dtype, device) for key in store_keys(name, rule)}
        self.tensors, *self.snapshots = self.stores.values()
        self.__setstate__({})

    def __getstate__(self) -> dict[str, Any]:
        # A copy has averages of its own, which no model is made of.
        return {key: value for key, value in self.__dict__.items() if key != "teachers"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.teachers: WeakKeyDictionary[nn.Module, Teacher] = WeakKeyDictionary()

    def share(self, n_averaged: int | None = None) -> float:
        """Return the share of the weights in the next update, or in that after so many.

        Raises:
            ValueError: the rule gives one outside [0, 1].
        """
        if n_averaged is None:
            n_averaged = self.n_averaged.value
            if self.snapshots:
                n_averaged = min(n_averaged, len(self.snapshots))
        if n_averaged == 0:
            return 1.0
        share = self.rule.weight(n_averaged)
        if type(share) is not float or not 0 <= share <= 1:
            check_real(f"rules[{self.name!r}].weight({n_averaged})", share, "[0, 1]")
        return float(share)

    def fit(self, sources: Sequence[Tensor]) -> list[Tensor]:
        """Start at the present values what is missing or doesn't fit; return the latter."""
        misfits = [source for source in sources if not self._fits(source)]
        for store in self.stores.values():
            store.drop(misfits)
            store.start([source for source in sources if source not in store.tensors])
        return misfits

    def start_afresh(self) -> None:
        """Let all that is kept have the present values of weights and buffers."""
        for store in self.stores.values():
            store.copy_from(list(store.tensors))
        self.teach()

    def teach(self) -> None:
        """Let the models that are made of the average follow it."""
        for teacher in list(self.teachers.values()):
            teacher.follow()

    def rebuild_from_snapshots(self, sources: Sequence[Tensor], *, at_random: bool) -> None:
        """Leave the oldest snapshot out, if the average is of as many weights as may be.

        Args:
            at_random: round to 16 bits at random.
        """
        n_averaged, size = self.n_averaged.value, len(self.snapshots)
        if size == 0 or n_averaged <= size:
            return
        # Snapshot j lies at j % size, so that the oldest is the one to come next.
        ordered = [self.snapshots[(n_averaged + i) % size] for i in range(size)]
        shares = [self.share(i) for i in range(size)]
        if at_random:
            kept = [[each.tensors[source] for source in sources] for each in ordered]
            seed = seed_of(f"{self.name}_rebuilt", n_averaged)
            self.tensors.average_at_random(sources, kept, shares, seed)
            return
        for snapshot, share in zip(ordered, shares, strict=True):
            self.tensors.move_toward_other(snapshot, sources, share)

    def count_update(self, sources: Sequence[Tensor], *, at_random: bool) -> None:
        """Note that the average was updated, with a snapshot of the weights in it."""
        n_averaged = self.n_averaged.value
        if self.snapshots:
            snapshot = self.snapshots[n_averaged % len(self.snapshots)]
            if at_random:
                seed = seed_of(f"{self.name}_snapshot", n_averaged)
                snapshot.average_at_random(sources, [sources], [1.0], seed)
            else:
                snapshot.copy_from(sources)
        self.n_averaged.value = n_averaged + 1
        self.has_counted = True

    def _fits(self, source: Tensor) -> bool:
        kept = (store.tensors.get(source) for store in self.stores.values())
        return all(
            each is None
            or (each.shape == source.shape and numeric_kind(each) == numeric_kind(source))
            for each in kept
        )


def store_keys(name: str, rule: Rule) -> list[str]:
    """Return the names under which an average and its snapshots are kept."""
    return [name, *(f"{name}_{i}" for i in range(1, rule.snapshots + 1))]
