"""What must be the same when a library trains with a plain optimizer and with a wrapped one."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from training import everything, recurrence, same, values, weights_of

from averaging_optim import EMA, AveragingOptimizer

RULE = EMA(0.9)
T = TypeVar("T")


@dataclass
class Run:
    """What is left when a library has trained.

    Attributes:
        model: what it has trained.
        optimizer: where a user finds it afterwards.
        evaluate: what the library makes of the present weights.
    """

    model: Any
    optimizer: Any
    evaluate: Callable[[], Tensor]


# What makes an optimizer of the one that a library would train with.
Wrap = Callable[[Any], Any]
# Weight → its values after each step.
History = defaultdict[Tensor, list[Tensor]]


def wrapped(optimizer: Optimizer) -> AveragingOptimizer:
    return AveragingOptimizer(optimizer, RULE)


def seeded(train: Callable[..., T], *arguments: Any) -> T:
    """Train with the random numbers of a new process."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    return train(*arguments)


def check_driven(train: Callable[[Wrap], Run], steps: int) -> None:
    """Check a run with an optimizer that is wrapped against one in which it isn't.

    The weights are the same, bit for bit, each step counts, the average is that of the
    weights after each step of the plain run, a swap shows it to the library, and is undone.

    Args:
        train: trains from the start, with what the function it is given makes of the optimizer.
        steps: how many it takes.
    """
    history: History = defaultdict(list)
    plain = seeded(train, lambda optimizer: recording(optimizer, history))
    run = seeded(train, wrapped)
    assert isinstance(run.optimizer, AveragingOptimizer)
    assert same(run.model.state_dict().values(), plain.model.state_dict().values())
    assert max(map(len, history.values())) == run.optimizer.n_averaged() == steps

    averages = [average(weight, history) for weight in weights_of(plain.optimizer)]
    trained = values(run.model.parameters())
    with run.optimizer.swap_to_averaged():
        assert same(weights_of(run.optimizer), averages)
        found = run.evaluate()
    assert same(run.model.parameters(), trained)

    before = plain.evaluate()
    assert torch.equal(run.evaluate(), before)
    overwrite(weights_of(plain.optimizer), averages)
    assert torch.equal(found, plain.evaluate())
    assert not torch.equal(found, before)


def recording(optimizer: Optimizer, history: History) -> Optimizer:
    """Have each weight's value after each step in which it isn't frozen appended to `history`."""

    def record(*_: Any) -> None:
        for weight in weights_of(optimizer):
            if weight.requires_grad:
                history[weight].append(weight.detach().clone())

    optimizer.register_step_post_hook(record)
    return optimizer


def average(weight: Tensor, history: History) -> Tensor:
    """Return the average of a weight's past values, or a weight that was never trained."""
    past = [[value] for value in history.get(weight, [weight])]
    return recurrence(RULE, past)[0].detach().clone()


def check_resumed(resumed: Run, whole: Run) -> None:
    """Check a run that was saved and resumed against one that wasn't interrupted."""
    assert whole.optimizer.n_averaged() > 1
    assert resumed.optimizer.n_averaged() == whole.optimizer.n_averaged()
    assert same(
        everything(resumed.model, resumed.optimizer), everything(whole.model, whole.optimizer)
    )


@torch.no_grad()
def overwrite(weights: list[Tensor], others: list[Tensor]) -> None:
    for weight, other in zip(weights, others, strict=True):
        weight.copy_(other)
