"""`optimizer.state`: one live view of what the wrapped optimizer and the averages hold."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True, repr=False, eq=False)
class StateView(MutableMapping[Tensor, MutableMapping[str, Any]]):
    """Parameter → its entries. Reading and writing reach the place where a value is kept.

    Keys that are no parameter belong to the wrapped optimizer, as do their values.

    Args:
        wrapped: the state of the wrapped optimizer.
        averages: key in an entry → parameter → average.
        hidden: what has an average and is no parameter.
        read: (key, parameter) → the average as it is outside of any swap.
        write: (key, parameter, average) keeps the average, or drops it if it is None.
    """

    wrapped: MutableMapping[Tensor, dict[str, Any]]
    averages: Mapping[str, Mapping[Tensor, Tensor]]
    hidden: frozenset[Tensor]
    read: Callable[[str, Tensor], Tensor]
    write: Callable[[str, Tensor, Tensor | None], None]

    def __getitem__(self, parameter: Tensor) -> MutableMapping[str, Any]:
        if not isinstance(parameter, Tensor):
            return self.wrapped[parameter]
        return _EntryView(self, parameter)

    def __setitem__(self, parameter: Tensor, entry: Mapping[str, Any]) -> None:
        if not isinstance(parameter, Tensor):
            self.wrapped[parameter] = entry
            return
        others = dict(entry)  # a copy first: the entry may be a view of this parameter
        averages = {key: others.pop(key, None) for key in self.averages}
        for key, average in averages.items():
            self.write(key, parameter, average)
        self.wrapped[parameter] = others

    def __delitem__(self, parameter: Tensor) -> None:
        if parameter not in self:
            raise KeyError(parameter)
        for key in self.averages:
            self.write(key, parameter, None)
        self.wrapped.pop(parameter, None)

    def __contains__(self, parameter: object) -> bool:
        return any(parameter in kept for kept in (self.wrapped, *self.averages.values()))

    def __iter__(self) -> Iterator[Tensor]:
        kept = (self.wrapped, *self.averages.values())
        found = {parameter: None for parameters in kept for parameter in parameters}
        return (parameter for parameter in found if parameter not in self.hidden)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))


@dataclass(frozen=True, repr=False, eq=False)
class _EntryView(MutableMapping[str, Any]):
    """Key → value, for one parameter."""

    state: StateView
    parameter: Tensor

    def __getitem__(self, key: str) -> Any:
        if self._has_average(key):
            return self.state.read(key, self.parameter)
        return self._others()[key]

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self.state.averages:
            self.state.write(key, self.parameter, value)
        else:
            self.state.wrapped.setdefault(self.parameter, {})[key] = value

    def __delitem__(self, key: str) -> None:
        if self._has_average(key):
            self.state.write(key, self.parameter, None)
        else:
            del self._others()[key]

    def __iter__(self) -> Iterator[str]:
        yield from self._others()
        yield from filter(self._has_average, self.state.averages)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __repr__(self) -> str:
        return repr(dict(self))

    def _has_average(self, key: str) -> bool:
        return self.parameter in self.state.averages.get(key, {})

    def _others(self) -> dict[str, Any]:
        # `get`, as looking an entry up in torch's defaultdict would create it.
        return self.state.wrapped.get(self.parameter, {})
