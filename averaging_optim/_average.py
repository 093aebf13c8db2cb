"""One average: a tensor for each weight and buffer, made once and written into ever after."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from averaging_optim._copies import made_anew
from averaging_optim._tensors import (
    are_alike,
    copy_into,
    exchanged,
    independent,
    move_toward,
    new_average,
    replaced,
)


class Average:
    """Weight or buffer → its average.

    is_swapped: whether this is the average of a swap, also of one that has no effect.
        Kept here and not by the optimizer, of which Lightning makes a second object with
        the same attributes (lightning/pytorch/core/optimizer.py).

    Args:
        dtype: of the averages; None takes that of each tensor, at least float32.
        device: of the averages; None takes that of each tensor.
    """

    def __init__(self, dtype: torch.dtype | None, device: torch.device | None) -> None:
        self.tensors: dict[Tensor, Tensor] = {}
        self.is_swapped = False
        self._dtype = dtype
        self._device = device
        self._exchanged: frozenset[Tensor] = frozenset()

    def make(self, sources: Iterable[Tensor]) -> None:
        """Start an average at the present values of each source that has none."""
        for source in sources:
            if source not in self.tensors:
                self.tensors[source] = new_average(source, self._dtype, self._device)

    def update(self, sources: Sequence[Tensor], share: float) -> None:
        """Move the averages of the sources toward their present values."""
        move_toward([self.tensors[source] for source in sources], sources, share)

    @contextmanager
    def swapped(self, weights: Iterable[Tensor], buffers: Iterable[Tensor]) -> Iterator[None]:
        """Let weights and buffers hold their averages until the block is left."""
        weights = [weight for weight in weights if weight in self.tensors]
        alike = [weight for weight in weights if are_alike(weight, self.tensors[weight])]
        # Averages of buffers stay: update_bn in the block must not reach them.
        others = [weight for weight in weights if not are_alike(weight, self.tensors[weight])]
        others += [buffer for buffer in buffers if buffer in self.tensors]
        with (
            replaced(others, [self.tensors[other] for other in others]),
            exchanged(alike, [self.tensors[weight] for weight in alike]),
            made_anew(weights),
        ):
            self._exchanged = frozenset(alike)
            try:
                yield
            finally:
                self._exchanged = frozenset()

    def read(self, source: Tensor) -> Tensor:
        """Return the average of a weight or buffer, a copy if the weight now holds it."""
        return independent(source) if source in self._exchanged else self.tensors[source]

    def homes(self, sources: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Return the tensors to load averages into: the present ones where they can serve."""
        return {source: self._home(source) for source in sources}

    def load(self, homes: Mapping[Tensor, Tensor], values: Mapping[Tensor, Tensor]) -> None:
        """Copy the values into their homes, and keep these."""
        copy_into(list(homes.values()), [values[source] for source in homes])
        self.tensors.update(homes)

    def _home(self, source: Tensor) -> Tensor:
        average = self.tensors.get(source)
        if average is not None and average.device == (self._device or source.device):
            return average
        return new_average(source, self._dtype, self._device)
