"""`optimizer.state`: what the wrapped optimizer keeps, with the averages in the entries."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, MutableMapping
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from torch import Tensor

from averaging_optim._averages.entries import Entries

if TYPE_CHECKING:

    class _Dict(MutableMapping[Any, Any]):
        """A mapping that is a dict to whoever asks, which mypy has no type for."""

    class _DefaultDict(MutableMapping[Any, Any]):
        """Likewise."""

else:
    # Programs ask `isinstance(entry, dict)` before they move an optimizer's tensors. What the
    # dict itself holds is never looked at, since each of its methods is overridden.
    class _Dict(MutableMapping, dict):
        pass

    class _DefaultDict(MutableMapping, defaultdict):
        pass


class _View(_Dict):
    """What a dict has beyond a mapping; copies are plain dicts."""

    @abstractmethod
    def copy(self) -> dict[Any, Any]:
        """Return a plain dict of the same values."""

    @abstractmethod
    def _store(self, items: dict[Any, Any]) -> None:
        """Store all items, or raise and store none."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self._store({key: value})

    def update(self, *args: Any, **kwargs: Any) -> None:
        self._store(dict(*args, **kwargs))

    def popitem(self) -> tuple[Any, Any]:
        for key in reversed(self):
            return key, self.pop(key)
        raise KeyError("popitem(): dictionary is empty")

    def __reversed__(self) -> Iterator[Any]:
        yield from list(self)[::-1]

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def __repr__(self) -> str:
        return repr(self.copy())

    def __copy__(self) -> dict[Any, Any]:
        return self.copy()


class Entry(_View):
    """Key → value, for one parameter: the wrapped optimizer's own dict, and its averages.

    An entry that has been taken out of the state keeps the averages it showed there.

    Args:
        entries: where averages are kept.
        parameter: whose entry it is.
        others: the wrapped optimizer's own entry.
        kept: the state in which `others` is or, once it is written to, will be.
    """

    def __init__(
        self,
        entries: Entries,
        parameter: Tensor,
        others: dict[str, Any],
        kept: MutableMapping[Any, Any],
    ) -> None:
        self.others = others
        self._entries = entries
        self._parameter = parameter
        self._kept: MutableMapping[Any, Any] | None = kept
        self._taken: dict[str, Tensor] = {}

    @property
    def is_taken_out(self) -> bool:
        return self._kept is None

    def averages(self) -> dict[str, Tensor]:
        """Return key → average."""
        if self.is_taken_out:
            return dict(self._taken)
        return self._entries.of(self._parameter)

    def _keys(self) -> list[str]:
        return list(self._taken) if self.is_taken_out else self._entries.keys(self._parameter)

    def take_out(self) -> None:
        """Keep what the entry shows now, whatever becomes of its place."""
        self._taken = self.averages()
        self._kept = None

    def put_under(self, parameter: Tensor, kept: MutableMapping[Any, Any]) -> None:
        """Show the averages of this parameter from now on. Inverse of `take_out`."""
        self._parameter, self._kept, self._taken = parameter, kept, {}

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys():
            return self.others[key]
        if self.is_taken_out:
            return self._taken[key]
        return self._entries.stores[key].read(self._parameter)

    def _store(self, items: dict[Any, Any]) -> None:
        stores = self._entries.stores
        averages = {key: items.pop(key) for key in list(items) if key in stores}
        if self.is_taken_out:
            self._entries.check(self._parameter, averages)
            self._taken.update(averages)
        else:
            self._entries.write(self._parameter, averages)
        if self._kept is not None and items:
            self._kept.setdefault(self._parameter, self.others)
        self.others.update(items)

    def __delitem__(self, key: str) -> None:
        if key not in self._keys():
            del self.others[key]
        elif self.is_taken_out:
            del self._taken[key]
        else:
            self._entries.drop(self._parameter, key)

    def clear(self) -> None:
        """Remove what the wrapped optimizer keeps; averages continue."""
        self.others.clear()

    def __iter__(self) -> Iterator[str]:
        yield from self.others
        yield from self._keys()

    def __len__(self) -> int:
        return len(self.others) + len(self._keys())

    def copy(self) -> dict[str, Any]:
        return {**self.others, **self.averages()}

    def __reduce__(self) -> str | tuple[Any, ...]:
        # Whatever saves the entry loads it with `weights_only=True`, which knows this class.
        return OrderedDict, (), None, None, iter(self.copy().items())

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self.copy(), memo)


class State(_View, _DefaultDict):
    """Parameter → entry, as torch's `defaultdict(dict)`.

    Removing an entry, or all of them, removes what the wrapped optimizer keeps. Averages go
    on, and the next step lists them again. `state[p]` shows them even if `p` isn't listed.

    Args:
        kept: the state of the wrapped optimizer.
        entries: where averages are kept.
        lists_averages: whether parameters are listed of which there is an average alone.
        is_fresh: whether no step has been taken, so that to look must leave no entry behind.
    """

    def __init__(
        self,
        kept: MutableMapping[Any, Any],
        entries: Entries,
        *,
        lists_averages: bool,
        is_fresh: bool,
    ) -> None:
        super().__init__()
        self.kept = kept
        self.lists_averages = lists_averages
        self.is_fresh = is_fresh
        self._entries = entries
        self._removed: set[Any] = set()
        self._handed_out: WeakValueDictionary[Any, Entry] = WeakValueDictionary()
        self._shown: dict[Tensor, dict[str, Tensor]] = {}

    @property
    def default_factory(self) -> Any:
        return getattr(self.kept, "default_factory", None)

    def belongs_to(self, entries: Entries) -> bool:
        return self._entries is entries

    def list_averages(self) -> None:
        """List all parameters that have averages, as they have after a step."""
        self.lists_averages, self.is_fresh = True, False
        self._removed.clear()

    def take_out(self, parameters: Iterable[Tensor] | None = None) -> None:
        """Let entries handed out of these parameters, or of all, stay what they are."""
        for parameter in list(self._handed_out if parameters is None else parameters):
            if (entry := self._handed_out.pop(parameter, None)) is not None:
                entry.take_out()

    def put_aside(self) -> None:
        """Keep the averages that are shown now, to be put back with `put_back`."""
        self._shown = {each: self._entries.of(each) for each in self._entries.parameters()}
        self.take_out()

    def put_back(self) -> None:
        for parameter, averages in self._shown.items():
            self._entries.write(parameter, averages)
        self._shown = {}

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, Tensor):
            return self.kept[key]
        others = self.kept.get(key)
        if others is None:
            others = {} if self._shows_without_entry(key) else self.kept[key]
        if not isinstance(others, dict):
            return others
        entry = self._handed_out.get(key)
        if entry is None or (entry.others is not others and (key in self.kept or entry.others)):
            entry = self._handed_out[key] = Entry(self._entries, key, others, self.kept)
        return entry

    def _shows_without_entry(self, key: Tensor) -> bool:
        """Return whether to look at the average of a parameter leaves no entry behind.

        An optimizer that has taken no step stays fresh, and what is listed stays as it is.
        """
        is_listed = self.lists_averages and key not in self._removed
        return self._entries.has(key) and (is_listed or (self.is_fresh and not self.kept))

    def _store(self, items: dict[Any, Any]) -> None:
        parts = {key: self._parts(key, value) for key, value in items.items()}
        for key, (_, averages) in parts.items():
            self._entries.check(key, averages)
        for key, value in items.items():
            others, averages = parts[key]
            self.take_out([key])
            self._entries.write(key, averages)
            self.kept[key] = others
            self._removed.discard(key)
            if isinstance(value, Entry) and value.is_taken_out:
                value.put_under(key, self.kept)
                self._handed_out[key] = value

    def _parts(self, key: Any, value: Any) -> tuple[Any, dict[str, Any]]:
        """Return what the wrapped optimizer is to keep of an entry, and the averages in it."""
        if isinstance(value, Entry):
            return value.others, value.averages()
        if not isinstance(value, dict) or not isinstance(key, Tensor):
            return value, {}
        stores = self._entries.stores
        averages = {name: value[name] for name in value if name in stores}
        others = {name: value[name] for name in value if name not in stores}
        return (others if averages else value), averages

    def __delitem__(self, key: Any) -> None:
        if key not in self:
            raise KeyError(key)
        self.take_out([key])
        self.kept.pop(key, None)
        self._removed.add(key)

    def __contains__(self, key: object) -> bool:
        return key in self.kept or (
            self.lists_averages
            and key not in self._removed
            and isinstance(key, Tensor)
            and self._entries.has(key)
        )

    def __iter__(self) -> Iterator[Any]:
        yield from self.kept
        if self.lists_averages:
            for parameter in self._entries.parameters():
                if parameter not in self.kept and parameter not in self._removed:
                    yield parameter

    def __len__(self) -> int:
        return sum(1 for _ in self)

    # A mapping would ask for `self[key]`, which makes an entry where there is none.

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]

    def setdefault(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            self[key] = default
        return self[key]

    def pop(self, key: Any, *default: Any) -> Any:
        if key not in self:
            return {}.pop(key, *default)
        value = self[key]
        del self[key]
        return value

    def clear(self) -> None:
        self.take_out()
        self.kept.clear()
        self.lists_averages = False

    def copy(self) -> dict[Any, Any]:
        return defaultdict(self.default_factory, {key: self[key] for key in self})

    def __reduce__(self) -> str | tuple[Any, ...]:
        return self.copy().__reduce__()
