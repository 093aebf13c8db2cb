"""Averages of 16 bits that are rounded at random, and so move in the mean as exact ones do."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from averaging_optim._averages.moving import cut_alike

# Low bits of a float32 that the dtype has no place for, of numbers that are not subnormal.
_LOST_BITS = {torch.bfloat16: 16, torch.float16: 13}

# The largest number below which those of float16 lie at equal distances, and that distance.
_SUBNORMAL, _DISTANCE = 2.0**-14, 2.0**-24

_PIECE = 2**20

# An odd number without pattern, so that no tensor has the seed that the next one had before.
_APART = 0x9E3779B97F4A7C15


@torch.no_grad()
def move_toward_at_random(
    groups: Iterable[list[list[Tensor]]], shares: Sequence[float], seeds: Sequence[int]
) -> None:
    """average ← average + share · (weight − average), rounded up or down to 16 bits at random.

    Up is the likelier the nearer it is, so that the mean over all outcomes is the exact result.
    What 16 bits can hold stays as it is. Sums are formed in float32.

    Args:
        groups: weights, followed by lists of their averages, for each dtype and device.
        shares: in (0, 1], for each list of averages. 1 copies, to the nearest.
        seeds: for each list of averages.
    """
    for number, (weight, *averages) in enumerate(_rows(groups)):
        for average, share, seed in zip(averages, shares, seeds, strict=True):
            if share == 1:
                average.copy_(weight)
                continue
            generator = _generator(average, seed, number)
            for part, toward in cut_alike((average, weight), _PIECE):
                _put(part, _wide(part, part).lerp(_wide(toward, part), share), generator)


@torch.no_grad()
def put_average_at_random(
    groups: Iterable[list[list[Tensor]]], shares: Sequence[float], seed: int
) -> None:
    """average ← what some tensors give by the recurrence, rounded once to 16 bits at random.

    Args:
        groups: averages, followed by lists of these tensors, for each dtype and device.
        shares: for each list of them, the first of which is 1.
    """
    for number, row in enumerate(_rows(groups)):
        generator = _generator(row[0], seed, number)
        for average, first, *others in cut_alike(row, _PIECE):
            exact = _wide(first, average)
            for other, share in zip(others, shares[1:], strict=True):
                exact = exact.lerp(_wide(other, average), share)
            _put(average, exact, generator)


def rounded_at_random(exact: Tensor, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Return numbers of the dtype beside those of a float32 tensor, which they are in the mean."""
    lost = _LOST_BITS[dtype]
    noise = torch.randint(
        1 << lost, exact.shape, generator=generator, dtype=torch.int32, device=exact.device
    )
    # A float is its magnitude and a sign: bits that are added and cut off round it up or down.
    rounded = ((exact.view(torch.int32) + noise) & -(1 << lost)).view(torch.float32)
    if dtype == torch.float16:
        part = noise / (1 << lost)
        subnormal = (exact.abs() / _DISTANCE + part).floor() * _DISTANCE
        rounded = torch.where(exact.abs() < _SUBNORMAL, subnormal.copysign(exact), rounded)
    return torch.where(exact.isfinite(), rounded, exact).to(dtype)


def seed_of(name: str, n_averaged: int) -> int:
    """Return a seed for an update, the same on all ranks and when a run is resumed."""
    return zlib.crc32(name.encode()) * 2**31 + n_averaged % 2**31


def _rows(groups: Iterable[list[list[Tensor]]]) -> Iterator[tuple[Tensor, ...]]:
    return (row for group in groups for row in zip(*group, strict=True))


def _generator(tensor: Tensor, seed: int, number: int) -> torch.Generator:
    # One for each tensor: of what is sharded unevenly ranks draw unlike many numbers, which must
    # not make them round otherwise what they all hold.
    return torch.Generator(tensor.device).manual_seed((seed + number * _APART) % 2**63)


def _wide(tensor: Tensor, average: Tensor) -> Tensor:
    """Return a tensor as sums are formed for this average, of at least 32 bits."""
    return tensor.to(average.device, torch.promote_types(average.dtype, torch.float32))


def _put(average: Tensor, exact: Tensor, generator: torch.Generator) -> None:
    is_rounded = average.dtype in _LOST_BITS  # but for complex ones, kept in 64 bits
    average.copy_(rounded_at_random(exact, average.dtype, generator) if is_rounded else exact)
