"""State dicts read: what doesn't match raises, and nothing is modified."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from averaging_optim._averages.averages import COUNT, SKIPPED, STEPS, is_count
from averaging_optim._averages.entries import AVERAGE, check_average, without_attributes
from averaging_optim._averages.sources import Buffers, Sources, is_trained
from averaging_optim._checkpoints.exports import plain_keys
from averaging_optim._checkpoints.layout import (
    BESIDE,
    BUFFERS,
    PARAMETERS,
    parameters_by_index,
)
from averaging_optim._checks import checked_mapping, short_repr

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
    without: parameters that were saved to be their own averages, and have none until they are
        trained.
    """

    wrapped: dict[str, Any]
    counters: dict[str, int]
    averages: dict[str, dict[Tensor, Tensor]]
    missing: list[str]
    without: list[Tensor]


def read_checkpoint(
    state_dict: Mapping[str, Any],
    sources: Sources,
    keys: Mapping[str, Collection[str]],
    kept_buffers: Mapping[str, int] | None = None,
) -> Checkpoint:
    """Take apart a state dict for an optimizer that averages these, by these rules.

    Args:
        keys: name of a rule → keys of its stores.
        kept_buffers: name of a rule → the count that its averages of buffers, loaded already,
            go with.

    Raises:
        ValueError: an entry doesn't match. The message names it.
    """
    state_dict = checked_mapping("state_dict", state_dict)
    if BESIDE in state_dict:
        others = {key: value for key, value in state_dict.items() if key != BESIDE}
        beside = read_checkpoint(state_dict[BESIDE], sources, keys, kept_buffers)
        return replace(beside, wrapped=others)
    saved = _taken_apart(state_dict, sources)
    _refuse_unknown(saved, keys)
    averages = {
        key: saved.weight_averages(name, key)
        for name, rule_keys in keys.items()
        if saved.holds_any(rule_keys)
        for key in rule_keys
    }
    steps = _checked_count(saved.groups, STEPS, required=any(averages.values()))
    skipped = _checked_count(saved.groups, SKIPPED, required=False)
    counts = {
        name: _checked_count(saved.groups, COUNT + name, required=bool(averages.get(name)))
        for name in keys
    }
    missing = [repr(name) for name in keys if name not in averages and counts[name] != 0]
    for name in [name for name in keys if name in averages]:
        if any(key in saved.buffers for key in keys[name]):
            for key in keys[name]:
                entry = f"{BUFFERS}[{key!r}]"
                averages[key].update(read_buffers(entry, saved.buffers.get(key), sources.buffers))
        elif (kept_buffers or {}).get(name) != counts[name]:
            if sources.buffers.saved:
                missing.append(f"the buffers of {name!r}")
            for key in keys[name]:
                averages[key].update({each: each for each in sources.buffers.by_key.values()})

    counters = {COUNT + name: counts[name] if name in averages else 0 for name in keys}
    goes_on = bool(averages) or not missing
    counters |= {STEPS: steps if goes_on else 0, SKIPPED: skipped if goes_on else 0}
    ours = {AVERAGE + key for rule_keys in keys.values() for key in rule_keys}
    return Checkpoint(
        wrapped=_without_averages(state_dict, saved, ours),
        counters={key: count or 0 for key, count in counters.items()},
        averages=averages,
        missing=missing,
        without=saved.without_average(),
    )


def read_buffers(entry: str, saved: Any, buffers: Buffers) -> dict[Tensor, Tensor]:
    """Return buffer → its average in what `write_buffers` has written, by name or in a list.

    Args:
        entry: how errors name what was saved.

    Raises:
        ValueError: a value is missing, belongs to no buffer, or does not fit.
    """
    if isinstance(saved, Mapping) and buffers.module is None:
        saved = list(saved.values())
    if isinstance(saved, list) and len(saved) == len(buffers.by_key):
        # A list of 0.1.0 has the buffers in the order of `model.buffers()`.
        saved = dict(zip(buffers.by_key, saved, strict=True))
    elif isinstance(saved, Mapping) and buffers.module:
        names = plain_keys(buffers.module, {name: name for name in buffers.by_key})
        saved = {names.get(key, key): value for key, value in saved.items()}
    if not isinstance(saved, Mapping):
        raise ValueError(
            f"`{entry}` must be a list of {len(buffers.by_key)} tensors, got {short_repr(saved)}."
        )
    for key in saved:
        if key not in buffers.by_key:
            raise ValueError(
                f"`{entry}` must contain buffers of the model only, got {short_repr(key)}."
            )
    copied = frozenset(buffers.copied)
    averages = {}
    for key, buffer in buffers.by_key.items():
        value = without_attributes(saved.get(key))
        is_saved = key in buffers.saved
        # What is copied along, or not saved, may have another length each time, as caches have.
        may_differ = buffers.module and (buffer in copied or not is_saved)
        if (value is None and not is_saved) or (may_differ and _has_another_length(value, buffer)):
            value = buffer
        check_average(f"{entry}[{key!r}]", value, buffer)
        averages[buffer] = value
    return averages


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
                f"`state_dict` must be one that {name} can load, got {short_repr(error)}."
            ) from error
        raise


def checked_count(entry: str, count: Any) -> int:
    if type(count) is not int or count < 0:
        raise ValueError(f"`{entry}` must be a non-negative int, got {short_repr(count)}.")
    if count >= _COUNT_LIMIT:
        raise ValueError(f"`{entry}` must be less than 2**63, got {short_repr(count)}.")
    return count


def _has_another_length(value: object, buffer: Tensor) -> bool:
    if not isinstance(value, Tensor) or value.dim() != buffer.dim():
        return False
    return value.shape != buffer.shape


@dataclass(frozen=True)
class _Saved:
    """A state dict in torch's format, taken apart.

    state: index → entry of the wrapped optimizer, averages included.
    apart: index → averages of parameters of which the wrapped optimizer keeps nothing.
    groups: with the present `average` where they don't say.
    buffers: key of a store → averages of buffers.
    weights: index → parameter that is averaged here.
    excluded: indices of parameters that are excluded here.
    """

    state: Mapping[Any, Any]
    apart: Mapping[Any, Any]
    groups: Sequence[Mapping[str, Any]]
    buffers: Mapping[str, Any]
    weights: dict[Any, Tensor]
    excluded: frozenset[Any]

    def holds_any(self, keys: Iterable[str]) -> bool:
        """Return whether a weight has an entry of one of these averages, or no weight should."""
        averages = {AVERAGE + key for key in keys}
        return all(map(self._was_frozen, self.weights)) or any(
            averages & self._entry(index).keys() for index in self.weights
        )

    def weight_averages(self, name: str, key: str) -> dict[Tensor, Tensor]:
        """Return parameter → saved average, of all that were not frozen then."""
        averages = {}
        for index, weight in self.weights.items():
            if self._was_frozen(index):
                self._check_has_none(index, AVERAGE + key)
                continue
            entry = self._entry(index)
            value = without_attributes(entry.get(AVERAGE + key))
            # torch.distributed.checkpoint leaves out the entries of weights that are frozen now,
            # after it has read into those that are here.
            if AVERAGE + key not in entry and not is_trained(weight):
                continue
            place = PARAMETERS if index in self.apart else "state"
            where = f"{place}[{short_repr(index)}][{AVERAGE + key!r}]"
            if value is None:
                raise ValueError(
                    f"`{where}` must be a tensor, got None. To start the average over, drop it "
                    f"with `averaging_optim.renamed(state_dict, {{{name!r}: None}})`."
                )
            check_average(where, value, weight)
            averages[weight] = value
        return averages

    def without_average(self) -> list[Tensor]:
        """Return the parameters that were frozen."""
        return [weight for index, weight in self.weights.items() if self._was_frozen(index)]

    def _was_frozen(self, index: Any) -> bool:
        """Return whether a parameter was saved to be its own average."""
        return index in self.apart and not self.apart[index]

    def _check_has_none(self, index: Any, key: str) -> None:
        if key in self.state.get(index, {}):
            place = f"[{short_repr(index)}]"
            raise ValueError(
                f"`state{place}[{key!r}]` must be absent, as `{PARAMETERS}{place}` is empty, got "
                f"{short_repr(self.state[index][key])}. Delete one of the two."
            )

    def _entry(self, index: Any) -> dict[str, Any]:
        return {**self.state.get(index, {}), **self.apart.get(index, {})}


def _taken_apart(state_dict: Mapping[str, Any], sources: Sources) -> _Saved:
    groups = _matching_groups(state_dict.get("param_groups"), sources.groups)
    state = checked_mapping("state", state_dict.get("state"))
    apart = checked_mapping(PARAMETERS, state_dict.get(PARAMETERS, {}))
    _check_indices(state, apart, groups, sources.groups)
    parameters = parameters_by_index(groups, sources.groups)
    return _Saved(
        state=state,
        apart=apart,
        groups=groups,
        buffers=checked_mapping(BUFFERS, state_dict.get(BUFFERS, {})),
        weights={i: each for i, each in parameters.items() if not sources.is_excluded(each)},
        excluded=frozenset(i for i, each in parameters.items() if sources.is_excluded(each)),
    )


def _matching_groups(saved_groups: Any, groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Return the saved groups, with the present `average` where they do not say."""
    if not isinstance(saved_groups, list) or len(saved_groups) != len(groups):
        raise ValueError(
            f"`param_groups` must be a list of {len(groups)} groups, as this optimizer has, got "
            f"{_length_or_repr(saved_groups)}."
        )
    matching = []
    for i, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        entry, size = f"param_groups[{i}]", len(group["params"])
        saved_parameters = checked_mapping(entry, saved).get("params")
        if not isinstance(saved_parameters, list) or len(saved_parameters) != size:
            raise ValueError(
                f"`{entry}['params']` must be a list of {size} parameters, as this optimizer has, "
                f"got {_length_or_repr(saved_parameters)}."
            )
        average = saved.get("average", group.get("average", True))
        if not isinstance(average, bool):
            raise ValueError(
                f"`{entry}['average']` must be True or False, got {short_repr(average)}."
            )
        matching.append(saved if average else {**saved, "average": False})
    return matching


def _check_indices(
    state: Mapping[Any, Any],
    apart: Mapping[Any, Any],
    saved_groups: Sequence[Mapping[str, Any]],
    groups: Sequence[Mapping[str, Any]],
) -> None:
    """Raise unless each index stands for one parameter, whose entry, if any, is a dict."""
    parameters: dict[Any, Tensor] = {}
    for i, (saved, group) in enumerate(zip(saved_groups, groups, strict=True)):
        entry = f"param_groups[{i}]['params']"
        for index, parameter in zip(saved["params"], group["params"], strict=True):
            if not _is_hashable(index):
                raise ValueError(
                    f"`{entry}` must contain hashable indices, got {short_repr(index)}."
                )
            if parameters.setdefault(index, parameter) is not parameter:
                raise ValueError(
                    f"`{entry}` must contain each index once, got {short_repr(index)} twice."
                )
            for name, entries in (("state", state), (PARAMETERS, apart)):
                checked_mapping(f"{name}[{short_repr(index)}]", entries.get(index, {}))
    # torch keeps the entries of other indices, and counts parameters from 0 when it saves them.
    for index in range(len(parameters)):
        if index in state and index not in parameters:
            raise ValueError(
                f"`state` must contain parameters of `param_groups` only, got the index {index}."
            )


def _length_or_repr(value: object) -> str:
    return f"{len(value)}" if isinstance(value, list) else short_repr(value)


def _is_hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:  # isinstance(value, Hashable) is True of a tuple of lists
        return False
    return True


def _refuse_unknown(saved: _Saved, keys: Mapping[str, Collection[str]]) -> None:
    known = {key for rule_keys in keys.values() for key in rule_keys}
    averages = {AVERAGE + key for key in known}
    counted = {COUNT + key for key in known}
    counted |= {key for group in saved.groups for key in group if is_count(key)}
    for place, entries in (("state", saved.state), (PARAMETERS, saved.apart)):
        for index, entry in entries.items():
            for key in entry if isinstance(entry, Mapping) and index not in saved.excluded else ():
                # Other keys of this form are the wrapped optimizer's own, of which nothing is
                # counted.
                rule = _rule_of(key, counted)
                if rule is None and key not in averages:
                    continue
                where = f"{place}[{short_repr(index)}][{short_repr(key)}]"
                if key not in averages:
                    raise _no_rule(where, str(rule), keys)
                if index not in saved.weights:
                    raise ValueError(
                        f"`{where}` belongs to a parameter that this optimizer doesn't average. "
                        "Check `average=False` and `exclude`, or drop the average with "
                        "`averaging_optim.renamed`."
                    )
    for i, group in enumerate(saved.groups):
        for key in group:
            if is_count(key) and key.removeprefix(COUNT) not in keys:
                where = f"param_groups[{i}][{short_repr(key)}]"
                raise _no_rule(where, key.removeprefix(COUNT), keys)
    for key in saved.buffers:
        if key not in known:
            raise _no_rule(f"{BUFFERS}[{short_repr(key)}]", key, keys)


def _no_rule(entry: str, name: str, names: Iterable[str]) -> ValueError:
    return ValueError(
        f"`{entry}` belongs to no rule of this optimizer ({', '.join(map(repr, names))}). Name a "
        f"rule {short_repr(name)}, or rename or drop it with "
        "`averaging_optim.renamed(state_dict, ...)`."
    )


def _rule_of(key: object, counted: Collection[str]) -> str | None:
    """Return the name of the counted rule whose average, or a snapshot of it, has this key."""
    if not isinstance(key, str) or not key.startswith(AVERAGE):
        return None
    name = key.removeprefix(AVERAGE)
    stem, _, number = name.rpartition("_")
    names = [name, stem] if number.isdecimal() else [name]
    return next((each for each in names if COUNT + each in counted), None)


def _checked_count(
    saved_groups: Sequence[Mapping[str, Any]], key: str, required: bool
) -> int | None:
    """Return the count all groups agree on, None if they have none."""
    if not required and not any(key in group for group in saved_groups):
        return None
    counts = [
        checked_count(f"param_groups[{i}][{key!r}]", group.get(key))
        for i, group in enumerate(saved_groups)
    ]
    for i, count in enumerate(counts):
        if count != counts[0]:
            raise ValueError(
                f"`param_groups[{i}][{key!r}]` must be {counts[0]}, as in the first group, "
                f"got {count}."
            )
    return counts[0]


def _without_averages(
    state_dict: Mapping[str, Any], saved: _Saved, ours: Collection[str]
) -> dict[str, Any]:
    """Return the state dict of the wrapped optimizer; the one given stays as it is."""
    others = {key: value for key, value in state_dict.items() if key not in (BUFFERS, PARAMETERS)}
    state = dict(_entries_without(saved.state, ours))
    return {**others, "param_groups": saved.groups, "state": state}


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
