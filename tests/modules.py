"""A model of which a part is averaged, what models are wrapped in, and what happens to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from training import averaging_sgd

from averaging_optim import EMA, AveragingOptimizer


class Adapted(nn.Module):
    """A frozen layer with a low-rank update that is trained."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(3, 2).requires_grad_(False)
        self.down, self.up = nn.Linear(3, 1, bias=False), nn.Linear(1, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.base(x) + self.up(self.down(x))
        return result


def with_frozen_base() -> tuple[nn.Module, AveragingOptimizer]:
    model = Adapted()
    return model, averaging_sgd(model, EMA(0.9))


def in_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(model)


def compiled(model: nn.Module) -> Any:
    return torch.compile(model, backend="eager")


def compiled_in_ddp(model: nn.Module) -> nn.Module:
    return DistributedDataParallel(compiled(model))


def cast_down(model: nn.Module) -> None:
    model.half()


def give_other_memory(model: nn.Module) -> None:
    for weight in model.parameters():
        weight.data = weight.data.clone()
