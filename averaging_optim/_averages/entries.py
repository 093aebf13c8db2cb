"""Averages as entries of `optimizer.state`, and what a value must be to stand for one."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import torch
from torch import Tensor

from averaging_optim._averages.moving import copy_into, numeric_kind, same_dtype_and_device
from averaging_optim._averages.sharding import local_parts, sharding_of
from averaging_optim._averages.store import TensorStore
from averaging_optim._averages.swap import SwapState
from averaging_optim._checks import short_repr

AVERAGE = "averaged_"


class Entries:
    """Parameter → key → average, as `optimizer.state` shows and takes them.

    stores: key in an entry → where that average or snapshot of each parameter is kept.
    changes: how often an average has been written or dropped here.

    Args:
        stores: key after "averaged_" → store.
        hidden: what may have an average and is no parameter.
        swap: inside of which no average may be written.
    """

    def __init__(
        self, stores: Mapping[str, TensorStore], hidden: Container[Tensor], swap: SwapState
    ) -> None:
        self.stores = {AVERAGE + key: store for key, store in stores.items()}
        self.changes = 0
        self._swap = swap
        self._hidden = hidden

    def parameters(self) -> list[Tensor]:
        """Return the parameters that there are averages of."""
        kept = dict.fromkeys(each for store in self.stores.values() for each in store.tensors)
        return [source for source in kept if source not in self._hidden]

    def has(self, parameter: Tensor) -> bool:
        return parameter not in self._hidden and any(
            parameter in store.tensors for store in self.stores.values()
        )

    def of(self, parameter: Any) -> dict[str, Tensor]:
        """Return key → average, for one parameter."""
        stores = self.stores.items() if isinstance(parameter, Tensor) else ()
        return {key: each.read(parameter) for key, each in stores if parameter in each.tensors}

    def keys(self, parameter: Tensor) -> list[str]:
        """Return the keys of the averages of a parameter, none of which is read."""
        return [key for key, store in self.stores.items() if parameter in store.tensors]

    def are_in(self, entry: object) -> bool:
        """Return whether a dict holds averages."""
        return isinstance(entry, dict) and not self.stores.keys().isdisjoint(entry)

    def check(self, parameter: Tensor, entry: Mapping[str, Any]) -> None:
        """Raise unless what the entry holds of averages can be that of this parameter.

        Shapes may differ: an entry is grown before it is put under another parameter.
        """
        for key in entry:
            if key in self.stores:
                checked_value(f"state[...][{key!r}]", entry[key], parameter)

    def write(self, parameter: Tensor, averages: Mapping[str, Tensor]) -> None:
        """Keep these averages of a parameter, or raise and keep none."""
        changed = {
            key: each
            for key, each in averages.items()
            if each is not self.stores[key].tensors.get(parameter)
        }
        if changed:
            self._swap.refuse(f"state[...][{next(iter(changed))!r}] = ...")
            self.check(parameter, changed)
            self.changes += 1
            for key, each in changed.items():
                self.stores[key].put(parameter, each, self.stores.values())

    def drop(self, parameter: Tensor, key: str) -> None:
        self._swap.refuse(f"del state[...][{key!r}]")
        self.changes += 1
        self.stores[key].drop([parameter])


def check_average(entry: str, value: object, tensor: Tensor) -> None:
    """Raise a ValueError unless the value is a tensor that can stand for `tensor`."""
    average = checked_value(entry, value, tensor)
    if average.shape != tensor.shape:
        raise ValueError(
            f"`{entry}` must have the shape {tuple(tensor.shape)}, got {tuple(average.shape)}."
        )
    if sharding_of(average) != sharding_of(tensor):
        raise ValueError(
            f"`{entry}` must be sharded like its parameter, {sharding_of(tensor)}, got "
            f"{sharding_of(average)}. Use torch.distributed.tensor.distribute_tensor."
        )


def checked_value(entry: str, average: object, tensor: Tensor) -> Tensor:
    """Return the value, a tensor of any shape whose numbers an average can take over."""
    if not isinstance(average, Tensor):
        raise ValueError(f"`{entry}` must be a tensor, got {short_repr(average)}.")
    if numeric_kind(average) != numeric_kind(tensor):
        raise ValueError(f"`{entry}` must be {numeric_kind(tensor)}, got {average.dtype}.")
    _check_copying(entry, average, tensor)
    return average


def _check_copying(entry: str, average: Tensor, tensor: Tensor) -> None:
    """Raise unless torch copies one number of the average to where the tensor is."""
    try:
        here, there = local_parts([average, tensor])
        is_plain = here.layout == torch.strided and not here.is_nested
        if is_plain and same_dtype_and_device(here, there):
            return
        first = here[(slice(1),) * here.dim()]
        with torch.no_grad():
            copy_into([there.new_empty(first.shape)], [first])
    except RuntimeError as error:
        raise ValueError(
            f"`{entry}` must be a tensor that torch can copy from, got {average.layout} of "
            f"{average.dtype} on {average.device}."
        ) from error


def without_attributes(average: Any) -> Any:
    """Return a tensor without attributes, by which a file can hide its methods."""
    return Tensor.detach(average) if isinstance(average, Tensor) and vars(average) else average
