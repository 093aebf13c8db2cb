"""Averages in a state dict. What does not fit is refused, and nothing given is changed."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from averaging_optim._averages.averages import COUNT, SKIPPED, STEPS
from averaging_optim._averages.entries import AVERAGE, check_average, without_attributes
from averaging_optim._averages.store import TensorStore
from averaging_optim._checks import checked_mapping, short_repr

BUFFERS = "averaged_buffers"

# Where averages are if the wrapped optimizer's state dict is not in torch's format.
BESIDE = "averaging_optim"

_GROUP_KEYS = frozenset({STEPS, SKIPPED, "average"})

# Rules compute with floats, which have no room for every integer.
_COUNT_LIMIT = 2**63


@dataclass(frozen=True)
class Checkpoint:
    """What a state dict holds.

    wrapped: the state dict of the wrapped optimizer.
    counters: key in a parameter group → count.
    averages: key of a store → parameter or buffer → its value, for each rule of which the
        state dict has any.
    missing: what it has no entry for and ought to, in words.
    """

    wrapped: dict[str, Any]
    counters: dict[str, int]
    averages: dict[str, dict[Tensor, Tensor]]
    missing: list[str]


def write_checkpoint(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    buffers: Sequence[Tensor],
    stores: Mapping[str, TensorStore],
) -> dict[str, Any]:
    """Return the wrapped optimizer's state dict with the averages in their places.

    If it is not in torch's format, it is left as it is, with one of averages beside it.
    """
    if not _is_torchs(state_dict, groups):
        packed = {"state": {}, "param_groups": _packed(groups)}
        return {**state_dict, BESIDE: write_checkpoint(packed, groups, buffers, stores)}
    state = dict(state_dict["state"])
    for index, weight in _weights_by_index(state_dict["param_groups"], groups).items():
        kept = {
            AVERAGE + key: store.read(weight)
            for key, store in stores.items()
            if weight in store.tensors
        }
        if kept:
            state[index] = {**state.get(index, {}), **kept}
    written = {**state_dict, "state": state}
    made = {key: store for key, store in stores.items() if store.tensors}
    if buffers and made:
        written[BUFFERS] = {
            key: [store.read(buffer) for buffer in buffers] for key, store in made.items()
        }
    return written


def read_checkpoint(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    buffers: Sequence[Tensor],
    keys: Mapping[str, Collection[str]],
) -> Checkpoint:
    """Take apart a state dict for an optimizer with these groups, buffers and rules.

    Args:
        keys: name of a rule → keys of its stores.

    Raises:
        ValueError: an entry does not fit; the message names it.
    """
    state_dict = checked_mapping("state_dict", state_dict)
    if BESIDE in state_dict:
        others = {key: value for key, value in state_dict.items() if key != BESIDE}
        return replace(read_checkpoint(state_dict[BESIDE], groups, buffers, keys), wrapped=others)
    saved_groups = _matching_groups(state_dict.get("param_groups"), groups)
    state = checked_mapping("state", state_dict.get("state"))
    _check_indices(state, saved_groups, groups)
    saved_buffers = checked_mapping(BUFFERS, state_dict.get(BUFFERS, {}))
    weights = _weights_by_index(saved_groups, groups)
    _refuse_unknown(state, saved_groups, saved_buffers, weights, keys)

    averages = {
        key: _weight_averages(AVERAGE + key, state, weights)
        for rule_keys in keys.values()
        if _holds_average(rule_keys, state, weights)
        for key in rule_keys
    }
    steps = _checked_count(saved_groups, STEPS, required=any(averages.values()))
    skipped = _checked_count(saved_groups, SKIPPED, required=False)
    counts = {
        name: _checked_count(saved_groups, COUNT + name, required=bool(averages.get(name)))
        for name in keys
    }
    missing = [repr(name) for name in keys if name not in averages and counts[name] != 0]
    for name in [name for name in keys if name in averages]:
        is_lost = bool(buffers) and not any(key in saved_buffers for key in keys[name])
        missing += [f"the buffers of {name!r}"] if is_lost else []
        for key in keys[name]:
            saved = list(buffers) if is_lost else saved_buffers.get(key, [])
            averages[key].update(_buffer_averages(key, saved, buffers))

    counters = {COUNT + name: counts[name] if name in averages else 0 for name in keys}
    goes_on = bool(averages) or not missing
    counters |= {STEPS: steps if goes_on else 0, SKIPPED: skipped if goes_on else 0}
    ours = {AVERAGE + key for rule_keys in keys.values() for key in rule_keys}
    return Checkpoint(
        wrapped=_without_averages(state_dict, state, saved_groups, ours),
        counters={key: count or 0 for key, count in counters.items()},
        averages=averages,
        missing=missing,
    )


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
        ours = {key: group[key] for key in group if _is_count(key) or key in _GROUP_KEYS}
        packed.append({**ours, "params": [next(numbers) for _ in group["params"]]})
    return packed


def load_or_roll_back(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load the state dict of a plain optimizer, which keeps what it has if it refuses.

    Raises:
        ValueError: it refuses.
    """
    # torch has put both in their places before an optimizer's __setstate__ looks at them.
    parts = {key: part for key, part in vars(optimizer).items() if key in ("state", "param_groups")}
    try:
        optimizer.load_state_dict(state_dict)
    except BaseException as error:
        optimizer.__dict__.update(parts)
        if isinstance(error, Exception):
            name = type(optimizer).__name__
            raise ValueError(
                f"`state_dict` must be one that {name} loads, got {short_repr(error)}."
            ) from error
        raise


def _matching_groups(saved_groups: Any, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the saved groups, with the present `average` where they do not say."""
    if not isinstance(saved_groups, list) or len(saved_groups) != len(groups):
        raise ValueError(f"`param_groups` must be a list of {len(groups)} groups.")
    matching = []
    for i, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        entry, size = f"param_groups[{i}]", len(group["params"])
        saved_parameters = checked_mapping(entry, saved).get("params")
        if not isinstance(saved_parameters, list) or len(saved_parameters) != size:
            raise ValueError(f"`{entry}['params']` must be a list of {size} parameters.")
        average = saved.get("average", group.get("average", True))
        if not isinstance(average, bool):
            raise ValueError(
                f"`{entry}['average']` must be True or False, got {short_repr(average)}."
            )
        matching.append(saved if average else {**saved, "average": False})
    return matching


def _check_indices(
    state: Mapping[Any, Any],
    saved_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Raise unless each index stands for one parameter, whose entry, if any, is a dict."""
    parameters: dict[Any, Tensor] = {}
    for i, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        entry = f"param_groups[{i}]['params']"
        for index, parameter in zip(saved["params"], group["params"], strict=True):
            if not _is_hashable(index):
                raise ValueError(f"`{entry}` must hold hashable indices, got {short_repr(index)}.")
            if parameters.setdefault(index, parameter) is not parameter:
                raise ValueError(
                    f"`{entry}` must hold each index once, got {short_repr(index)} again."
                )
            checked_mapping(f"state[{short_repr(index)}]", state.get(index, {}))
    # torch keeps the entries of other indices, and counts parameters from 0 when it saves them.
    for index in range(len(parameters)):
        if index in state and index not in parameters:
            raise ValueError(f"`state[{index}]` must belong to a parameter of `param_groups`.")


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:  # isinstance(value, Hashable) is True of a tuple of lists
        return False
    return True


def _weights_by_index(
    saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> dict[Any, Tensor]:
    """Return index in the state dict → parameter, for the groups that are averaged."""
    return {
        index: parameter
        for saved, group in zip(saved_groups, groups, strict=True)
        if saved.get("average", True)
        for index, parameter in zip(saved["params"], group["params"], strict=True)
    }


def _refuse_unknown(
    state: Mapping[Any, Any],
    saved_groups: Sequence[Mapping[str, Any]],
    saved_buffers: Mapping[str, Any],
    weights: Mapping[Any, Tensor],
    keys: Mapping[str, Collection[str]],
) -> None:
    known = {key for rule_keys in keys.values() for key in rule_keys}
    averages = {AVERAGE + key for key in known}
    counted = {COUNT + key for key in known}
    counted |= {key for group in saved_groups for key in group if _is_count(key)}
    for index, saved in state.items():
        for key in saved if isinstance(saved, Mapping) else ():
            # Other keys of this form are the wrapped optimizer's own, of which nothing is counted.
            is_average = _is_average(key) and COUNT + _rule_of(key) in counted
            if (is_average or key in averages) and (index not in weights or key not in averages):
                entry = f"state[{short_repr(index)}][{short_repr(key)}]"
                raise ValueError(f"`{entry}` is the average of nothing here.")
    for i, group in enumerate(saved_groups):
        for key in group:
            if _is_count(key) and key.removeprefix(COUNT) not in keys:
                raise ValueError(f"`param_groups[{i}][{short_repr(key)}]` counts for no rule here.")
    for key in saved_buffers:
        if key not in known:
            raise ValueError(f"`{BUFFERS}[{short_repr(key)}]` belongs to no rule here.")


def _is_average(key: object) -> bool:
    return isinstance(key, str) and key.startswith(AVERAGE)


def _rule_of(key: str) -> str:
    """Return the name of the rule whose average, or a snapshot of it, has this key."""
    name = key.removeprefix(AVERAGE)
    stem, _, number = name.rpartition("_")
    return stem if number.isdecimal() else name


def _is_count(key: object) -> bool:
    return isinstance(key, str) and key.startswith(COUNT)


def _checked_count(
    saved_groups: Sequence[Mapping[str, Any]], key: str, required: bool
) -> int | None:
    """Return the count all groups agree on, None if they have none."""
    if not required and not any(key in group for group in saved_groups):
        return None
    counts = [
        _count(f"param_groups[{i}][{key!r}]", group.get(key))
        for i, group in enumerate(saved_groups)
    ]
    for i, count in enumerate(counts):
        if count != counts[0]:
            raise ValueError(
                f"`param_groups[{i}][{key!r}]` must be as in the first group, {counts[0]}, "
                f"got {count}."
            )
    return counts[0]


def _count(entry: str, count: Any) -> int:
    if type(count) is not int or count < 0:
        raise ValueError(f"`{entry}` must be a non-negative int, got {short_repr(count)}.")
    if count >= _COUNT_LIMIT:
        raise ValueError(f"`{entry}` must be less than 2**63, got {short_repr(count)}.")
    return count


def _holds_average(keys: Iterable[str], state: Mapping[Any, Any], weights: Collection[Any]) -> bool:
    """Return whether a weight has an entry of one of these averages, or no weight should."""
    entries = [state.get(index, {}) for index in weights]
    return not weights or any(AVERAGE + key in entry for entry in entries for key in keys)


def _weight_averages(
    key: str, state: Mapping[Any, Any], weights: Mapping[Any, Tensor]
) -> dict[Tensor, Tensor]:
    """Return parameter → saved average."""
    averages = {}
    for index, weight in weights.items():
        # torch.distributed.checkpoint loads no state of frozen weights, which are their average.
        default = None if weight.requires_grad else weight
        averages[weight] = without_attributes(state.get(index, {}).get(key, default))
        check_average(f"state[{short_repr(index)}][{key!r}]", averages[weight], weight)
    return averages


def _buffer_averages(key: str, saved: Any, buffers: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Return buffer → its average in a saved list."""
    entry = f"{BUFFERS}[{key!r}]"
    if not isinstance(saved, list) or len(saved) != len(buffers):
        raise ValueError(f"`{entry}` must be a list of {len(buffers)} tensors.")
    averages = {
        buffer: without_attributes(average) for buffer, average in zip(buffers, saved, strict=True)
    }
    for i, (buffer, average) in enumerate(averages.items()):
        check_average(f"{entry}[{i}]", average, buffer)
    return averages


def _without_averages(
    state_dict: Mapping[str, Any],
    state: Mapping[Any, Any],
    saved_groups: list[Any],
    ours: Collection[str],
) -> dict[str, Any]:
    """Return the state dict of the wrapped optimizer; the one given stays as it is."""
    others = {key: value for key, value in state_dict.items() if key != BUFFERS}
    return {**others, "param_groups": saved_groups, "state": dict(_entries_without(state, ours))}


def _entries_without(state: Mapping[Any, Any], ours: Collection[str]) -> Iterator[tuple[Any, Any]]:
    for index, entry in state.items():
        if not isinstance(entry, Mapping):
            yield index, entry
            continue
        # A copy always: some optimizers write into entries that belong to no parameter.
        rest = {key: value for key, value in entry.items() if key not in ours}
        # An entry of averages alone is left out: optimizers take an entry for initialised.
        if rest or not entry:
            yield index, rest
