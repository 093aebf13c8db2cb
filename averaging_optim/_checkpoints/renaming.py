"""Checkpoints with averages renamed or dropped."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from averaging_optim._averages.averages import COUNT, is_count
from averaging_optim._averages.entries import AVERAGE
from averaging_optim._checkpoints.layout import BESIDE, BUFFERS, PARAMETERS
from averaging_optim._checks import checked_mapping, short_repr


def renamed(state_dict: Mapping[str, Any], names: Mapping[str, str | None]) -> dict[str, Any]:
    """Return a checkpoint with averages renamed or dropped, to load it after you renamed rules.

    Example:
        >>> import torch
        >>> from averaging_optim import EMA, SWA, AveragingOptimizer, renamed
        >>> weight = torch.nn.Parameter(torch.ones(1))
        >>> sgd = torch.optim.SGD([weight])
        >>> optimizer = AveragingOptimizer(sgd, {"ema": EMA(), "swa": SWA()})
        >>> optimizer.update_averages()
        >>> saved = renamed(optimizer.state_dict(), {"ema": "slow", "swa": None})
        >>> resumed = AveragingOptimizer(torch.optim.SGD([weight]), {"slow": EMA()})
        >>> resumed.load_state_dict(saved)
        >>> resumed.n_averaged("slow")
        1

    Args:
        state_dict: from `AveragingOptimizer.state_dict`. It is not modified; tensors are
            referenced, not copied.
        names: name in the checkpoint → new name, or None to drop the average. Averages that you
            don't name keep their names.

    Raises:
        TypeError: a name is neither a string nor None.
        ValueError: the checkpoint has no average of a name, or two would have the same name.
    """
    state_dict = checked_mapping("state_dict", state_dict)
    if BESIDE in state_dict:
        return {**state_dict, BESIDE: renamed(state_dict[BESIDE], names)}
    groups = state_dict.get("param_groups")
    if not isinstance(groups, list):
        raise ValueError(f"`param_groups` must be a list, got {short_repr(groups)}.")
    present = {
        key.removeprefix(COUNT)
        for i, group in enumerate(groups)
        for key in checked_mapping(f"param_groups[{i}]", group)
        if is_count(key)
    }
    new = _new_names(checked_mapping("names", names), present)
    result = {**state_dict, "param_groups": [_rekeyed(group, COUNT, new) for group in groups]}
    for key in ("state", PARAMETERS):
        if isinstance(entries := state_dict.get(key), Mapping):
            result[key] = {
                index: _rekeyed(entry, AVERAGE, new) if isinstance(entry, Mapping) else entry
                for index, entry in entries.items()
            }
    if isinstance(buffers := state_dict.get(BUFFERS), Mapping):
        result[BUFFERS] = _rekeyed(buffers, "", new)
    return result


def _new_names(names: Mapping[Any, Any], present: set[str]) -> dict[str, str | None]:
    """Return name in the checkpoint → new name, for all that there are."""
    for name, to in names.items():
        if not isinstance(to, str | None):
            raise TypeError(f"`names[{short_repr(name)}]` must be a string or None, got {to!r}.")
        if name not in present:
            raise ValueError(
                f"`names` must map averages in the checkpoint, {sorted(present)}, got {name!r}."
            )
    new = {name: names.get(name, name) for name in sorted(present)}
    kept = [to for to in new.values() if to is not None]
    if len(set(kept)) < len(kept):
        raise ValueError(f"`names` must give each average a different name, got {new}.")
    return new


def _rekeyed(
    entry: Mapping[Any, Any], prefix: str, new: Mapping[str, str | None]
) -> dict[Any, Any]:
    result = {}
    for key, value in entry.items():
        if not isinstance(key, str) or not key.startswith(prefix):
            result[key] = value
            continue
        name = key.removeprefix(prefix)
        stem, _, number = name.rpartition("_")
        if name in new:
            to, suffix = new[name], ""
        elif stem in new and number.isdecimal():  # a snapshot
            to, suffix = new[stem], f"_{number}"
        else:
            result[key] = value
            continue
        if to is not None:
            result[f"{prefix}{to}{suffix}"] = value
    return result
