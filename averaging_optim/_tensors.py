"""Moving tensors toward or into other tensors, whatever their dtypes and devices."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

SCRATCH_BYTES = 4 * 2**20

_Block = tuple[Tensor, Tensor, Tensor]


def kind_of(tensor: Tensor) -> str:
    """Return the kind of number held: values move between tensors of one kind alone."""
    if tensor.is_complex():
        return "complex"
    return "floating-point" if tensor.is_floating_point() else "integer"


def layout_of(tensor: Tensor) -> object:
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


def _blocks(firsts: Sequence[Tensor], seconds: Sequence[Tensor]) -> Iterator[_Block]:
    for group, partners in _by_kind(firsts, seconds):
        limit = SCRATCH_BYTES // group[0].element_size()
        largest = max(tensor.numel() for tensor in group)
        scratch = group[0].new_empty(min(limit, largest))
        for first, second in zip(group, partners, strict=True):
            yield from _cut(first.detach(), second, scratch)


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
