"""Moving tensors toward or into other tensors, whatever their dtypes and devices."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

SCRATCH_BYTES = 4 * 2**20

_Block = tuple[Tensor, Tensor, Tensor]


def kind_of(tensor: Tensor) -> str:
    """Return the kind of number held: values move between tensors of one kind alone."""
    if tensor.is_complex():
        return "complex"
    return "floating-point" if tensor.is_floating_point() else "integer"


def layout_of(tensor: Tensor) -> Any:
    """Return how a DTensor is spread over its devices, None for a tensor of one device."""
    if hasattr(tensor, "device_mesh") and hasattr(tensor, "placements"):
        return tensor.device_mesh, tensor.placements
    return None


def are_alike(first: Tensor, second: Tensor) -> bool:
    """Return whether both have one dtype and device, so that either can hold the other."""
    return first.dtype == second.dtype and first.device == second.device


@torch.no_grad()
def new_average(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
    """Return a copy of `tensor` in the dtype and on the device of its average."""
    average = torch.empty_like(
        tensor, dtype=_average_dtype(tensor, dtype), device=device, requires_grad=False
    )
    return average.copy_(tensor)


@torch.no_grad()
def move_toward(averages: Sequence[Tensor], weights: Sequence[Tensor], share: float) -> None:
    """averages ← averages + share · (weights − averages), in the averages' dtypes.

    A share of 1 copies, so that a first average may lie in uninitialised or non-finite
    memory; integer tensors are always copied.
    """
    for group, sources in _by_kind(averages, weights):
        if share == 1 or kind_of(group[0]) == "integer":
            torch._foreach_copy_(group, sources)
        elif are_alike(group[0], sources[0]):
            torch._foreach_lerp_(group, sources, share)
        else:
            # _foreach_lerp_ refuses mixed dtypes; one tensor at a time bounds the memory.
            for average, weight in zip(group, sources, strict=True):
                average.lerp_(weight.to(average), share)


def stay_finite(averages: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Return whether averages that move toward these weights are sure to stay finite.

    So they are if no weight is above a quarter of the largest number of its average's
    dtype: no difference overflows then. Reads the weights once, and waits for the device.
    """
    kinds: dict[tuple[torch.dtype, Any], list[Tensor]] = defaultdict(list)
    for average, weight in zip(averages, weights, strict=True):
        if kind_of(average) != "integer":
            kinds[average.dtype, layout_of(weight)].append(_local(weight))
    # All verdicts before the answer, as other ranks wait in each.
    verdicts = [
        _all_ranks_say(_largest(tensors) <= torch.finfo(dtype).max / 4, layout)
        for (dtype, layout), tensors in kinds.items()
    ]
    return all(verdicts)


@torch.no_grad()
def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source's values into its target, converting where they differ."""
    for group, values in _by_kind(targets, sources):
        torch._foreach_copy_(group, values)


@contextmanager
def exchanged(firsts: Sequence[Tensor], seconds: Sequence[Tensor]) -> Iterator[None]:
    """Exchange the values of tensors that are alike until the block is left.

    One scratch of at most `SCRATCH_BYTES` for each dtype and device serves all pairs.
    It is kept until the block is left, so that leaving allocates nothing. A copy that
    fails on entering leaves every value where it was.
    """
    blocks = list(_blocks(firsts, seconds))
    _exchange(blocks)
    try:
        yield
    finally:
        _exchange(blocks)


@contextmanager
def followed(tensors: Sequence[Tensor], memory: Sequence[Tensor]) -> Iterator[None]:
    """On leaving, copy what the memory of tensors holds to those that have got another."""
    try:
        yield
    finally:
        pairs = zip(tensors, memory, strict=True)
        moved = [(tensor, was) for tensor, was in pairs if not _share_memory(tensor, was)]
        copy_into([tensor for tensor, _ in moved], [was for _, was in moved])


@contextmanager
def replaced(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> Iterator[None]:
    """Let the targets hold the sources' values until the block is left.

    Needs a backup of all targets; the sources are only read.
    """
    backups = [independent(target) for target in targets]
    try:
        copy_into(targets, sources)
        yield
    finally:
        copy_into(targets, backups)


def independent(tensor: Tensor) -> Tensor:
    """Return a copy that shares neither memory nor graph."""
    return tensor.detach().clone()


def is_known_zero(number: float | Tensor | None) -> bool:
    """Return whether the number is 0, as far as the host knows without synchronising."""
    if isinstance(number, Tensor) and number.device.type != "cpu":
        return False
    return number is not None and float(number) == 0


def _average_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    if kind_of(tensor) == "integer":
        return tensor.dtype
    if dtype is None:
        # An average of 16 bits stands still: its increments are lost to rounding.
        dtype = torch.float32 if torch.finfo(tensor.dtype).bits <= 16 else tensor.dtype
    return dtype.to_complex() if tensor.is_complex() else dtype


def _by_kind(
    targets: Iterable[Tensor], sources: Iterable[Tensor]
) -> Iterable[tuple[list[Tensor], list[Tensor]]]:
    """Gather pairs of the same dtypes and devices, as foreach kernels want them."""
    kinds: dict[object, tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(map(_local, targets), map(_local, sources), strict=True):
        group = kinds[target.dtype, target.device, source.dtype, source.device]
        group[0].append(target)
        group[1].append(source)
    return kinds.values()


def _local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a DTensor, in the same memory; else the tensor itself."""
    # By name, as importing DTensor takes half a second and not every torch is built with it.
    local: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return local


def _largest(tensors: Iterable[Tensor]) -> float:
    """Return the largest magnitude there is, NaN if there is a NaN, 0 if there is nothing."""
    # An empty tensor has no largest number, for which torch raises.
    return get_total_norm([each for each in tensors if each.numel()], math.inf).item()


def _all_ranks_say(verdict: bool, layout: Any) -> bool:
    """Return whether the ranks that share tensors of this layout all come to this verdict."""
    if layout is None:
        return verdict
    # Imported here, as it takes half a second. A verdict and not the largest number is reduced,
    # for a maximum over ranks may pass over NaN.
    from torch.distributed.tensor import DTensor, Partial

    mesh, _ = layout
    votes = DTensor.from_local(torch.tensor(verdict).int(), mesh, [Partial("min")] * mesh.ndim)
    return bool(votes.full_tensor())


def _share_memory(first: Tensor, second: Tensor) -> bool:
    return _local(first).data_ptr() == _local(second).data_ptr()


def _blocks(firsts: Sequence[Tensor], seconds: Sequence[Tensor]) -> Iterator[_Block]:
    for group, partners in _by_kind(firsts, seconds):
        limit = SCRATCH_BYTES // group[0].element_size()
        largest = max(tensor.numel() for tensor in group)
        scratch = group[0].new_empty(min(limit, largest))
        for first, second in zip(group, partners, strict=True):
            yield from _cut(first, second, scratch)


def _cut(first: Tensor, second: Tensor, scratch: Tensor) -> Iterator[_Block]:
    """Halve a pair along its outermost dimension until each piece fits the scratch."""
    if first.numel() <= scratch.numel():
        yield first, second, scratch[: first.numel()].view(first.shape)
        return
    # Outermost first: views of contiguous tensors stay contiguous.
    dim = next(i for i, size in enumerate(first.shape) if size > 1)
    for half, partner in zip(first.chunk(2, dim), second.chunk(2, dim), strict=True):
        yield from _cut(half, partner, scratch)


def _exchange(blocks: Sequence[_Block]) -> None:
    done: list[_Block] = []
    try:
        for block in blocks:
            _exchange_block(*block)
            done.append(block)
    except BaseException:
        for block in done:
            _exchange_block(*block)
        raise


@torch.no_grad()
def _exchange_block(first: Tensor, second: Tensor, scratch: Tensor) -> None:
    scratch.copy_(first)
    try:
        first.copy_(second)
        try:
            second.copy_(scratch)
        except BaseException:
            second.copy_(first)
            raise
    except BaseException:
        first.copy_(scratch)
        raise
