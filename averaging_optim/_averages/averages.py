"""All averages of one optimizer: which weights they are of, and their updates."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from averaging_optim._averages.average import Average, Counter
from averaging_optim._averages.moving import has_infinity, move_toward
from averaging_optim._averages.store import GroupedTensors, TensorStore
from averaging_optim._rules import Rule

STEPS = "averaging_steps"
SKIPPED = "n_skipped"
COUNT = "n_averaged_"


class Averages(Mapping[str, Average]):
    """Name → average, updated together.

    steps: optimizer steps so far.
    skipped: updates left out because of numbers that are not finite.
    buffers: those that go with the weights, averaged or copied along.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        optimizer: Optimizer,
        buffers: Sequence[Tensor],
        dtype: torch.dtype | None,
        device: torch.device | None,
        skip_nonfinite: bool,
    ) -> None:
        self._by_name = {
            name: Average(name, rule, Counter(COUNT + name, optimizer), dtype, device)
            for name, rule in rules.items()
        }
        self.rules = rules
        self.steps = Counter(STEPS, optimizer)
        self.skipped = Counter(SKIPPED, optimizer)
        self.stores = {
            key: store for average in self.values() for key, store in average.stores.items()
        }
        self.buffers = tuple(buffers)
        # The difference of two infinities is NaN.
        self._averaged_buffers = tuple(itertools.filterfalse(has_infinity, buffers))
        self._copied_buffers = tuple(filter(has_infinity, buffers))
        self._optimizer = optimizer
        self._skip_nonfinite = skip_nonfinite
        self._grouped: dict[tuple[str, ...], GroupedTensors] = {}
        for counter in self.counters():
            counter.value = 0

    def __getitem__(self, name: str) -> Average:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def counters(self) -> list[Counter]:
        return [self.steps, self.skipped, *(average.n_averaged for average in self.values())]

    def weights(self) -> list[Tensor]:
        """Return the parameters that are averaged."""
        groups = (group for group in self._optimizer.param_groups if group.get("average", True))
        return [weight for group in groups for weight in group["params"]]

    def sources(self) -> list[Tensor]:
        """Return the parameters and buffers that there are averages of."""
        return [*self.weights(), *self.buffers]

    def due_at(self, step: int) -> list[Average]:
        return [average for average in self.values() if average.rule.is_due(step)]

    def make(self) -> None:
        """Start an average at the present values of each weight or buffer that has none."""
        sources = self.sources()
        for store in self.stores.values():
            store.make(sources)

    def begin(self) -> None:
        """Average by the rules that begin with the weights before the first step."""
        shares = {each: 1.0 for each in self.due_at(0) if each.n_averaged.value == 0}
        if shares:
            self.make()
            self.update(shares)

    def update(self, shares: Mapping[Average, float]) -> None:
        """Update these averages, whose tensors have been made, or skip them all."""
        if not shares:
            return
        sources = [*self.weights(), *self._averaged_buffers]
        if self._skip_nonfinite and not self._any_store().stays_finite(sources):
            self.skipped.value += 1
            return
        writing = [average for average in shares if average.writes_back()]
        for average in writing:  # first, for the others to average what training goes on with
            self._move(sources, {average: shares[average]})
            average.tensors.copy_to(sources)
        self._move(sources, {each: shares[each] for each in shares if each not in writing})
        if self._copied_buffers:
            for average in shares:
                average.tensors.copy_from(self._copied_buffers)

    def _move(self, sources: Sequence[Tensor], shares: Mapping[Average, float]) -> None:
        if not shares:
            return
        for average in shares:
            average.rebuild_from_snapshots(sources)
        names = tuple(average.name for average in shares)
        grouped = self._grouped.setdefault(names, GroupedTensors())
        groups = grouped.groups(sources, [average.tensors for average in shares])
        move_toward(groups, list(shares.values()))
        for average in shares:
            average.count_update(sources)

    def _any_store(self) -> TensorStore:
        # All averages are of the same dtypes, so that one speaks for the others.
        return next(iter(self.stores.values()))
