"""Averages of buffers, as an object of its own in a distributed checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from averaging_optim._averages.averages import COUNT, Averages
from averaging_optim._checkpoints.layout import BUFFERS
from averaging_optim._checkpoints.reading import checked_count, read_buffers
from averaging_optim._checkpoints.writing import write_buffers
from averaging_optim._checks import checked_mapping


class AveragedBuffers:
    """What `AveragingOptimizer.averaged_buffers` returns: a `Stateful`, as torch calls it."""

    def __init__(self, averages: Averages) -> None:
        self._averages = averages

    def state_dict(self) -> dict[str, Any]:
        """Return the averages of buffers, and the updates that they stand for."""
        self._averages.make()
        counts = {each.n_averaged.key: each.n_averaged.value for each in self._averages.each}
        return {**counts, BUFFERS: write_buffers(self._averages.buffers, self._averages.stores)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load averages of buffers. Inverse of `state_dict`.

        Raises:
            ValueError: an entry doesn't match. Nothing has changed.
            RuntimeError: inside `swap_to_averaged`.
        """
        averages = self._averages
        with averages.writing("averaged_buffers.load_state_dict"):
            averages.look_up()
            saved = checked_mapping(BUFFERS, checked_mapping("state_dict", state_dict).get(BUFFERS))
            counts = {
                name: checked_count(COUNT + name, state_dict.get(COUNT + name)) for name in averages
            }
            values = {
                key: read_buffers(f"{BUFFERS}[{key!r}]", saved.get(key), averages.buffers)
                for key in averages.stores
            }
            for key, store in averages.stores.items():
                store.load(store.load_targets(values[key]), values[key])
            averages.note_buffers(counts)
