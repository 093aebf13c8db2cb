"""Where tensors that hold averages are kept: made once, and written into ever after."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from averaging_optim._averages.caches import caches_invalidated
from averaging_optim._averages.moving import (
    Present,
    TensorGroups,
    average_dtype,
    copy_into,
    detached_copy,
    exchanged,
    group_by_dtype_and_device,
    has_memory_of_its_own,
    is_finite,
    move_toward,
    new_average,
    overlapping,
    overwritten_until_exit,
    put_sum,
    restored_if_moved,
    same_dtype_and_device,
    stay_finite,
    storages,
)
from averaging_optim._averages.rounding import put_average_at_random
from averaging_optim._averages.sharding import sharding_of


class TensorStore:
    """Weight or buffer → the tensor that holds its average, or a snapshot of it.

    changes: how often a tensor has been made, replaced or dropped.

    Args:
        dtype: of the tensors; None takes that of each source, at least float32.
        device: of the tensors; None takes that of each source.
    """

    def __init__(self, dtype: torch.dtype | None, device: torch.device | None) -> None:
        self.tensors: dict[Tensor, Tensor] = {}
        self.changes = 0
        self._dtype = dtype
        self._device = device
        self._held: dict[Tensor, Tensor] = {}

    def start(self, sources: Iterable[Tensor]) -> None:
        """Start a tensor at the present values of each source."""
        self._keep({each: self.copy_of(each) for each in sources})

    def copy_of(self, source: Tensor) -> Tensor:
        """Return a copy of a tensor in the dtype and on the device of an average of it."""
        return new_average(source, self._dtype, self._device)

    def drop(self, sources: Iterable[Tensor]) -> None:
        """Keep no tensors of these sources; no effect where there is none."""
        for source in sources:
            self.tensors.pop(source, None)
            self.changes += 1

    def rekey(self, moved: Mapping[Tensor, Sequence[Tensor]]) -> None:
        """Let what is kept of former tensors be of those in their places; drop it if none is."""
        kept = {former: self.tensors.pop(former) for former in moved if former in self.tensors}
        for former, average in kept.items():
            for i, present in enumerate(moved[former]):
                self.tensors[present] = average if i == 0 else detached_copy(average)
        self.changes += 1

    def put(self, source: Tensor, value: Tensor, stores: Iterable[TensorStore]) -> None:
        """Keep a value, of any shape: in the present tensor if it fits, else the value itself.

        It is copied if its dtype or device is another, or if it shares memory with what any
        of the stores keeps, or with what that is of.
        """
        if (kept := self._kept_in_place(source, value.shape)) is not None:
            copy_into([kept], [value])
            return
        dtype, device = average_dtype(source, self._dtype), self._place(source)
        is_fit = value.dtype == dtype and value.device == device and has_memory_of_its_own(value)
        if not is_fit or _is_shared(value, source, stores):
            value = new_average(value, dtype, device)
        self._keep({source: value.detach() if value.requires_grad else value})

    def stays_finite(self, sources: Sequence[Tensor]) -> bool:
        """Return whether an update toward the sources' present values keeps averages finite."""
        return stay_finite([self.tensors[source] for source in sources], sources)

    def restart_nonfinite(self, sources: Iterable[Tensor]) -> None:
        """Copy the present values of those sources of which no finite one is kept."""
        self.copy_from([each for each in sources if not is_finite(self.tensors[each])])

    def copy_from(self, sources: Sequence[Tensor]) -> None:
        """Copy the sources' present values."""
        copy_into([self.tensors[source] for source in sources], sources)

    def copy_to(self, sources: Sequence[Tensor]) -> None:
        """Let the sources have the values kept of them. Inverse of `copy_from`."""
        copy_into(sources, [self.tensors[source] for source in sources])

    def move_toward_other(
        self, other: TensorStore, sources: Sequence[Tensor], share: float
    ) -> None:
        """average ← average + share · (other − average), for these sources."""
        others = [other.tensors[source] for source in sources]
        kept = [self.tensors[source] for source in sources]
        if share > 0:
            move_toward(group_by_dtype_and_device(others, kept), [share])

    def average_at_random(
        self,
        sources: Sequence[Tensor],
        others: Sequence[Sequence[Tensor]],
        shares: Sequence[float],
        seed: int,
    ) -> None:
        """Let what is kept of these sources be the average of others, see `rounding`."""
        kept = [self.tensors[source] for source in sources]
        put_average_at_random(group_by_dtype_and_device(kept, *others), shares, seed)

    @contextmanager
    def in_place_of(
        self,
        weights: Iterable[Tensor],
        buffers: Iterable[Tensor],
        present: Present,
        *,
        exchanging: bool,
    ) -> Iterator[None]:
        """Let weights and buffers have the values of their averages until the block is left.

        Args:
            present: tensors → those that are in the places of each on leaving.
            exchanging: let weights and averages change places where they are alike and share
                no memory, rather than back the weights up.
        """
        sources = [source for source in (*weights, *buffers) if source in self.tensors]
        # Averages of buffers stay: update_bn in the block must not reach them.
        alike = self._alike(weights, apart_from=sources) if exchanging else []
        # The memory that holds the averages meanwhile: `Module.to` would give a weight another.
        held = {weight: weight.detach() for weight in alike}
        others = [source for source in sources if source not in held]
        kept = [self.tensors[other] for other in others]
        with (
            overwritten_until_exit(others, kept, lambda: copy_into(others, kept), present),
            restored_if_moved(alike, list(held.values()), present),
            exchanged(list(held.values()), [self.tensors[weight] for weight in alike]),
            caches_invalidated(sources),
        ):
            self._held = held
            try:
                yield
            finally:
                self._held = {}

    def read(self, source: Tensor) -> Tensor:
        """Return what is kept of a source, a copy if the source's memory now holds it."""
        return detached_copy(self._held[source]) if source in self._held else self.tensors[source]

    def load_targets(self, sources: Iterable[Tensor]) -> dict[Tensor, Tensor]:
        """Return the tensors to load values into: the present ones where they can serve."""
        return {source: self._load_target(source) for source in sources}

    def load(self, targets: Mapping[Tensor, Tensor], values: Mapping[Tensor, Tensor]) -> None:
        """Copy the values into their targets, and keep these."""
        copy_into(list(targets.values()), [values[source] for source in targets])
        self._keep(targets)

    def _keep(self, tensors: Mapping[Tensor, Tensor]) -> None:
        self.tensors.update(tensors)
        self.changes += len(tensors)

    def _load_target(self, source: Tensor) -> Tensor:
        kept = self._kept_in_place(source, source.shape)
        return self.copy_of(source) if kept is None else kept

    def _alike(self, weights: Iterable[Tensor], *, apart_from: Sequence[Tensor]) -> list[Tensor]:
        """Return the weights that can change places with their averages."""
        # The second exchange of what two weights share would take an average for a weight.
        shared = overlapping(apart_from)
        return [
            weight
            for weight in weights
            if weight not in shared
            and weight in self.tensors
            and same_dtype_and_device(weight, self.tensors[weight])
        ]

    def _kept_in_place(self, source: Tensor, shape: torch.Size) -> Tensor | None:
        """Return the present tensor of a source if it has this shape, and is where it should be."""
        kept = self.tensors.get(source)
        is_fit = kept is not None and kept.shape == shape and kept.device == self._place(source)
        return kept if is_fit else None

    def _place(self, source: Tensor) -> torch.device:
        return self._device or source.device


class GroupedTensors:
    """The tensors of an update as kernels want them, until one of them is another.

    To group a thousand small tensors takes longer than to average them. A copy is empty.
    """

    def __init__(self) -> None:
        self._sources: Sequence[Tensor] = ()
        self._of: tuple[object, ...] = ()
        self._groups: TensorGroups = []

    def __reduce__(self) -> tuple[type[GroupedTensors], tuple[()]]:
        return GroupedTensors, ()

    def groups(self, sources: Sequence[Tensor], stores: Sequence[TensorStore]) -> TensorGroups:
        """Return the sources, and what these stores keep of them.

        Args:
            sources: which the stores all have; another list if one of them is another.
        """
        changes = [(store, store.changes) for store in stores]
        # `Module.to` and `tensor.data = ...` change these two.
        of = changes, [each.dtype for each in sources], [each.device for each in sources]
        if sources is not self._sources or of != self._of:
            kept = [[store.tensors[source] for source in sources] for store in stores]
            self._groups = list(group_by_dtype_and_device(sources, *kept))
            # FSDP gives a DTensor another local tensor, which does not show.
            self._of = () if any(sharding_of(each) for each in sources) else of
            self._sources = sources
        return self._groups


@contextmanager
def sums_in_place_of(
    weights: Sequence[Tensor],
    buffers: Sequence[Tensor],
    factor: float,
    parts: Sequence[tuple[float, TensorStore]],
    present: Present,
) -> Iterator[None]:
    """Let tensors be factor · themselves + the sum of other factors · averages until the exit.

    Args:
        weights, buffers: of which each of the stores has an average.
        present: tensors → those that are in the places of each on leaving.
    """
    sources = [*weights, *buffers]

    def put_sums() -> None:
        for i, source in enumerate(sources):
            terms = [(share, store.tensors[source]) for share, store in parts]
            own = [(factor, source)] if factor or not parts else []
            put_sum(source, [*own, *terms], is_buffer=i >= len(weights))

    beside = [parts[0][1].tensors[each] for each in sources] if parts else sources
    with (
        overwritten_until_exit(sources, beside, put_sums, present),
        caches_invalidated(sources),
    ):
        yield


def copy_if_aliased(
    values: Mapping[str, Mapping[Tensor, Tensor]],
    targets: Mapping[str, Mapping[Tensor, Tensor]],
    stores: Iterable[TensorStore],
) -> dict[str, dict[Tensor, Tensor]]:
    """Return the values for these targets; those in another target's memory, as copies."""
    kept = {number for store in stores for number in storages(store.tensors.values())}

    def apart(value: Tensor, target: Tensor) -> Tensor:
        is_other = value is not target and not kept.isdisjoint(storages([value]))
        return detached_copy(value) if is_other else value

    return {
        name: {source: apart(value, targets[name][source]) for source, value in each.items()}
        for name, each in values.items()
    }


def _is_shared(value: Tensor, source: Tensor, stores: Iterable[TensorStore]) -> bool:
    pairs = (pair for store in stores for pair in store.tensors.items())
    return storages([value])[0] in storages([source, *itertools.chain.from_iterable(pairs)])


def are_identical(first: Sequence[object], second: Sequence[object]) -> bool:
    """Return whether both hold the same objects, not just equal ones."""
    return len(first) == len(second) and all(map(operator.is_, first, second))
