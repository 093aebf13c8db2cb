"""One average: a tensor for each weight and buffer, made once and written into ever after."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from averaging_optim._copies import made_anew
from averaging_optim._tensors import (
    are_alike,
    by_kind,
    copy_into,
    exchanged,
    followed,
    independent,
    layout_of,
    move_toward,
    new_average,
    replaced,
    stay_finite,
)


class Average:
    """Weight or buffer → its average.

    is_swapped: whether this is the average of a swap, also of one that has no effect.
        Kept here and not by the optimizer, of which Lightning makes a second object with
        the same attributes (lightning/pytorch/core/optimizer.py).
    changes: how often a tensor has been replaced or dropped, or made for other sources.

    Args:
        dtype: of the averages; None takes that of each tensor, at least float32.
        device: of the averages; None takes that of each tensor.
    """

    def __init__(self, dtype: torch.dtype | None, device: torch.device | None) -> None:
        self.tensors: dict[Tensor, Tensor] = {}
        self.is_swapped = False
        self.changes = 0
        self._dtype = dtype
        self._device = device
        self._made_for: list[Tensor] = []
        self._held: dict[Tensor, Tensor] = {}

    def make(self, sources: Sequence[Tensor]) -> None:
        """Start an average at the present values of each source that has none."""
        if are_the_same(sources, self._made_for):
            return
        new = [source for source in sources if source not in self.tensors]
        self._keep({source: new_average(source, self._dtype, self._device) for source in new})
        self._made_for = list(sources)

    def drop(self, source: Tensor) -> None:
        """Keep no average of the source; no effect if there is none."""
        self.tensors.pop(source, None)
        self.changes += 1
        self._made_for = []

    def stays_finite(self, sources: Sequence[Tensor]) -> bool:
        """Return whether an update toward the sources' present values keeps averages finite."""
        return stay_finite([self.tensors[source] for source in sources], sources)

    def take(self, sources: Sequence[Tensor]) -> None:
        """Copy the sources' present values."""
        copy_into([self.tensors[source] for source in sources], sources)

    def follow(self, other: Average, sources: Sequence[Tensor], share: float) -> None:
        """average ← average + share · (other − average), for these sources."""
        others = [other.tensors[source] for source in sources]
        move_toward(by_kind(others, [self.tensors[source] for source in sources]), [share])

    def write_back(self, sources: Sequence[Tensor]) -> None:
        """Let the sources have the values of their averages."""
        copy_into(sources, [self.tensors[source] for source in sources])

    @contextmanager
    def swapped(self, weights: Iterable[Tensor], buffers: Iterable[Tensor]) -> Iterator[None]:
        """Let weights and buffers hold their averages until the block is left."""
        weights = [weight for weight in weights if weight in self.tensors]
        alike = [weight for weight in weights if are_alike(weight, self.tensors[weight])]
        # Averages of buffers stay: update_bn in the block must not reach them.
        others = [weight for weight in weights if not are_alike(weight, self.tensors[weight])]
        others += [buffer for buffer in buffers if buffer in self.tensors]
        # The memory that holds the averages meanwhile: `Module.to` would give a weight another.
        held = {weight: weight.detach() for weight in alike}
        with (
            replaced(others, [self.tensors[other] for other in others]),
            followed(alike, list(held.values())),
            exchanged(list(held.values()), [self.tensors[weight] for weight in alike]),
            made_anew(weights),
        ):
            self._held = held
            try:
                yield
            finally:
                self._held = {}

    def read(self, source: Tensor) -> Tensor:
        """Return the average of a weight or buffer, a copy if the weight's memory now holds it."""
        return independent(self._held[source]) if source in self._held else self.tensors[source]

    def homes(self, sources: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Return the tensors to load averages into: the present ones where they can serve."""
        return {source: self._home(source) for source in sources}

    def load(self, homes: Mapping[Tensor, Tensor], values: Mapping[Tensor, Tensor]) -> None:
        """Copy the values into their homes, and keep these."""
        copy_into(list(homes.values()), [values[source] for source in homes])
        self._keep(homes)

    def _keep(self, tensors: Mapping[Tensor, Tensor]) -> None:
        self.tensors.update(tensors)
        self.changes += 1

    def _home(self, source: Tensor) -> Tensor:
        average = self.tensors.get(source)
        if average is not None and average.device == (self._device or source.device):
            return average
        return new_average(source, self._dtype, self._device)


def copied_from_elsewhere(
    values: Mapping[str, Mapping[Tensor, Tensor]],
    homes: Mapping[str, Mapping[Tensor, Tensor]],
    averages: Iterable[Average],
) -> dict[str, dict[Tensor, Tensor]]:
    """Return the values for these homes; those that are kept in other homes now, as copies."""
    kept = {id(each) for average in averages for each in average.tensors.values()}

    def apart(value: Tensor, home: Tensor) -> Tensor:
        return independent(value) if id(value) in kept and value is not home else value

    return {
        name: {source: apart(value, homes[name][source]) for source, value in each.items()}
        for name, each in values.items()
    }


class Gathered:
    """The tensors of an update as kernels want them, until one of them is another.

    To gather a thousand small tensors takes longer than to average them. A copy is empty.
    """

    def __init__(self) -> None:
        self._of: tuple[object, ...] = ()
        self._kinds: list[list[list[Tensor]]] = []

    def __reduce__(self) -> tuple[type[Gathered], tuple[()]]:
        return Gathered, ()

    def kinds(
        self, sources: Sequence[Tensor], averages: Sequence[Average]
    ) -> list[list[list[Tensor]]]:
        """Return lists of sources of one kind, each followed by lists of their averages.

        Args:
            sources: those that the averages have last been made for.
        """
        changes = [(average, average.changes) for average in averages]
        # `Module.to` and `tensor.data = ...` change these two.
        of = changes, [each.dtype for each in sources], [each.device for each in sources]
        if of != self._of:
            kept = [[average.tensors[source] for source in sources] for average in averages]
            self._kinds = list(by_kind(sources, *kept))
            # FSDP gives a DTensor another local tensor, which does not show.
            self._of = () if any(layout_of(each) for each in sources) else of
        return self._kinds


def are_the_same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Return whether both hold the same tensors, not just equal ones."""
    return len(first) == len(second) and all(map(operator.is_, first, second))
