"""What `describe` says of a rule is what the optimizer averages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.optim import SGD
from training import READING_RULES

from averaging_optim import (
    EMA,
    LAWA,
    SWA,
    AveragingOptimizer,
    Lookahead,
    Rule,
    SwitchEMA,
    describe,
)


def kept_of_each_step(rule: Rule, steps: int) -> list[float]:
    """Return the averages of weights of which each is 1 after one step and 0 after the others."""
    weight = nn.Parameter(torch.zeros(steps, dtype=torch.float64))
    optimizer = AveragingOptimizer(SGD([weight], lr=1.0), {"one": rule})
    for step in range(steps):
        with torch.no_grad():
            weight.zero_()[step] = 1
        optimizer.step()
    kept: list[float] = optimizer.state[weight]["averaged_one"].tolist()
    return kept


@given(rule=READING_RULES, steps=st.integers(1, 30))
def test_the_shares_are_those_that_the_optimizer_averages_with(rule: Rule, steps: int) -> None:
    # Up to thirty updates in float64.
    expected = pytest.approx(kept_of_each_step(rule, steps), abs=1e-13)
    assert list(describe(rule, steps).shares) == expected


@pytest.mark.parametrize(
    "rule",
    [SWA(start=3, every=4), EMA(0.7, start=2, every=3), LAWA(k=3, start=1, every=4)],
    ids=repr,
)
def test_steps_that_are_not_averaged_have_no_share(rule: Rule) -> None:
    shares = describe(rule, 20).shares
    assert list(shares) == pytest.approx(kept_of_each_step(rule, 20), abs=1e-14)
    due = list(filter(rule.is_due, range(1, 21)))
    due = due[-rule.k :] if isinstance(rule, LAWA) else due
    assert [step for step, share in enumerate(shares, 1) if share] == due


@given(rule=READING_RULES, steps=st.integers(1, 200))
def test_shares_sum_to_1_and_half_of_them_lie_in_the_half_life(rule: Rule, steps: int) -> None:
    profile = describe(rule, steps)
    assert math.fsum(profile.shares) == pytest.approx(1, abs=1e-12)
    latest = profile.shares[steps - 1 - profile.half_life :]
    # Half an even number of equal shares is half of them all but for rounding.
    assert math.fsum(latest) >= 0.5 - 1e-8
    assert math.fsum(latest[1:]) < 0.5


def test_window_and_half_life_are_their_closed_forms() -> None:
    ema, swa = describe(EMA(0.99), 5000), describe(SWA(), 101)
    assert ema.mean_age == pytest.approx(99)
    assert ema.half_life == math.ceil(math.log(0.5) / math.log(0.99)) - 1
    assert swa.mean_age == pytest.approx(50)
    assert swa.half_life == 50
    assert describe(SWA(), 66).half_life == 32
    # A tenth of the updates for the same half-life: the window is the same but for an interval.
    every_tenth = describe(EMA.from_half_life(steps=69, every=10), 5000)
    assert every_tenth.mean_age == pytest.approx(
        describe(EMA.from_half_life(69), 5000).mean_age, abs=5
    )


@pytest.mark.parametrize(
    ("rule", "steps", "error", "message"),
    [
        (0.9, 10, TypeError, r"`rule` must be a Rule, got 0\.9\."),
        (
            EMA(every=None),
            10,
            ValueError,
            r"`rule` must have an `every` that is not None, got EMA\(",
        ),
        (EMA(start=5, every=3), 7, ValueError, r"`steps` must be at least 8, got 7\."),
        (Lookahead(), 10, ValueError, r"`rule` must not write into the weights, got "),
        (SwitchEMA(every=9), 9, ValueError, r"`rule` must not write into the weights"),
        (EMA(), 1.5, TypeError, r"`steps` must be an integer, got 1\.5\."),
    ],
)
def test_what_has_no_profile_is_refused(
    rule: Any, steps: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        describe(rule, steps)
