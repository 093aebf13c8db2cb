"""Every learning-rate scheduler of torch drives the wrapper as it drives a bare optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import SGD, Optimizer, lr_scheduler
from torch.optim.lr_scheduler import LRScheduler
from torch.optim.swa_utils import SWALR
from training import as_it_is, loss_of_batch, same, small_model, values

from averaging_optim import EMA, AveragingOptimizer

# The SequentialLR of older torch (2.7) steps its parts in a way that torch has deprecated.
pytestmark = pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning")

STEPS = 12


def scale(epoch: int) -> float:
    return 0.95**epoch


Build = Callable[[Any], Any]
BUILDS: dict[type[Any], Build] = {
    lr_scheduler.ChainedScheduler: lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    lr_scheduler.ConstantLR: lr_scheduler.ConstantLR,
    lr_scheduler.CosineAnnealingLR: lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=5),
    lr_scheduler.CosineAnnealingWarmRestarts: lambda o: lr_scheduler.CosineAnnealingWarmRestarts(
        o, T_0=3, T_mult=2
    ),
    lr_scheduler.CyclicLR: lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.5, step_size_up=3),
    lr_scheduler.ExponentialLR: lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    lr_scheduler.LambdaLR: lambda o: lr_scheduler.LambdaLR(o, scale),
    lr_scheduler.LinearLR: lr_scheduler.LinearLR,
    lr_scheduler.MultiStepLR: lambda o: lr_scheduler.MultiStepLR(o, [3, 7]),
    lr_scheduler.MultiplicativeLR: lambda o: lr_scheduler.MultiplicativeLR(o, scale),
    lr_scheduler.OneCycleLR: lambda o: lr_scheduler.OneCycleLR(o, 0.5, total_steps=STEPS + 1),
    lr_scheduler.PolynomialLR: lambda o: lr_scheduler.PolynomialLR(o, total_iters=9),
    lr_scheduler.ReduceLROnPlateau: lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    lr_scheduler.SequentialLR: lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[4]
    ),
    lr_scheduler.StepLR: lambda o: lr_scheduler.StepLR(o, 3),
    SWALR: lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=4),
}
schedulers = pytest.mark.parametrize(
    "build", BUILDS.values(), ids=[scheduler.__name__ for scheduler in BUILDS]
)


class Training:
    """A model, its optimizer and its scheduler."""

    def __init__(self, wrap: Callable[[Optimizer], Optimizer], build: Build) -> None:
        self.model = small_model()
        self.optimizer = wrap(SGD(self.model.parameters(), lr=0.1, momentum=0.9))
        self.scheduler = build(self.optimizer)

    def step(self, number: int) -> tuple[Any, ...]:
        """Take a step of both, and return the weights, learning rates and momenta."""
        self.optimizer.zero_grad()
        loss_of_batch(self.model, number).backward()
        self.optimizer.step()
        # A loss that gets worse lets ReduceLROnPlateau reduce.
        plateau = isinstance(self.scheduler, lr_scheduler.ReduceLROnPlateau)
        self.scheduler.step(*([float(number)] if plateau else []))
        rates = [(group["lr"], group["momentum"]) for group in self.optimizer.param_groups]
        return values(self.model.parameters()), rates, self.scheduler.get_last_lr()


def averaging(optimizer: Optimizer) -> AveragingOptimizer:
    return AveragingOptimizer(optimizer, EMA(0.9))


def assert_same_step(step: tuple[Any, ...], expected: tuple[Any, ...]) -> None:
    assert same(step[0], expected[0])
    assert step[1:] == expected[1:]


def test_every_scheduler_of_torch_is_there() -> None:
    exported = {
        each
        for name, each in vars(lr_scheduler).items()
        if isinstance(each, type) and issubclass(each, LRScheduler) and not name.startswith("_")
    }
    assert set(BUILDS) == (exported - {LRScheduler}) | {SWALR}


@schedulers
def test_rates_momenta_and_weights_are_those_of_the_bare_optimizer(build: Build) -> None:
    bare, wrapped = Training(as_it_is, build), Training(averaging, build)
    rates = set()
    for number in range(STEPS):
        expected = bare.step(number)
        assert_same_step(wrapped.step(number), expected)
        rates.add(expected[1][0])
    assert len(rates) > 1


@schedulers
def test_resuming_half_way_equals_never_stopping(build: Build) -> None:
    through = Training(averaging, build)
    for number in range(STEPS // 2):
        through.step(number)
    saved = copy.deepcopy(
        [each.state_dict() for each in (through.model, through.optimizer, through.scheduler)]
    )
    resumed = Training(averaging, build)
    for each, state_dict in zip(
        (resumed.model, resumed.optimizer, resumed.scheduler), saved, strict=True
    ):
        each.load_state_dict(state_dict)
    for number in range(STEPS // 2, STEPS):
        assert_same_step(resumed.step(number), through.step(number))
    assert same(
        [entry["averaged_ema"] for entry in resumed.optimizer.state.values()],
        [entry["averaged_ema"] for entry in through.optimizer.state.values()],
    )


def test_a_learning_rate_that_is_a_tensor_is_changed_in_place() -> None:
    model = small_model()
    rate = torch.tensor(0.1)
    optimizer = averaging(SGD(model.parameters(), lr=rate))
    scheduler = lr_scheduler.ExponentialLR(optimizer, 0.5)
    optimizer.step()
    scheduler.step()
    assert rate.item() == pytest.approx(0.05)
    assert optimizer.param_groups[0]["lr"] is rate
