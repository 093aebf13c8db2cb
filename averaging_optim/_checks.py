"""Checks of arguments, whose errors name the argument, the rule and the value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any


def check_bool(argument: str, value: object) -> None:
    """Raise unless the value is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"`{argument}` must be True or False, got {value!r}.")


def check_integer(argument: str, value: object, at_least: int) -> None:
    """Raise unless the value is an integer (no bool) that is large enough, and fits 64 bits."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{argument}` must be an integer, got {value!r}.")
    if value < at_least:
        raise ValueError(f"`{argument}` must be at least {at_least}, got {value}.")
    if int(value) >= 2**63:
        raise ValueError(f"`{argument}` must be less than 2**63, got {value}.")


def check_real(argument: str, value: object, interval: str) -> None:
    """Raise unless the value is a number in the interval, such as "[0, 1]" or "(0, ∞)"."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{argument}` must be a number in {interval}, got {value!r}.")
    low, high = (float(bound.replace("∞", "inf")) for bound in interval[1:-1].split(", "))
    number = float(value)
    is_above = low <= number if interval[0] == "[" else low < number
    is_below = number <= high if interval[-1] == "]" else number < high
    if not (is_above and is_below):
        raise ValueError(f"`{argument}` must be in {interval}, got {value}.")


def check_either(argument: str, value: object, first: str, second: str) -> None:
    if value not in (first, second):
        raise ValueError(f"`{argument}` must be {first!r} or {second!r}, got {value!r}.")


def check_names(argument: str, names: Sequence[str]) -> None:
    """Raise unless these are names, at least one and each another."""
    if isinstance(names, str) or not 0 < len(set(names)) == len(names):
        raise ValueError(f"`{argument}` must be a list of different names, got {names!r}.")


def checked_mapping(entry: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"`{entry}` must be a dict, got {short_repr(value)}.")
    return value


def short_repr(value: object) -> str:
    """Return a value as an error shows it: cut short, and its type if it has no repr."""
    try:
        text = repr(value)
    except Exception:  # such as that of an int of more than 4300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:200]}…"


def check_checkpoints(checkpoints: object) -> None:
    """Raise unless this is a sequence of at least one checkpoint."""
    if isinstance(checkpoints, str) or not isinstance(checkpoints, Sequence):
        raise TypeError(
            f"`checkpoints` must be a sequence of state dicts or paths, got {checkpoints!r}."
        )
    if len(checkpoints) == 0:
        raise ValueError("`checkpoints` must contain at least one, got none.")


def short_list(names: Sequence[str]) -> str:
    """Return names as an error shows them: the first few, and how many there are more."""
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
