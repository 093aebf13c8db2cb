"""Weights that are constrained after each step, and averages that obey the constraint."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer, RMSprop
from training import loss_of_batch, same, small_model, values

from averaging_optim import EMA, SWA, T_ADEMA, AveragingOptimizer, Rule

BOUND = 0.01


def clipped(weight: Tensor) -> Tensor:
    """As WGAN clips the weights of its critic."""
    return weight.clamp(-BOUND, BOUND)


def within_max_norm(weight: Tensor) -> Tensor:
    return weight.renorm(2, 0, BOUND) if weight.ndim > 1 else clipped(weight)


def above_a_bound(weight: Tensor) -> Tensor:
    """As Gaussian processes keep their noise from being negative."""
    return weight.clamp(min=BOUND)


CONSTRAINTS = [clipped, within_max_norm, above_a_bound]


def constrain(model: nn.Module, constraint: Callable[[Tensor], Tensor]) -> None:
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(constraint(weight))


def train(
    model: nn.Module, optimizer: Optimizer, after_step: Callable[[], None]
) -> list[list[Tensor]]:
    snapshots = []
    for step in range(6):
        optimizer.zero_grad()
        loss_of_batch(model, step).backward()
        optimizer.step()
        after_step()
        snapshots.append(values(model.parameters()))
    return snapshots


@pytest.mark.parametrize("rule", [EMA(0.9), SWA(), T_ADEMA(0.9)], ids=repr)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("kind", [SGD, Adam, RMSprop])
def test_a_post_hook_of_the_wrapped_step_constrains_what_is_averaged(
    kind: Callable[..., Optimizer], constraint: Callable[[Tensor], Tensor], rule: Rule
) -> None:
    model, bare_model = small_model(), small_model()
    wrapped, bare = kind(model.parameters(), lr=0.1), kind(bare_model.parameters(), lr=0.1)
    wrapped.register_step_post_hook(lambda *_: constrain(model, constraint))
    snapshots = train(model, optimizer := AveragingOptimizer(wrapped, rule), lambda: None)
    expected = train(bare_model, bare, lambda: constrain(bare_model, constraint))
    assert all(map(same, snapshots, expected))
    with optimizer.swap_to_averaged():
        for average in model.parameters():
            # An average is rounded: it may leave the set by an ulp of the bound.
            torch.testing.assert_close(average, constraint(average), rtol=1e-6, atol=0)


@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_averages_updated_after_a_constraint_are_those_of_the_hook(
    constraint: Callable[[Tensor], Tensor],
) -> None:
    model, other = small_model(), small_model()
    hooked = SGD(model.parameters(), lr=0.1)
    hooked.register_step_post_hook(lambda *_: constrain(model, constraint))
    inside = AveragingOptimizer(hooked, EMA(0.9))
    after = AveragingOptimizer(SGD(other.parameters(), lr=0.1), EMA(0.9, every=None))

    def constrain_and_average() -> None:
        constrain(other, constraint)
        after.update_averages()

    train(model, inside, lambda: None)
    train(other, after, constrain_and_average)
    assert same(
        inside.averaged_state_dict(model).values(), after.averaged_state_dict(other).values()
    )
