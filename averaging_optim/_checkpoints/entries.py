"""What an entry of a state dict must be, to stand for an average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from averaging_optim._averages.moving import copy_into, numeric_kind
from averaging_optim._averages.sharding import sharding_of


def check_average(entry: str, average: object, tensor: Tensor) -> None:
    """Raise a ValueError unless the average is a tensor that can stand for `tensor`."""
    if not isinstance(average, Tensor):
        raise ValueError(f"`{entry}` must be a tensor, got {short_repr(average)}.")
    if numeric_kind(average) != numeric_kind(tensor):
        raise ValueError(f"`{entry}` must be {numeric_kind(tensor)}, got {average.dtype}.")
    _check_copying(entry, average, tensor)
    if average.shape != tensor.shape:
        raise ValueError(
            f"`{entry}` must have the shape {tuple(tensor.shape)}, got {tuple(average.shape)}."
        )
    if sharding_of(average) != sharding_of(tensor):
        raise ValueError(
            f"`{entry}` must be spread over devices as its weight is, {sharding_of(tensor)}, "
            f"got {sharding_of(average)}. See torch.distributed.tensor.distribute_tensor."
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


def checked_mapping(entry: str, value: Any) -> Mapping[Any, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"`{entry}` must be a dict, got {short_repr(value)}.")
    return value


def without_attributes(average: Any) -> Any:
    """Return a tensor without attributes, by which a file can hide its methods."""
    return Tensor.detach(average) if isinstance(average, Tensor) and vars(average) else average


def short_repr(value: object) -> str:
    """Return a value as an error shows it: cut short, and its type if it has no repr."""
    try:
        text = repr(value)
    except Exception:  # such as that of an int of more than 4300 digits
        text = f"<{type(value).__name__}>"
    return text if len(text) <= 200 else f"{text[:200]}…"
