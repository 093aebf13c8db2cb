"""The formulas, their intervals, and when a rule is due."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from training import EVERY_RULE, UNIT

from averaging_optim import (
    EMA,
    LAWA,
    SWA,
    T_ADEMA,
    ExponentialRamp,
    Formula,
    HalfLifeFraction,
    Lookahead,
    PolynomialAverage,
    PowerEMA,
    PowerRamp,
    Rule,
    SwitchEMA,
    TFRamp,
)

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


@given(rule=EVERY_RULE, n=st.integers(1, 10**12))
def test_every_share_lies_in_the_unit_interval_and_the_first_is_1(rule: Rule, n: int) -> None:
    assert rule.weight(0) == 1
    assert 0 <= rule.weight(n) <= 1


def unrolled(rule: Rule, n: int) -> list[float]:
    """Return the share of each of n weights in their average, the first one first."""
    weights: list[float] = []
    for i in range(n):
        share = rule.weight(i)
        weights = [(1 - share) * weight for weight in weights] + [share]
    return weights


def mean_age(rule: Rule, n: int) -> float:
    """Return how many updates before the last one the weights in the average are, in the mean."""
    return math.fsum(weight * age for age, weight in enumerate(reversed(unrolled(rule, n))))


@given(rule=EVERY_RULE, n=st.integers(1, 60))
def test_unrolled_shares_sum_to_1(rule: Rule, n: int) -> None:
    # 60 updates with a few roundings of numbers below 1.
    assert math.fsum(unrolled(rule, n)) == pytest.approx(1, abs=1e-13)


@given(decay=st.floats(0.01, 0.999), n=st.integers(1, 60))
def test_the_debiased_ema_is_adams(decay: float, n: int) -> None:
    """Its weights are decayᵃᵍᵉ over their sum."""
    powers = [decay**age for age in reversed(range(n))]
    expected = [power / math.fsum(powers) for power in powers]
    assert unrolled(EMA(decay, debias=True), n) == pytest.approx(expected, rel=1e-9)


def test_a_debiased_ema_of_decay_1_is_swa() -> None:
    assert [EMA(1, debias=True).weight(n) for n in range(9)] == [SWA().weight(n) for n in range(9)]


@given(decay=UNIT, n=COUNTS)
def test_a_warmup_is_followed_while_its_share_is_the_larger_one(decay: float, n: int) -> None:
    """Others take the smaller decay: (1 + n) / (10 + n) in TensorFlow, 1 − (1 + n/γ)^−p in timm."""
    tensorflow = 1 - min(decay, (1 + n) / (10 + n))
    assert EMA(decay, warmup=TFRamp()).weight(n) == pytest.approx(tensorflow, abs=1e-15)
    timm = 1 - min(decay, 1 - (1 + n / 2) ** -0.75)
    assert EMA(decay, warmup=PowerRamp(2, 0.75)).weight(n) == pytest.approx(timm, abs=1e-15)


@given(steps=st.floats(1, 1e6), every=st.integers(1, 1000))
def test_weights_count_half_as_much_after_a_half_life_of_steps(steps: float, every: int) -> None:
    rule = EMA.from_half_life(steps, every, start=7, debias=True, warmup=SWA())
    assert rule.decay ** (steps / every) == pytest.approx(0.5)
    assert rule == EMA(rule.decay, every=every, start=7, debias=True, warmup=SWA())


@given(decay=UNIT, factor=st.floats(0.01, 100))
def test_a_scaled_ema_takes_a_batch_for_so_many(decay: float, factor: float) -> None:
    rule = EMA(decay, debias=True, every=3).scaled(factor)
    assert rule == EMA(decay**factor, debias=True, every=3)


@given(decay=UNIT, tau=st.floats(1, 1e5), n=COUNTS)
def test_the_exponential_ramp_is_that_of_yolo(decay: float, tau: float, n: int) -> None:
    """ModelEMA counts updates from 1, beginning at the initial weights."""
    yolo = decay * (1 - math.exp(-n / tau))
    assert ExponentialRamp(decay, tau).weight(n) == pytest.approx(1 - yolo, abs=1e-15)


def test_a_power_ramp_of_power_1_is_swa() -> None:
    shares = [PowerRamp(power=1).weight(n) for n in range(9)]
    assert shares == [SWA().weight(n) for n in range(9)]


N = 2000
AGES = [
    pytest.param(EMA(0.99), 99 * (1 - 0.99 ** (N - 1)), id="ema"),
    pytest.param(EMA(0.99, debias=True), 99 - N * 0.99**N / (1 - 0.99**N), id="debiased"),
    pytest.param(SWA(), (N - 1) / 2, id="swa"),
    pytest.param(T_ADEMA(0.99), 99 * (1 - 0.99 ** (N - 4)), id="t_adema"),
    pytest.param(PolynomialAverage(8), (N - 1) / 10, id="polynomial"),
    pytest.param(PolynomialAverage(2.5), (N - 1) / 4.5, id="polynomial_2.5"),
    pytest.param(PowerEMA(6.94), sum((i / N) ** 7.94 for i in range(1, N)), id="power"),
    pytest.param(EMA(0.99, warmup=TFRamp()), 99, id="tf_ramp"),
    pytest.param(EMA(0.99, warmup=PowerRamp()), 99, id="power_ramp"),
]


@pytest.mark.parametrize(("rule", "expected"), AGES)
def test_the_mean_age_of_an_average_is_its_closed_form(rule: Rule, expected: float) -> None:
    # T_ADEMA and warm-ups differ by their first updates, which two thousand later hardly count.
    assert mean_age(rule, N) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("fraction", [0.02, 0.05, 0.2])
def test_the_half_life_fraction_is_a_power_of_time(fraction: float) -> None:
    """Products of 2^(−1/(f i)) over i … n are (i / n)^(ln 2 / f), up to parts in 1/n."""
    expected = N / (1 + math.log(2) / fraction)
    assert mean_age(HalfLifeFraction(fraction), N) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize(("sigma_rel", "gamma"), [(0.05, 16.97), (0.10, 6.94)])
def test_power_emas_have_the_exponents_that_edm2_gives(sigma_rel: float, gamma: float) -> None:
    assert PowerEMA.from_width(sigma_rel).gamma == pytest.approx(gamma, abs=5e-3)


@given(sigma_rel=st.floats(0.005, 0.2886))
def test_the_width_of_a_power_ema_is_the_one_asked_for(sigma_rel: float) -> None:
    gamma = PowerEMA.from_width(sigma_rel).gamma
    width = math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))
    assert width == pytest.approx(sigma_rel, rel=1e-9)


@pytest.mark.parametrize("every", [1, 10])
def test_the_spread_of_times_in_a_power_ema_is_its_width_whatever_the_interval(every: int) -> None:
    """Peers that do not rescale the decay for the interval are off by factors here."""
    rule = PowerEMA.from_width(0.05, every=every)
    n = N // every
    times = [every * i / N for i in range(1, n + 1)]
    weights = unrolled(rule, n)
    mean = math.fsum(w * t for w, t in zip(weights, times, strict=True))
    variance = math.fsum(w * (t - mean) ** 2 for w, t in zip(weights, times, strict=True))
    # An interval of a hundredth of the run adds a twelfth of its square to the variance.
    assert math.sqrt(variance) == pytest.approx(0.05, rel=2e-2)


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
        (LAWA, {"k": 1}, r"`k` must be at least 2, got 1\."),
        (Lookahead, {"alpha": 1.5}, r"`alpha` must be in \[0, 1\], got 1\.5\."),
        (Lookahead, {"every": 0}, r"`every` must be at least 1, got 0\."),
        (SwitchEMA, {"decay": -1, "every": 2}, r"`decay` must be in \[0, 1\], got -1\."),
        (SwitchEMA, {"every": 0}, r"`every` must be at least 1, got 0\."),
        (EMA.from_half_life, {"steps": 0}, r"`steps` must be in \(0, ∞\), got 0\."),
        (EMA().scaled, {"batch_factor": -1}, r"`batch_factor` must be in \(0, ∞\), got -1\."),
        (ExponentialRamp, {"decay": 1.5}, r"`decay` must be in \[0, 1\], got 1\.5\."),
        (ExponentialRamp, {"tau": 0}, r"`tau` must be in \(0, ∞\), got 0\."),
        (PolynomialAverage, {"eta": -1}, r"`eta` must be in \[0, ∞\), got -1\."),
        (PolynomialAverage, {"eta": math.inf}, r"`eta` must be in \[0, ∞\), got inf\."),
        (PowerEMA, {"gamma": -0.5}, r"`gamma` must be in \[0, ∞\), got -0\.5\."),
        (PowerEMA.from_width, {"sigma_rel": 0}, r"`sigma_rel` must be in \(0, 0\.2886\], got 0"),
        (PowerEMA.from_width, {"sigma_rel": 0.29}, r"`sigma_rel` must be in .*, got 0\.29\."),
        (HalfLifeFraction, {"fraction": 0}, r"`fraction` must be in \(0, 1\], got 0\."),
        (PowerRamp, {"gamma": 0}, r"`gamma` must be in \(0, ∞\), got 0\."),
        (PowerRamp, {"power": 2}, r"`power` must be in \(0, 1\], got 2\."),
        (SWA, {"start": 2**63}, r"`start` must be less than 2\*\*63, got 9223372036854775808\."),
        (SWA, {"start": -1}, r"`start` must be at least 0, got -1\."),
        (SWA, {"every": 0}, r"`every` must be at least 1, got 0\."),
    ],
)
def test_values_outside_an_interval_are_refused(
    rule: Callable[..., Rule], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        rule(**arguments)


@pytest.mark.parametrize(
    ("rule", "arguments", "message"),
    [
        (EMA, {"decay": "0.9"}, r"`decay` must be a number in \[0, 1\], got '0\.9'\."),
        (EMA, {"decay": True}, r"`decay` must be a number in \[0, 1\], got True\."),
        (T_ADEMA, {"timescale": None}, r"`timescale` must be a number in \(0, ∞\), got None\."),
        (EMA, {"debias": 1}, r"`debias` must be True or False, got 1\."),
        (EMA, {"warmup": 10}, r"`warmup` must be a Rule or None, got 10\."),
        (EMA.from_half_life, {"steps": 9, "every": None}, r"`every` must be an integer, got None"),
        (Formula, {"function": 0.5}, r"`function` must be callable, got 0\.5\."),
        (SwitchEMA, {"every": 0.5}, r"`every` must be an integer, got 0\.5\."),
        (ExponentialRamp, {"tau": "x"}, r"`tau` must be a number in \(0, ∞\), got 'x'\."),
        (SwitchEMA, {}, r"missing 1 required keyword-only argument: 'every'"),
        (LAWA, {"k": 2.5}, r"`k` must be an integer, got 2\.5\."),
        (SWA, {"start": 1.5}, r"`start` must be an integer, got 1\.5\."),
        (SWA, {"start": None}, r"`start` must be an integer, got None\."),
        (SWA, {"every": True}, r"`every` must be an integer, got True\."),
    ],
)
def test_arguments_of_another_type_are_refused(
    rule: Callable[..., Rule], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        rule(**arguments)
