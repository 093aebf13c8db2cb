"""Copies of weights that torch computes with, invalidated when a swap changes the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from averaging_optim._averages.sharding import forget_gathered, sharding_of


@contextmanager
def caches_invalidated(weights: Iterable[Tensor]) -> Iterator[None]:
    """Drop the copies of these weights on entering and on leaving."""
    sharded = [weight for weight in weights if sharding_of(weight) is not None]
    _drop_copies(sharded)
    try:
        yield
    finally:
        _drop_copies(sharded)


def _drop_copies(sharded: Sequence[Tensor]) -> None:
    # Autocast keeps weights in lower precision until its block is left, and so does
    # `parametrize.cached()` what its parametrizations make of them.
    torch.clear_autocast_cache()
    parametrize._cache.clear()
    if sharded:
        forget_gathered(sharded)
