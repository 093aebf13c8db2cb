"""Moving tensors toward or into other tensors, whatever their dtypes and devices."""

from __future__ import annotations

import functools
import math
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import compress
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from averaging_optim._averages.sharding import all_ranks_agree, local_parts, sharding_of

SCRATCH_BYTES = 4 * 2**20

# Elements of the weights that are worked on at once where they are read more than once: on a CPU
# they stay in its last cache, elsewhere they bound the memory for conversions.
_PIECES = {"cpu": 2**20}

# One for each dtype and device: weights, followed by lists of their averages.
TensorGroups = list[list[list[Tensor]]]

# Tensors → those that are in the places of each in the model now.
Present = Callable[[Sequence[Tensor]], Sequence[Sequence[Tensor]]]

_Block = tuple[Tensor, Tensor, Tensor]

# Target → backup, of each block that overwrites them now, in the order of entering.
_overwritten: list[dict[Tensor, Tensor]] = []
_overwriting = threading.RLock()


def numeric_kind(tensor: Tensor) -> str:
    """Return the kind of number held: values move between tensors of one kind alone."""
    if tensor.is_complex():
        return "complex"
    return "floating-point" if tensor.is_floating_point() else "integer"


def has_infinity(tensor: Tensor) -> bool:
    """Return whether a number is infinite; waits for the device."""
    return not tensor.is_meta and bool(_at_least_16_bits(tensor).isinf().any())


def is_finite(tensor: Tensor) -> bool:
    """Return whether no number is infinite or NaN, on all ranks; waits for the device."""
    (here,) = local_parts([tensor])
    return all_ranks_agree(bool(_at_least_16_bits(here).isfinite().all()), sharding_of(tensor))


def same_dtype_and_device(first: Tensor, second: Tensor) -> bool:
    """Return whether both have one dtype and device, so that either can hold the other."""
    return first.dtype == second.dtype and first.device == second.device


def average_dtype(tensor: Tensor, dtype: torch.dtype | None) -> torch.dtype:
    """Return the dtype of averages of this tensor, `dtype` being what was asked for."""
    if numeric_kind(tensor) == "integer":
        return tensor.dtype
    if dtype is None:
        # An average of 16 bits stands still: its increments are lost to rounding.
        dtype = torch.float32 if torch.finfo(tensor.dtype).bits <= 16 else tensor.dtype
    return dtype.to_complex() if tensor.is_complex() else dtype


def storages(tensors: Iterable[Tensor]) -> list[int]:
    """Return a number for each tensor, the same for those of which one may change the other."""
    # Not by address: storages of no bytes, as on the meta device, are all at 0.
    return [each.untyped_storage()._cdata for each in local_parts(tensors)]


def overlapping(tensors: Sequence[Tensor]) -> set[Tensor]:
    """Return those that may have memory in common with another one of these."""
    found: set[Tensor] = set()
    farthest: tuple[int, int, Tensor] | None = None
    parts = zip(storages(tensors), map(_span, local_parts(tensors)), tensors, strict=True)
    for storage, (begin, end), each in sorted(parts, key=lambda part: part[:2]):
        if farthest is None or storage != farthest[0] or begin >= farthest[1]:
            farthest = storage, end, each
            continue
        found |= {each, farthest[2]}
        if end > farthest[1]:
            farthest = storage, end, each
    return found


def has_memory_of_its_own(tensor: Tensor) -> bool:
    """Return whether each number of the tensor lies in memory of its own."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += stride * (size - 1)
    return True


def share_memory(first: Tensor, second: Tensor) -> bool:
    """Return whether both begin at one address, as a tensor and what it was made of."""
    here, there = local_parts([first, second])
    return here.data_ptr() == there.data_ptr()


@torch.inference_mode(mode=False)
@torch.no_grad()
def new_average(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | None) -> Tensor:
    """Return a copy of `tensor` in the dtype and on the device of its average."""
    average = torch.empty_like(
        tensor, dtype=average_dtype(tensor, dtype), device=device, requires_grad=False
    )
    return average.copy_(tensor)


def group_by_dtype_and_device(*lists: Sequence[Tensor]) -> Iterator[list[list[Tensor]]]:
    """Part the tensors of all lists alike by dtypes and devices, as foreach kernels want them."""
    local = [local_parts(tensors) for tensors in lists]
    columns = ([(each.dtype, each.device) for each in tensors] for tensors in local)
    keys = list(zip(*columns, strict=True))
    for key in dict.fromkeys(keys):
        chosen = [each == key for each in keys]
        yield [list(compress(tensors, chosen)) for tensors in local]


@torch.no_grad()
def move_toward(groups: Iterable[list[list[Tensor]]], shares: Sequence[float]) -> None:
    """average ← average + share · (weight − average), in the dtypes of the averages.

    A share of 1 copies, so that a first average may lie in uninitialised or non-finite
    memory; integer tensors are always copied.

    Args:
        groups: see `TensorGroups`, with as many lists of averages as there are shares.
        shares: in (0, 1], as 0 · (∞ − average) is NaN.
    """
    for weights, *averages in groups:
        is_copied = not (weights[0].is_floating_point() or weights[0].is_complex())
        is_alike = same_dtype_and_device(weights[0], averages[0][0])
        pieces: Iterable[Sequence[list[Tensor]]] = [[weights, *averages]]
        if len(averages) > 1 or not is_alike:
            # So that a piece of the weights is in cache for all that is done with it.
            limit = _PIECES.get(weights[0].device.type, 2**24)
            pieces = _bundles([weights, *averages], limit)
        for present, *parts in pieces:
            if not is_alike:  # _foreach_lerp_ refuses to mix
                present = [weight.to(each) for weight, each in zip(present, parts[0], strict=True)]
            for part, share in zip(parts, shares, strict=True):
                if is_copied or share == 1:
                    torch._foreach_copy_(part, present)
                else:
                    torch._foreach_lerp_(part, present, share)


def stay_finite(averages: Sequence[Tensor], weights: Sequence[Tensor]) -> bool:
    """Return whether averages that move toward these weights are sure to stay finite.

    So they are if no weight is above a quarter of the largest number of its average's
    dtype: no difference overflows then. Reads the weights once, and waits for the device.
    """
    groups: dict[tuple[torch.dtype, Any], list[Tensor]] = defaultdict(list)
    for average, weight in zip(averages, weights, strict=True):
        if numeric_kind(average) != "integer":
            groups[average.dtype, sharding_of(weight)] += map(
                _at_least_16_bits, local_parts([weight])
            )
    # All verdicts before the answer, as other ranks wait in each.
    verdicts = [
        all_ranks_agree(_largest(tensors) <= torch.finfo(dtype).max / 4, sharding)
        for (dtype, sharding), tensors in groups.items()
    ]
    return all(verdicts)


def cut_alike(tensors: Sequence[Tensor], limit: int) -> Iterator[Sequence[Tensor]]:
    """Cut tensors of one shape alike along their outermost dimension, until each piece fits."""
    first = tensors[0]
    if first.numel() <= limit:
        yield tensors
        return
    # Outermost first: pieces of contiguous tensors stay contiguous.
    dim = next(i for i, size in enumerate(first.shape) if size > 1)
    size = max(1, first.shape[dim] * limit // first.numel())
    for pieces in zip(*(tensor.split(size, dim) for tensor in tensors), strict=True):
        yield from cut_alike(pieces, limit)


@torch.no_grad()
def copy_into(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy each source's values into its target, converting where they differ."""
    for group, values in group_by_dtype_and_device(targets, sources):
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


@torch.no_grad()
def put_sum(target: Tensor, terms: Sequence[tuple[float, Tensor]], *, is_buffer: bool) -> None:
    """target ← ∑ factor · term, in at least float32; the target may be one of the terms.

    Args:
        is_buffer: keep what is nowhere negative in any term, such as a variance, at its least
            value there or above.
    """
    factors = [factor for factor, _ in terms]
    here, *parts = local_parts([target, *(term for _, term in terms)])
    dtypes = [here.dtype, torch.float32, *(part.dtype for part in parts)]
    dtype = functools.reduce(torch.promote_types, dtypes)
    wide = [part.to(here.device, dtype) for part in parts]
    sum_ = torch.stack([factor * part for factor, part in zip(factors, wide, strict=True)]).sum(0)
    if is_buffer and not here.is_complex():
        least = torch.stack(wide).amin(0)
        sum_ = torch.where((least >= 0).all(), sum_.maximum(least), sum_)
    here.copy_(sum_)


@contextmanager
def restored_if_moved(
    tensors: Sequence[Tensor], memory: Sequence[Tensor], present: Present
) -> Iterator[None]:
    """On leaving, copy what the memory of tensors holds to those that have got another.

    Args:
        present: tensors → those that are in the places of each now.
    """
    try:
        yield
    finally:
        places = zip(tensors, present(tensors), memory, strict=True)
        pairs = [(each, was) for tensor, there, was in places for each in (tensor, *there)]
        moved = [(tensor, was) for tensor, was in pairs if not share_memory(tensor, was)]
        copy_into([tensor for tensor, _ in moved], [was for _, was in moved])


@contextmanager
def overwritten_until_exit(
    targets: Sequence[Tensor],
    beside: Sequence[Tensor],
    overwrite: Callable[[], None],
    present: Present,
) -> Iterator[None]:
    """Overwrite the targets, and let them have the values that they have now on leaving.

    They are backed up, which is over before the block begins, so that leaving allocates nothing.
    Blocks may overlap: one that is left before a later one of the same target leaves its backup
    to that.

    Args:
        beside: tensors on whose devices the backups are kept.
        present: targets → those that are in the places of each now, which are restored too.
    """
    with _overwriting:
        backups = dict(zip(targets, _backups(targets, beside), strict=True))
        _overwritten.append(backups)
    try:
        with _overwriting:
            overwrite()
        yield
    finally:
        with _overwriting:
            _leave_to_later(backups)
            replaced = [
                (each, backups[target])
                for target, there in zip(backups, present(list(backups)), strict=True)
                for each in there
                if each is not target
            ]
            _restore(
                [*backups, *(each for each, _ in replaced)],
                [*backups.values(), *(backup for _, backup in replaced)],
            )


@torch.inference_mode(mode=False)
def detached_copy(tensor: Tensor) -> Tensor:
    """Return a copy that shares neither memory nor graph."""
    return tensor.detach().clone()


def is_zero_without_sync(number: float | Tensor | None) -> bool:
    """Return whether the number is 0, as far as the host knows without synchronising."""
    if isinstance(number, Tensor) and number.device.type != "cpu":
        return False
    return number is not None and float(number) == 0


def _bundles(lists: Sequence[list[Tensor]], limit: int) -> Iterator[Sequence[list[Tensor]]]:
    """Cut the tensors of all lists alike, and gather pieces of at most `limit` elements."""
    bundle: list[Sequence[Tensor]] = []
    room = limit
    for row in zip(*lists, strict=True):
        for pieces in cut_alike(row, limit):
            if bundle and pieces[0].numel() > room:
                yield [list(column) for column in zip(*bundle, strict=True)]
                bundle, room = [], limit
            bundle.append(pieces)
            room -= pieces[0].numel()
    yield [list(column) for column in zip(*bundle, strict=True)]


def _at_least_16_bits(tensor: Tensor) -> Tensor:
    # torch looks for infinities, and takes norms, in few dtypes of 8 bits.
    return tensor.float() if tensor.element_size() == 1 else tensor


def _largest(tensors: Iterable[Tensor]) -> float:
    """Return the largest magnitude there is, NaN if there is a NaN, 0 if there is nothing."""
    # An empty tensor has no largest number, for which torch raises.
    return get_total_norm([each for each in tensors if each.numel()], math.inf).item()


@torch.inference_mode(mode=False)
def _backups(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> list[Tensor]:
    """Return this rank's part of each target, copied to where its source is."""
    there = [source.device for source in local_parts(sources)]
    try:
        parts = local_parts([target.detach() for target in targets])
        return [part.to(device, copy=True) for part, device in zip(parts, there, strict=True)]
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            "There is no room for a backup of the weights, and nothing has changed. Use "
            "`swap_to_averaged(in_place=True)`, or keep the averages, and with them the backup, "
            f'in main memory with `device="cpu"`. ({error})'
        ) from error


def _leave_to_later(backups: dict[Tensor, Tensor]) -> None:
    """Take out of these backups what blocks entered later are to restore."""
    place = next(i for i, each in enumerate(_overwritten) if each is backups)
    del _overwritten[place]
    for later in _overwritten[place:]:
        for target in later.keys() & backups.keys():
            later[target] = backups.pop(target)


def _restore(targets: Sequence[Tensor], backups: Sequence[Tensor]) -> None:
    for target, here, backup in zip(targets, local_parts(targets), backups, strict=True):
        # By `target.data = ...`, or by another tensor in its place, which can't be written into.
        if here.shape != backup.shape or not has_memory_of_its_own(here):
            target.data = backup.to(target.device, target.dtype)
    copy_into(targets, backups)


def _span(tensor: Tensor) -> tuple[int, int]:
    """Return the first and last byte of its storage, the latter exclusive, that a tensor uses."""
    first, size = int(tensor.storage_offset()), tensor.element_size()
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    last = first + sum(stride * (length - 1) for stride, length in pairs)
    return first * size, (last + 1) * size if tensor.numel() else first * size


@torch.inference_mode(mode=False)
def _blocks(firsts: Sequence[Tensor], seconds: Sequence[Tensor]) -> Iterator[_Block]:
    for group, partners in group_by_dtype_and_device(firsts, seconds):
        limit = SCRATCH_BYTES // group[0].element_size()
        largest = max(tensor.numel() for tensor in group)
        scratch = group[0].new_empty(min(limit, largest))
        for pair in zip(group, partners, strict=True):
            for first, second in cut_alike(pair, limit):
                yield first, second, scratch[: first.numel()].view(first.shape)


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
