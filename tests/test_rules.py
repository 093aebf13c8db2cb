"""The formulas, their intervals, and when a rule is due. No torch here."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from averaging_optim import EMA, SWA, T_ADEMA, Rule

UNIT = st.floats(0, 1)
COUNTS = st.integers(1, 10**9)


class Constant(Rule):
    """A rule as a user writes it: no dataclass, only `weight`."""

    def weight(self, n_averaged: int) -> float:
        return 0.25


@given(decay=UNIT, n=COUNTS)
def test_ema_gives_the_present_weights_what_the_decay_leaves(decay: float, n: int) -> None:
    assert EMA(decay).weight(n) == 1 - decay


@given(n=st.integers(0, 10**9))
def test_swa_gives_every_update_the_same_share(n: int) -> None:
    assert SWA().weight(n) == 1 / (n + 1)


@given(alpha=UNIT, timescale=st.floats(1e-3, 1e6), n=COUNTS)
def test_t_adema_is_one_minus_alpha_tanh(alpha: float, timescale: float, n: int) -> None:
    assert T_ADEMA(alpha, timescale).weight(n) == 1 - alpha * math.tanh(n / timescale)


@pytest.mark.parametrize("n", [4, 5, 100])
def test_t_adema_of_timescale_1_is_ema_from_the_fourth_update(n: int) -> None:
    # 1 − tanh(4) is 7e-4, and falls from there.
    assert T_ADEMA(alpha=0.9).weight(n) == pytest.approx(EMA(decay=0.9).weight(n), abs=1e-3)


@pytest.mark.parametrize("rule", [EMA(), SWA(), T_ADEMA()], ids=repr)
def test_the_first_update_takes_all_of_the_weights(rule: Rule) -> None:
    assert rule.weight(0) == 1.0


@given(
    rule=st.one_of(
        st.builds(EMA, UNIT), st.just(SWA()), st.builds(T_ADEMA, UNIT, st.floats(1e-3, 1e6))
    ),
    n=st.integers(0, 10**12),
)
def test_every_share_lies_in_the_unit_interval(rule: Rule, n: int) -> None:
    assert 0 <= rule.weight(n) <= 1


@pytest.mark.parametrize(
    ("rule", "steps"),
    [
        (SWA(), [1, 2, 3, 4, 5, 6, 7, 8, 9]),
        (SWA(start=6), [7, 8, 9]),
        (SWA(every=3), [3, 6, 9]),
        (SWA(start=2, every=3), [5, 8]),
        (SWA(every=None), []),
        (Constant(start=7), [8, 9]),
    ],
    ids=repr,
)
def test_a_rule_is_due_after_start_plus_multiples_of_every(rule: Rule, steps: list[int]) -> None:
    assert [step for step in range(1, 10) if rule.is_due(step)] == steps


def test_rules_compare_by_their_arguments() -> None:
    rule: Rule = EMA(0.9)
    assert rule == EMA(decay=0.9, start=0, every=1)
    assert rule not in [EMA(0.8), EMA(0.9, start=1), EMA(0.9, every=2), T_ADEMA(0.9)]


def test_rules_are_frozen() -> None:
    rule: Any = EMA()
    with pytest.raises(FrozenInstanceError):
        rule.decay = 0.5


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (EMA, {"decay": 1.2}, r"`decay` must be in \[0, 1\], got 1\.2\."),
        (EMA, {"decay": -0.1}, r"`decay` must be in \[0, 1\], got -0\.1\."),
        (EMA, {"decay": math.nan}, r"`decay` must be in \[0, 1\], got nan\."),
        (T_ADEMA, {"alpha": 2}, r"`alpha` must be in \[0, 1\], got 2\."),
        (T_ADEMA, {"alpha": math.nan}, r"`alpha` must be in \[0, 1\], got nan\."),
        (T_ADEMA, {"timescale": 0}, r"`timescale` must be in \(0, ∞\), got 0\."),
        (T_ADEMA, {"timescale": math.inf}, r"`timescale` must be in \(0, ∞\), got inf\."),
        (T_ADEMA, {"timescale": math.nan}, r"`timescale` must be in \(0, ∞\), got nan\."),
        (SWA, {"start": -1}, r"`start` must be at least 0, got -1\."),
        (SWA, {"every": 0}, r"`every` must be at least 1, got 0\."),
    ],
)
def test_values_outside_an_interval_are_refused(
    rule: type[Rule], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rule(**arguments)


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (EMA, {"decay": "0.9"}, r"`decay` must be a number in \[0, 1\], got '0\.9'\."),
        (EMA, {"decay": True}, r"`decay` must be a number in \[0, 1\], got True\."),
        (T_ADEMA, {"timescale": None}, r"`timescale` must be a number in \(0, ∞\), got None\."),
        (SWA, {"start": 1.5}, r"`start` must be an integer, got 1\.5\."),
        (SWA, {"start": None}, r"`start` must be an integer, got None\."),
        (SWA, {"every": True}, r"`every` must be an integer, got True\."),
    ],
)
def test_arguments_of_another_type_are_refused(
    rule: type[Rule], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        rule(**arguments)
