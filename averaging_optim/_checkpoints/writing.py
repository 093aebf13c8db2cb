"""State dicts written: averages in their places among what the wrapped optimizer saves."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from averaging_optim._averages.averages import SKIPPED, STEPS, is_count
from averaging_optim._averages.entries import AVERAGE
from averaging_optim._averages.sources import Buffers, Sources
from averaging_optim._averages.store import TensorStore
from averaging_optim._checkpoints.exports import plain_keys
from averaging_optim._checkpoints.layout import (
    BESIDE,
    BUFFERS,
    PARAMETERS,
    parameters_by_index,
)

_GROUP_KEYS = frozenset({STEPS, SKIPPED, "average"})


def write_checkpoint(
    state_dict: Mapping[str, Any],
    sources: Sources,
    stores: Mapping[str, TensorStore],
    *,
    is_stateless: bool,
) -> dict[str, Any]:
    """Return the wrapped optimizer's state dict with the averages in their places.

    If it is not in torch's format, it is left as it is, with one of averages beside it.

    Args:
        is_stateless: whether the wrapped optimizer keeps no state of any parameter.
    """
    if not _is_torchs(state_dict, sources.groups):
        packed = {"state": {}, "param_groups": _packed(sources.groups)}
        beside = write_checkpoint(packed, sources, stores, is_stateless=True)
        return {**state_dict, BESIDE: beside}
    written = {**state_dict, "state": dict(state_dict["state"])}
    groups = state_dict["param_groups"]
    is_begun = any(store.tensors for store in stores.values())
    for index, weight in parameters_by_index(groups, sources.groups).items():
        kept = {
            AVERAGE + key: store.read(weight)
            for key, store in stores.items()
            if weight in store.tensors
        }
        if kept and (is_stateless or index in written["state"]):
            written["state"][index] = {**written["state"].get(index, {}), **kept}
        elif kept or is_begun:
            written.setdefault(PARAMETERS, {})[index] = kept
    if averages := write_buffers(sources.buffers, stores):
        written[BUFFERS] = averages
    return written


def write_buffers(
    buffers: Buffers, stores: Mapping[str, TensorStore]
) -> dict[str, dict[str, Tensor] | list[Tensor]]:
    """Return key of a store → averages of buffers: by name, or in the order they were given."""
    written: dict[str, dict[str, Tensor] | list[Tensor]] = {}
    for key, store in stores.items():
        if buffers.saved and store.tensors:
            kept = {name: store.read(buffer) for name, buffer in buffers.saved.items()}
            written[key] = plain_keys(buffers.module, kept) if buffers.module else [*kept.values()]
    return written


def _is_torchs(state_dict: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> bool:
    """Return whether a state dict has an index for each parameter of these groups."""
    saved = state_dict.get("param_groups")
    if not isinstance(state_dict.get("state"), Mapping) or not isinstance(saved, list):
        return False
    sizes = [len(each["params"]) if isinstance(each, Mapping) else -1 for each in saved]
    return sizes == [len(group["params"]) for group in groups]


def _packed(groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return groups as torch saves them, with nothing but what concerns averages."""
    packed, numbers = [], itertools.count()
    for group in groups:
        ours = {key: group[key] for key in group if is_count(key) or key in _GROUP_KEYS}
        packed.append({**ours, "params": [next(numbers) for _ in group["params"]]})
    return packed
