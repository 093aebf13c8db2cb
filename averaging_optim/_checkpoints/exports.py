"""State dicts of a model under an average, under the plain model's names, and read back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from averaging_optim._averages.entries import check_average, without_attributes
from averaging_optim._averages.sources import Sources, wrapped_as
from averaging_optim._checks import checked_mapping, short_repr


class IncompatibleKeys(NamedTuple):
    """What `torch.nn.Module.load_state_dict` returns.

    missing_keys: of tensors that were not loaded.
    unexpected_keys: of entries that were not taken.
    """

    missing_keys: list[str]
    unexpected_keys: list[str]


def plain_keys(model: nn.Module, state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict under the names that it has without wrappers around modules."""
    wrapped = {}
    # Inner wrappers first: their names are those inside outer ones.
    for outer, module in reversed(list(model.named_modules())):
        if attribute := wrapped_as(module):
            dot = outer and f"{outer}."
            wrapped[f"{dot}{attribute}."] = dot
    plain = {}
    for key, value in state_dict.items():
        for prefix, outer in wrapped.items():
            if key.startswith(prefix):
                key = outer + key.removeprefix(prefix)
        plain[key] = value
    return plain


def read_exported(
    model: nn.Module, state_dict: Mapping[str, Any], sources: Sequence[Sources], strict: bool
) -> tuple[dict[Tensor, Tensor], IncompatibleKeys]:
    """Return weight or buffer → its value in a state dict of the model, and what did not fit.

    Raises:
        ValueError: an entry doesn't match, or the model doesn't have all weights.
    """
    present = plain_keys(model, model.state_dict(keep_vars=True))
    state_dict = _under_keys(present, checked_mapping("state_dict", state_dict))
    unexpected = [key for key in state_dict if key not in present]
    if unexpected and strict:
        raise ValueError(
            f"`state_dict` must contain keys of the model only, got {short_repr(unexpected[0])}. "
            "To load the rest, pass `strict=False`."
        )
    # A tied parameter has several keys; those that were exported come last and stay.
    keys = {
        tensor: key
        for key, tensor in sorted(present.items(), key=lambda item: item[0] in state_dict)
        if isinstance(tensor, Tensor)
    }
    for weight in [weight for each in sources for weight in each.weights]:
        if weight not in keys and strict:
            raise ValueError(
                "`model` must have all parameters that are averaged, got a model without one of "
                f"shape {tuple(weight.shape)}. To load the rest, pass `strict=False`."
            )
    # Buffers that the model does not persist are in no export of it.
    averaged = {tensor for each in sources for tensor in each.all}
    values, missing = {}, []
    for tensor, key in keys.items():
        if tensor not in averaged:
            continue
        value = without_attributes(state_dict.get(key))
        if not strict and (value is None or _has_another_shape(value, tensor)):
            missing.append(key)
            unexpected += [] if value is None else [key]
            continue
        check_average(f"state_dict[{key!r}]", value, tensor)
        values[tensor] = value
    return values, IncompatibleKeys(missing, unexpected)


def _under_keys(keys: Iterable[str], state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """Return the state dict under these keys where its own are those of wrapped modules.

    So are exports of version 0.1.0, and state dicts of the training weights.
    """
    without = defaultdict(list)
    for key in keys:
        without[_without_wrappers(key)].append(key)
    moved = {}
    for key in state_dict:
        found = without.get(_without_wrappers(key), []) if isinstance(key, str) else []
        if len(found) == 1 and found[0] not in state_dict:
            moved[key] = found[0]
    return {moved.get(key, key): value for key, value in state_dict.items()}


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in ("module", "_orig_mod"))


def _has_another_shape(value: object, tensor: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape != tensor.shape
