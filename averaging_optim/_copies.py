"""Copies of weights that torch computes with, to be made anew when a swap changes the weights."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from averaging_optim._tensors import layout_of


@contextmanager
def made_anew(weights: Iterable[Tensor]) -> Iterator[None]:
    """Drop the copies of these weights on entering and on leaving."""
    sharded = any(layout_of(weight) is not None for weight in weights)
    _drop_copies(sharded)
    try:
        yield
    finally:
        _drop_copies(sharded)


def _drop_copies(sharded: bool) -> None:
    # Autocast keeps weights in lower precision until its block is left.
    torch.clear_autocast_cache()
    if sharded:
        _reshard()


def _reshard() -> None:
    """Let FSDP gather its weights again: after a forward alone, the root keeps them gathered."""
    # Imported here, as few programs need it and it takes half a second.
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    # A sharded weight does not know its module; this is torch's own list of those there are.
    for module in [each for each in _module_state_mapping if isinstance(each, FSDPModule)]:
        module.reshard()
