"""Methods that hand on what they are given, and show the signature of who gets it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import suppress
from types import FunctionType
from typing import Any, TypeVar, cast
from weakref import WeakKeyDictionary

_Method = TypeVar("_Method", bound=Callable[..., Any])

_SELF = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)


def shows_signature_of_wrapped(method: _Method) -> _Method:
    """Let the method of an instance have the signature of that of its `_wrapped`.

    Programs look at it before they call: torch.amp.GradScaler asks `inspect.signature` whether
    `step` takes `grad_scaler`.
    """
    return cast("_Method", _HandingOn(cast("FunctionType", method)))


class _HandingOn:
    def __init__(self, method: FunctionType) -> None:
        self._method = method
        self._functions: WeakKeyDictionary[type, FunctionType] = WeakKeyDictionary()

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self._method
        wrapped = instance._wrapped
        function = self._functions.get(type(wrapped))
        if function is None:
            function = self._showing(getattr(wrapped, self._method.__name__))
            if hasattr(type(wrapped), self._method.__name__):
                self._functions[type(wrapped)] = function
        return function.__get__(instance)

    def _showing(self, bound: Callable[..., Any]) -> FunctionType:
        method = self._method
        # A function of its own, for schedulers take it out of the bound method.
        function = FunctionType(
            method.__code__,
            method.__globals__,
            method.__name__,
            method.__defaults__,
            method.__closure__,
        )
        with suppress(ValueError):  # of some builtins
            shown = inspect.signature(bound)
            parameters = [_SELF, *shown.parameters.values()]
            vars(function)["__signature__"] = shown.replace(parameters=parameters)
        return function
