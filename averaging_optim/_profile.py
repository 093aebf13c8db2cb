"""What an average consists of: the share of each past step, as numbers to plot."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from averaging_optim._checks import check_integer
from averaging_optim._rules import Rule


@dataclass(frozen=True)
class Profile:
    """What a rule's average consists of after a number of steps.

    Attributes:
        shares: the share of the weights after each step, first step first. They sum to 1. The first
            one shows how much an EMA still holds of the weights it began with.
        mean_age: how many steps back the averaged weights are, on average. 0 is the present.
        half_life: the smallest number of steps back that covers half of the average.
    """

    shares: tuple[float, ...]
    mean_age: float
    half_life: int


def describe(rule: Rule, steps: int) -> Profile:
    """Return what a rule's average consists of after a number of optimizer steps.

    Example:
        >>> from averaging_optim import EMA, describe
        >>> describe(EMA(decay=0.5), steps=4)
        Profile(shares=(0.125, 0.125, 0.25, 0.5), mean_age=0.875, half_life=0)

    The weights after update i of n have the share wᵢ · (1 − wᵢ₊₁) · … · (1 − wₙ).

    Args:
        rule: a rule with an interval (`every` is not None) that doesn't write into the weights.
        steps: at least `start + every`, when the average begins.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: `steps` is too small, or the rule has `every=None` or writes into the weights.
    """
    if not isinstance(rule, Rule):
        raise TypeError(f"`rule` must be a Rule, got {rule!r}.")
    if rule.every is None:
        raise ValueError(f"`rule` must have an `every` that is not None, got {rule!r}.")
    check_integer("steps", steps, at_least=rule.start + rule.every)
    if any(map(rule.writes_back, range(1, steps + 2))):
        raise ValueError(f"`rule` must not write into the weights, got {rule!r}.")
    by_age = _shares_by_age(rule, steps)
    half = 0.5 - 1e-9  # so that rounding does not decide about an even number of equal shares
    return Profile(
        shares=tuple(reversed(by_age)),
        mean_age=sum(age * share for age, share in enumerate(by_age)),
        half_life=next(age for age, sum_ in enumerate(accumulate(by_age)) if sum_ >= half),
    )


def _shares_by_age(rule: Rule, steps: int) -> list[float]:
    n = sum(map(rule.is_due, range(1, steps + 1)))
    if rule.snapshots:
        n = min(n, rule.snapshots + 1)
    shares, left = [], 1.0
    for step in range(steps, 0, -1):
        share = 0.0
        if rule.is_due(step):
            n -= 1
            share = rule.weight(n) if n > 0 else 1.0
        shares.append(left * share)
        left *= 1.0 - share
    return shares
