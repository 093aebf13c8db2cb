"""How much of the present weights goes into an average: one formula for each rule."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import KW_ONLY, dataclass
from numbers import Integral, Real


@dataclass(frozen=True)
class Rule(ABC):
    """When to average, and the share of the present weights in each average.

    average ← average + wₙ · (weights − average),    wₙ = weight(n)

    n is the number of updates averaged so far. The first update, n = 0, copies the
    weights whatever `weight` says, for there is nothing yet to average them with.

    A subclass needs `weight` alone. Rules are values: frozen, compared by their
    arguments, free of state (the counts are kept by the optimizer).

    Args:
        start: optimizer steps to let pass before averaging, at least 0.
        every: optimizer steps from one update to the next, at least 1: the rule
            averages after steps start + every, start + 2·every, … None leaves it to
            `AveragingOptimizer.update_averages`. A decay counts updates, not steps.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is too small.

    Example:
        >>> class Half(Rule):
        ...     def weight(self, n_averaged):
        ...         return 0.5
        >>> Half(start=100).weight(n_averaged=3)
        0.5
    """

    _: KW_ONLY
    start: int = 0
    every: int | None = 1

    def __post_init__(self) -> None:
        check_integer("start", self.start, at_least=0)
        if self.every is not None:
            check_integer("every", self.every, at_least=1)

    @abstractmethod
    def weight(self, n_averaged: int) -> float:
        """Return the share in [0, 1] that the present weights get.

        Args:
            n_averaged: updates averaged so far, at least 0.
        """

    def is_due(self, step: int) -> bool:
        """Return whether to average after this optimizer step, the first being 1."""
        if self.every is None or step <= self.start:
            return False
        return (step - self.start) % self.every == 0


@dataclass(frozen=True)
class EMA(Rule):
    """Exponential moving average: a constant share.

    wₙ = 1 − decay,    w₀ = 1

    The average looks back over some 1 / (1 − decay) updates. It starts at the first
    weights it sees, as in `torch.optim.swa_utils.get_ema_multi_avg_fn`.

    Args:
        decay: the share of the old average, in [0, 1]. 0 gives the present weights,
            1 the first.
        start, every: see `Rule`.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its interval.

    Source: Polyak, Juditsky: Acceleration of stochastic approximation by averaging,
    SIAM J. Control Optim. 30(4), 1992, for averaging; the exponential window is
    signal processing's.

    Example:
        >>> EMA(decay=0.75).weight(n_averaged=7)
        0.25
    """

    decay: float = 0.999

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("decay", self.decay, "[0, 1]")

    def weight(self, n_averaged: int) -> float:
        return 1.0 - self.decay if n_averaged > 0 else 1.0


@dataclass(frozen=True)
class SWA(Rule):
    """Stochastic weight averaging: the arithmetic mean of all weights seen.

    wₙ = 1 / (n + 1)

    The mean remembers the first weights as well as the last, so it is started late
    (`start`), when training moves around an optimum rather than toward it.

    Args:
        start, every: see `Rule`.

    Source: Izmailov, Podoprikhin, Garipov, Vetrov, Wilson: Averaging Weights Leads to
    Wider Optima and Better Generalization, UAI 2018, arXiv 1803.05407.

    Example:
        >>> SWA(start=1000, every=10).weight(n_averaged=3)
        0.25
    """

    def weight(self, n_averaged: int) -> float:
        return 1.0 / (n_averaged + 1)


@dataclass(frozen=True)
class T_ADEMA(Rule):
    """Exponential moving average whose decay rises along a tanh.

    wₙ = 1 − alpha · tanh(n / timescale)

    n counts updates, once for the whole model. With `timescale=1` the ramp is over
    after about four updates, and the rule is `EMA(decay=alpha)` from there on. The
    paper speaks of a tanh with a variable coefficient; `timescale` is that
    coefficient, and stretches the ramp.

    Args:
        alpha: the decay reached in the end, in [0, 1].
        timescale: updates after which the decay is alpha · tanh(1) ≈ 0.76 · alpha,
            in (0, ∞).
        start, every: see `Rule`.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its interval.

    Source: Yang, Zhu, Sun, Yang: Research on Image Classification Algorithm Based on
    Dynamic Decay EMA, J. Chinese Computer Systems 41(7), 2020, 1524-1529.

    Example:
        >>> rule = T_ADEMA(alpha=0.9, timescale=10)
        >>> [round(rule.weight(n), 3) for n in (0, 5, 10, 20, 40)]
        [1.0, 0.584, 0.315, 0.132, 0.101]
    """

    alpha: float = 0.9
    timescale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("alpha", self.alpha, "[0, 1]")
        check_real("timescale", self.timescale, "(0, ∞)")

    def weight(self, n_averaged: int) -> float:
        return 1.0 - self.alpha * math.tanh(n_averaged / self.timescale)


def check_integer(argument: str, value: object, at_least: int) -> None:
    """Raise unless the value is an integer (no bool) that is large enough, and fits 64 bits."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"`{argument}` must be an integer, got {value!r}.")
    if value < at_least:
        raise ValueError(f"`{argument}` must be at least {at_least}, got {value}.")
    if int(value) >= 2**63:
        raise ValueError(f"`{argument}` must be less than 2**63, got {value}.")


def check_real(argument: str, value: object, interval: str) -> None:
    """Raise unless the value is a number in the interval: "[0, 1]" or "(0, ∞)"."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"`{argument}` must be a number in {interval}, got {value!r}.")
    number = float(value)
    inside = 0 <= number <= 1 if interval == "[0, 1]" else 0 < number < math.inf
    if not inside:
        raise ValueError(f"`{argument}` must be in {interval}, got {value}.")
