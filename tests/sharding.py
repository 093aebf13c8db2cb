"""Whole tensors of what is sharded, and where sharded weights can be trained at all."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from training import weights_of

from averaging_optim import AveragingOptimizer

# Through gloo, torch 2.6 fails to gather the weights, 2.7 and 2.8 sum the gradients.
trains_with_fsdp = pytest.mark.skipif(
    torch.__version__ < "2.9", reason="FSDP2 averages gradients on CPUs from torch 2.9 on"
)


def whole_averages(optimizer: AveragingOptimizer) -> dict[str, list[Tensor]]:
    """Return the averages of all weights; a frozen weight may be its own."""
    return {
        name: whole(
            optimizer.state.get(weight, {}).get(f"averaged_{name}", weight)
            for weight in weights_of(optimizer)
        )
        for name in optimizer.rules
    }


def whole(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [
        (each.full_tensor() if isinstance(each, DTensor) else each).detach().clone()
        for each in tensors
    ]
