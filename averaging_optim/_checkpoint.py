"""Averages in a state dict. What does not fit is refused, and nothing given is changed."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from averaging_optim._average import Average
from averaging_optim._rules import Rule
from averaging_optim._tensors import copy_into, kind_of, layout_of

STEPS = "averaging_steps"
SKIPPED = "n_skipped"
COUNT = "n_averaged_"
AVERAGE = "averaged_"
BUFFERS = "averaged_buffers"

# Rules compute with floats, which have no room for every integer.
_COUNT_LIMIT = 2**63


@dataclass(frozen=True)
class Checkpoint:
    """What a state dict holds.

    wrapped: the state dict of the wrapped optimizer.
    counters: key in a parameter group → count.
    averages: name of an average or snapshot → parameter or buffer → its value, for each
        rule of which the state dict has any.
    missing: what it has no entry for and ought to, in words.
    """

    wrapped: dict[str, Any]
    counters: dict[str, int]
    averages: dict[str, dict[Tensor, Tensor]]
    missing: list[str]


def kept_by(rules: Mapping[str, Rule]) -> dict[str, list[str]]:
    """Return name of a rule → names under which its average and then its snapshots are kept.

    Raises:
        ValueError: two of these names are the same.
    """
    kept = {
        name: [name, *(f"{name}_{i}" for i in range(1, rule.snapshots + 1))]
        for name, rule in rules.items()
    }
    for name, keys in kept.items():
        for key in keys[1:]:
            if key in rules:
                raise ValueError(f"`rule` must name no average {key!r}, a snapshot of {name!r}.")
    return kept


def write_checkpoint(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    buffers: Sequence[Tensor],
    averages: Mapping[str, Average],
) -> dict[str, Any]:
    """Return the wrapped optimizer's state dict with the averages in their places."""
    state = dict(state_dict["state"])
    for index, weight in _averaged_weights(state_dict["param_groups"], groups).items():
        kept = {
            AVERAGE + name: average.read(weight)
            for name, average in averages.items()
            if weight in average.tensors
        }
        if kept:
            state[index] = {**state.get(index, {}), **kept}
    written = {**state_dict, "state": state}
    made = {name: average for name, average in averages.items() if average.tensors}
    if buffers and made:
        written[BUFFERS] = {
            name: [average.read(each) for each in buffers] for name, average in made.items()
        }
    return written


def read_checkpoint(
    state_dict: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    buffers: Sequence[Tensor],
    kept: Mapping[str, Sequence[str]],
) -> Checkpoint:
    """Take apart a state dict for an optimizer with these groups, buffers and rules.

    Args:
        kept: see `kept_by`.

    Raises:
        ValueError: an entry does not fit; the message names it.
    """
    state_dict = _mapping("state_dict", state_dict)
    saved_groups = _matching_groups(state_dict.get("param_groups"), groups)
    state = _mapping("state", state_dict.get("state"))
    _check_indices(state, saved_groups, groups)
    saved_buffers = _mapping(BUFFERS, state_dict.get(BUFFERS, {}))
    weights = _averaged_weights(saved_groups, groups)
    _refuse_unknown(state, saved_groups, saved_buffers, weights, kept)

    averages = {
        key: _weight_averages(AVERAGE + key, state, weights)
        for keys in kept.values()
        if _has_any(keys, state, weights)
        for key in keys
    }
    steps = _counter(saved_groups, STEPS, required=any(averages.values()))
    skipped = _counter(saved_groups, SKIPPED, required=False)
    counts = {
        name: _counter(saved_groups, COUNT + name, required=bool(averages.get(name)))
        for name in kept
    }
    missing = [repr(name) for name in kept if name not in averages and counts[name] != 0]
    for name in [name for name in kept if name in averages]:
        is_lost = bool(buffers) and not any(key in saved_buffers for key in kept[name])
        missing += [f"the buffers of {name!r}"] if is_lost else []
        for key in kept[name]:
            saved = list(buffers) if is_lost else saved_buffers.get(key, [])
            averages[key].update(_buffer_averages(key, saved, buffers))

    counters = {COUNT + name: counts[name] if name in averages else 0 for name in kept}
    goes_on = bool(averages) or not missing
    counters |= {STEPS: steps if goes_on else 0, SKIPPED: skipped if goes_on else 0}
    return Checkpoint(
        wrapped=_without_averages(state_dict, state, saved_groups),
        counters={key: count or 0 for key, count in counters.items()},
        averages=averages,
        missing=missing,
    )


def load_or_keep(optimizer: Optimizer, state_dict: dict[str, Any]) -> None:
    """Load the state dict of a plain optimizer, which keeps what it has if it refuses.

    Raises:
        ValueError: it refuses.
    """
    # torch has put both in their places before an optimizer's __setstate__ looks at them.
    state, groups = optimizer.state, optimizer.param_groups
    try:
        optimizer.load_state_dict(state_dict)
    except BaseException as error:
        optimizer.state, optimizer.param_groups = state, groups
        if isinstance(error, Exception):
            name = type(optimizer).__name__
            raise ValueError(
                f"`state_dict` must be one that {name} loads, got {_shown(error)}."
            ) from error
        raise


def _matching_groups(saved_groups: Any, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the saved groups, with the present `average` where they do not say."""
    if not isinstance(saved_groups, list) or len(saved_groups) != len(groups):
        raise ValueError(f"`param_groups` must be a list of {len(groups)} groups.")
    matching = []
    for i, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        entry, size = f"param_groups[{i}]", len(group["params"])
        saved_parameters = _mapping(entry, saved).get("params")
        if not isinstance(saved_parameters, list) or len(saved_parameters) != size:
            raise ValueError(f"`{entry}['params']` must be a list of {size} parameters.")
        average = saved.get("average", group.get("average", True))
        if not isinstance(average, bool):
            raise ValueError(f"`{entry}['average']` must be True or False, got {_shown(average)}.")
        matching.append(saved if average else {**saved, "average": False})
    return matching


def _mapping(entry: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"`{entry}` must be a dict, got {_shown(value)}.")
    return value


def _shown(value: object) -> str:
    """Return a value as an error shows it: cut short, and its type if it has no repr."""
    try:
        text = repr(value)
    except Exception:  # such as that of an int of more than 4300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:200]}…"


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
                raise ValueError(f"`{entry}` must hold hashable indices, got {_shown(index)}.")
            if parameters.setdefault(index, parameter) is not parameter:
                raise ValueError(f"`{entry}` must hold each index once, got {_shown(index)} again.")
            _mapping(f"state[{_shown(index)}]", state.get(index, {}))
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


def _averaged_weights(
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
    kept: Mapping[str, Sequence[str]],
) -> None:
    names = {name for names in kept.values() for name in names}
    averages = {AVERAGE + name for name in names}
    for index, entry in state.items():
        for key in filter(_is_average, entry if isinstance(entry, Mapping) else ()):
            if index not in weights or key not in averages:
                raise ValueError(
                    f"`state[{_shown(index)}][{_shown(key)}]` is the average of nothing here."
                )
    for i, group in enumerate(saved_groups):
        for key in group:
            if _is_count(key) and key.removeprefix(COUNT) not in kept:
                raise ValueError(f"`param_groups[{i}][{_shown(key)}]` counts for no rule here.")
    for name in saved_buffers:
        if name not in names:
            raise ValueError(f"`{BUFFERS}[{_shown(name)}]` belongs to no rule here.")


def _is_average(key: object) -> bool:
    return isinstance(key, str) and key.startswith(AVERAGE)


def _is_count(key: object) -> bool:
    return isinstance(key, str) and key.startswith(COUNT)


def _counter(saved_groups: Sequence[Mapping[str, Any]], key: str, required: bool) -> int | None:
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
        raise ValueError(f"`{entry}` must be a non-negative int, got {_shown(count)}.")
    if count >= _COUNT_LIMIT:
        raise ValueError(f"`{entry}` must be less than 2**63, got {_shown(count)}.")
    return count


def _has_any(keys: Iterable[str], state: Mapping[Any, Any], weights: Collection[Any]) -> bool:
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
        averages[weight] = _plain(state.get(index, {}).get(key, default))
        check_average(f"state[{_shown(index)}][{key!r}]", averages[weight], weight)
    return averages


def _buffer_averages(key: str, saved: Any, buffers: Sequence[Tensor]) -> dict[Tensor, Tensor]:
    """Return buffer → its average in a saved list."""
    entry = f"{BUFFERS}[{key!r}]"
    if not isinstance(saved, list) or len(saved) != len(buffers):
        raise ValueError(f"`{entry}` must be a list of {len(buffers)} tensors.")
    averages = {buffer: _plain(average) for buffer, average in zip(buffers, saved, strict=True)}
    for i, (buffer, average) in enumerate(averages.items()):
        check_average(f"{entry}[{i}]", average, buffer)
    return averages


def _plain(average: Any) -> Any:
    """Return a tensor without attributes, by which a file can hide its methods."""
    return Tensor.detach(average) if isinstance(average, Tensor) and vars(average) else average


def read_exported(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    weights: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> dict[Tensor, Tensor]:
    """Return weight or buffer → its value in a state dict of the model.

    Raises:
        ValueError: an entry does not fit, or the model has not all of the weights.
    """
    present = model.state_dict(keep_vars=True)
    for key in _mapping("state_dict", state_dict):
        if key not in present:
            raise ValueError(f"`state_dict[{_shown(key)}]` must be an entry of the model's.")
    # A tied parameter has several keys; those that were exported come last and stay.
    keys = {
        tensor: key
        for key, tensor in sorted(present.items(), key=lambda item: item[0] in state_dict)
        if isinstance(tensor, Tensor)
    }
    for weight in weights:
        if weight not in keys:
            raise ValueError(
                "`model` must have all parameters that are averaged, lacks one of shape "
                f"{tuple(weight.shape)}."
            )
    # Buffers that the model does not persist are in no export of it.
    wanted = [*weights, *(buffer for buffer in buffers if buffer in keys)]
    exported = {tensor: _plain(state_dict.get(keys[tensor])) for tensor in wanted}
    for tensor, value in exported.items():
        check_average(f"state_dict[{keys[tensor]!r}]", value, tensor)
    return exported


def check_average(entry: str, average: object, tensor: Tensor) -> None:
    """Raise a ValueError unless the average is a tensor that can stand for `tensor`."""
    if not isinstance(average, Tensor):
        raise ValueError(f"`{entry}` must be a tensor, got {_shown(average)}.")
    if kind_of(average) != kind_of(tensor):
        raise ValueError(f"`{entry}` must be {kind_of(tensor)}, got {average.dtype}.")
    _check_copying(entry, average, tensor)
    if average.shape != tensor.shape:
        raise ValueError(
            f"`{entry}` must have the shape {tuple(tensor.shape)}, got {tuple(average.shape)}."
        )
    if layout_of(average) != layout_of(tensor):
        raise ValueError(
            f"`{entry}` must be spread over devices as its weight is, {layout_of(tensor)}, "
            f"got {layout_of(average)}. See torch.distributed.tensor.distribute_tensor."
        )


def _check_copying(entry: str, average: Tensor, tensor: Tensor) -> None:
    """Raise unless torch copies one number of the average to where the tensor is."""
    try:
        local = average.to_local() if hasattr(average, "to_local") else average
        first = local[(slice(1),) * local.dim()]
        copy_into([torch.empty(first.shape, dtype=tensor.dtype, device=tensor.device)], [first])
    except RuntimeError as error:
        raise ValueError(
            f"`{entry}` must be a tensor that torch can copy from, got {average.layout} of "
            f"{average.dtype} on {average.device}."
        ) from error


def _without_averages(
    state_dict: Mapping[str, Any],
    state: Mapping[Any, Any],
    saved_groups: list[Any],
) -> dict[str, Any]:
    """Return the state dict of the wrapped optimizer; the one given stays as it is."""
    others = {key: value for key, value in state_dict.items() if key != BUFFERS}
    return {**others, "param_groups": saved_groups, "state": dict(_entries_without(state))}


def _entries_without(state: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    for index, entry in state.items():
        if not isinstance(entry, Mapping):
            yield index, entry
            continue
        # A copy always: some optimizers write into entries that belong to no parameter.
        rest = {key: value for key, value in entry.items() if not _is_average(key)}
        # An entry of averages alone is left out: optimizers take an entry for initialised.
        if rest or not entry:
            yield index, rest
