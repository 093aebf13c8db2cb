"""Averages of 16 bits that are rounded at random, and so move in the mean as exact ones do."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from averaging_optim._averages.moving import cut_alike

# Low bits of a float32 that the dtype has no place for, of numbers that are not subnormal.
_LOST_BITS = {torch.bfloat16: 16, torch.float16: 13}

# The largest number below which those of float16 lie at equal distances, and that distance.
_SUBNORMAL, _DISTANCE = 2.0**-14, 2.0**-24

_PIECE = 2**20


@torch.no_grad()
def move_toward_at_random(
    groups: Iterable[list[list[Tensor]]], shares: Sequence[float], seeds: Sequence[int]
) -> None:
    """average ← average + share · (weight − average), rounded up or down to 16 bits at random.

    Up is the likelier the nearer it is, so that the mean over all outcomes is the exact result.
    What 16 bits can hold stays as it is. Sums are formed in float32.

    Args:
        groups: weights, followed by lists of their averages, for each dtype and device.
        shares: in (0, 1], for each list of averages. 1 copies.
        seeds: for each list of averages.
    """
    for number, (weights, *averages) in enumerate(groups):
        for kept, share, seed in zip(averages, shares, seeds, strict=True):
            generator = torch.Generator(kept[0].device).manual_seed(seed + number)
            pairs = zip(kept, weights, strict=True)
            for average, weight in itertools.chain(*(cut_alike(pair, _PIECE) for pair in pairs)):
                if share == 1 or average.dtype not in _LOST_BITS:
                    average.lerp_(weight.to(average), share)
                else:
                    there = weight.to(average.device, torch.float32)
                    exact = average.float().lerp_(there, share)
                    average.copy_(rounded_at_random(exact, average.dtype, generator))


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
