"""Rules: which share the present weights get in an average, one formula for each."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, field, replace

from averaging_optim._checks import check_bool, check_integer, check_real


@dataclass(frozen=True)
class Rule(ABC):
    """When to average, and the share of the present weights in each average.

    average ← average + wₙ · (weights − average),    wₙ = weight(n)

    Example:
        >>> class Half(Rule):
        ...     def weight(self, n_averaged):
        ...         return 0.5
        >>> Half(start=100).weight(n_averaged=3)
        0.5

    n is the number of updates so far. The first update, n = 0, copies the weights whatever `weight`
    returns, as there is nothing yet to average them with.

    A subclass needs only `weight`. Rules are values: they are frozen, compare equal by their
    arguments and have no state, since the optimizer keeps the counts.

    Args:
        start: optimizer steps before averaging begins, at least 0.
        every: optimizer steps from one update to the next, at least 1. Updates come after steps
            start + every, start + 2·every, … With None they come when you call
            `AveragingOptimizer.update_averages`. A decay counts updates, not steps.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is too small.
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
            n_averaged: number of updates so far, at least 0.
        """

    def is_due(self, step: int) -> bool:
        """Return whether an update comes after this optimizer step. The first step is 1.

        A rule may be due at step 0 too, to begin with the weights before training.
        """
        if self.every is None or step <= self.start:
            return False
        return (step - self.start) % self.every == 0

    def writes_back(self, n_averaged: int) -> bool:
        """Return whether the average is written into the weights after this update.

        Args:
            n_averaged: number of updates including this one, at least 1.
        """
        return False

    @property
    def switches_when_asked(self) -> bool:
        """Whether `update_averages` writes the average into the weights and does nothing else."""
        return False

    @property
    def snapshots(self) -> int:
        """How many past weights to keep, to average over these and the present ones only.

        0, for most rules, averages over all weights and keeps none of them.
        """
        return 0


@dataclass(frozen=True)
class EMA(Rule):
    """Exponential moving average: the present weights always get the same share.

    wₙ = 1 − decay,    w₀ = 1

    Example:
        >>> EMA(decay=0.75).weight(n_averaged=7)
        0.25
        >>> [round(EMA(0.75, debias=True).weight(n), 3) for n in (0, 1, 2, 9)]
        [1.0, 0.571, 0.432, 0.265]
        >>> [round(EMA(0.75, warmup=SWA()).weight(n), 3) for n in (0, 1, 2, 9)]
        [1.0, 0.5, 0.333, 0.25]

    The average looks back over about 1 / (1 − decay) updates. It begins with the first weights it
    sees, as `torch.optim.swa_utils.get_ema_multi_avg_fn` does, and forgets them slowly. `debias`
    and `warmup` make it forget them sooner.

    Args:
        decay: the share of the old average, in [0, 1]. 0 gives the present weights, 1 the first.
        debias: use wₙ = (1 − decay) / (1 − decayⁿ⁺¹), which removes the bias towards the first
            weights, as Adam does for its moments.
        warmup: a rule whose share is used as long as it is larger: `PowerRamp()`, `TFRamp()`, or
            `SWA()` for the plain mean of the first 1 / (1 − decay) weights.
        start, every: see `Rule`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its interval.

    Source: Polyak, Juditsky: Acceleration of stochastic approximation by averaging,
    SIAM J. Control Optim. 30(4), 1992, for averaging; exponential weights are
    signal processing's. Kingma, Ba: Adam, ICLR 2015, arXiv 1412.6980, for `debias`. Compared
    update by update with torch's `AveragedModel`, timm's `ModelEmaV3` and torch_ema, and with
    the first moment of torch's `Adam` for `debias`.
    """

    decay: float = 0.999
    debias: bool = field(default=False, kw_only=True)
    warmup: Rule | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("decay", self.decay, "[0, 1]")
        check_bool("debias", self.debias)
        if not isinstance(self.warmup, Rule | None):
            raise TypeError(f"`warmup` must be a Rule or None, got {self.warmup!r}.")

    def weight(self, n_averaged: int) -> float:
        if n_averaged == 0:
            return 1.0
        share = self._debiased(n_averaged + 1) if self.debias else 1.0 - self.decay
        return max(share, self.warmup.weight(n_averaged)) if self.warmup else share

    def _debiased(self, n: int) -> float:
        return (1.0 - self.decay) / (1.0 - self.decay**n) if self.decay < 1 else 1.0 / n

    @classmethod
    def from_half_life(
        cls,
        steps: float,
        every: int = 1,
        *,
        start: int = 0,
        debias: bool = False,
        warmup: Rule | None = None,
    ) -> EMA:
        """Return the EMA in which weights count half as much as the weights `steps` steps later.

        decay = 2^(−every / steps)

        Example:
            >>> EMA.from_half_life(steps=100, every=50).decay
            0.7071067811865476

        Args:
            steps: optimizer steps, not updates, in (0, ∞).
            every, start, debias, warmup: see `EMA`.

        Source: Composer's `half_life`.
        """
        check_real("steps", steps, "(0, ∞)")
        check_integer("every", every, at_least=1)
        decay = 2.0 ** (-every / steps)
        return cls(decay, start=start, every=every, debias=debias, warmup=warmup)

    def scaled(self, batch_factor: float) -> EMA:
        """Return the EMA that looks back over as many samples at another batch size.

        decay ← decay^batch_factor

        Example:
            >>> EMA(decay=0.5).scaled(batch_factor=3).decay
            0.125

        Args:
            batch_factor: the new batch size divided by the old one, in (0, ∞).

        Source: Busbridge, Ramapuram, Ablin, Likhomanenko, Dhekane, Suau, Webb: How to
        Scale Your EMA, NeurIPS 2023, arXiv 2307.13813.
        """
        check_real("batch_factor", batch_factor, "(0, ∞)")
        return replace(self, decay=self.decay**batch_factor)


@dataclass(frozen=True)
class SWA(Rule):
    """Stochastic weight averaging: the mean of all weights from `start` on.

    wₙ = 1 / (n + 1)

    Example:
        >>> SWA(start=1000, every=10).weight(n_averaged=3)
        0.25

    The first weights count as much as the last, so start late (`start`), when training moves around
    an optimum rather than towards it.

    Args:
        start, every: see `Rule`.

    Source: Izmailov, Podoprikhin, Garipov, Vetrov, Wilson: Averaging Weights Leads to
    Wider Optima and Better Generalization, UAI 2018, arXiv 1803.05407. Compared update by
    update with torch's `AveragedModel`.
    """

    def weight(self, n_averaged: int) -> float:
        return 1.0 / (n_averaged + 1)


@dataclass(frozen=True)
class T_ADEMA(Rule):
    """Exponential moving average whose decay rises from 0 to alpha along a tanh.

    wₙ = 1 − alpha · tanh(n / timescale)

    Example:
        >>> rule = T_ADEMA(alpha=0.9, timescale=10)
        >>> [round(rule.weight(n), 3) for n in (0, 5, 10, 20, 40)]
        [1.0, 0.584, 0.315, 0.132, 0.101]

    n counts updates of the whole model. With `timescale=1` the ramp ends after about four updates,
    and the rule is `EMA(decay=alpha)` from then on. The paper speaks of a tanh with a variable
    coefficient: this is `timescale`, which stretches the ramp.

    Args:
        alpha: the final decay, in [0, 1].
        timescale: number of updates after which the decay is alpha · tanh(1) ≈ 0.76 · alpha, in
            (0, ∞).
        start, every: see `Rule`.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its interval.

    Source: Yang, Zhu, Sun, Yang: Research on Image Classification Algorithm Based on
    Dynamic Decay EMA, J. Chinese Computer Systems 41(7), 2020, 1524-1529. No package has it:
    compared update by update with the formula of the code that is copied widely, alpha · tanh(n),
    which counts tensors for n where this rule counts updates.
    """

    alpha: float = 0.9
    timescale: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("alpha", self.alpha, "[0, 1]")
        check_real("timescale", self.timescale, "(0, ∞)")

    def weight(self, n_averaged: int) -> float:
        return 1.0 - self.alpha * math.tanh(n_averaged / self.timescale)


@dataclass(frozen=True)
class ExponentialRamp(Rule):
    """Exponential moving average whose decay rises exponentially, as in YOLO.

    wₙ = 1 − decay · (1 − e^(−n / tau))

    Example:
        >>> [round(ExponentialRamp(0.9999, tau=2000).weight(n), 3) for n in (0, 2000, 10_000)]
        [1.0, 0.368, 0.007]

    Args:
        decay: the final decay, in [0, 1].
        tau: number of updates after which the decay is (1 − 1/e) · decay ≈ 0.63 · decay, in (0, ∞).
        start, every: see `Rule`.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its interval.

    Source: `ModelEMA` of YOLOv5 and Ultralytics. It begins at the initial weights, as this rule
    does after `update_averages()` before the first step. Compared update by update with its
    formula.
    """

    decay: float = 0.9999
    tau: float = 2000.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("decay", self.decay, "[0, 1]")
        check_real("tau", self.tau, "(0, ∞)")

    def weight(self, n_averaged: int) -> float:
        return 1.0 + self.decay * math.expm1(-n_averaged / self.tau)


@dataclass(frozen=True)
class PolynomialAverage(Rule):
    """Mean of all weights in which later ones count more: the k-th about k^eta times.

    wₙ = (eta + 1) / (n + 1 + eta)

    Example:
        >>> [round(PolynomialAverage(eta=3).weight(n), 3) for n in (0, 1, 10, 100)]
        [1.0, 0.8, 0.286, 0.038]

    The mean age is a constant fraction of the run: n / (eta + 2) updates.

    Args:
        eta: in [0, ∞). 0 is SWA.
        start, every: see `Rule`.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its interval.

    Source: Shamir, Zhang: Stochastic Gradient Descent for Non-smooth Optimization, ICML
    2013, arXiv 1212.1824, "polynomial-decay averaging". Compared update by update with
    `PolynomialDecayAverager` of dog-optimizer, whose gamma is `eta`.
    """

    eta: float = 8.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("eta", self.eta, "[0, ∞)")

    def weight(self, n_averaged: int) -> float:
        return (self.eta + 1.0) / (n_averaged + 1.0 + self.eta)


@dataclass(frozen=True)
class PowerEMA(Rule):
    """Power-function EMA: the mean age is a constant fraction of the run.

    wₙ = 1 − (1 − 1 / (n + 1))^(gamma + 1)

    Example:
        >>> [round(PowerEMA(gamma=6.94).weight(n), 3) for n in (0, 1, 10, 100)]
        [1.0, 0.996, 0.531, 0.076]

    The share of the weights at time t of a run of length T is proportional to (t / T)^gamma. Time
    counts updates from `start` on.

    Args:
        gamma: in [0, ∞). 0 is SWA; see `from_width`.
        start, every: see `Rule`.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its interval.

    Source: Karras, Aittala, Lehtinen, Hellsten, Aila, Laine: Analyzing and Improving the
    Training Dynamics of Diffusion Models (EDM2), CVPR 2024, arXiv 2312.02696. Compared update
    by update with its formula, and with ema-pytorch's `KarrasEMA`, whose count is set back by
    one: left alone, it takes 1 / (n + 2) for Δt / t.
    """

    gamma: float = 6.94

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("gamma", self.gamma, "[0, ∞)")

    def weight(self, n_averaged: int) -> float:
        return 1.0 - math.pow(1.0 - 1.0 / (n_averaged + 1), self.gamma + 1.0)

    @classmethod
    def from_width(cls, sigma_rel: float, *, start: int = 0, every: int | None = 1) -> PowerEMA:
        """Return the average of this relative width.

        sigma_rel = √(gamma + 1) / ((gamma + 2) · √(gamma + 3))

        Example:
            >>> round(PowerEMA.from_width(0.05).gamma, 2), round(PowerEMA.from_width(0.1).gamma, 2)
            (16.97, 6.94)

        Args:
            sigma_rel: standard deviation of the averaged weights' times, as a fraction of the run,
                in (0, 0.2886]. SWA has 0.2886.
            start, every: see `Rule`.
        """
        check_real("sigma_rel", sigma_rel, "(0, 0.2886]")
        # gamma³ + 7 gamma² + (16 − t) gamma + 12 − t = 0 with t = 1 / sigma_rel². For gamma = x −
        # 7/3 that is x³ + p x + q = 0, and its largest root is this one of Viète's three.
        t = 1 / sigma_rel**2
        p, q = -1 / 3 - t, 4 * t / 3 + 2 / 27
        x = 2 * math.sqrt(-p / 3) * math.cos(math.acos(1.5 * q / p * math.sqrt(-3 / p)) / 3)
        return cls(x - 7 / 3, start=start, every=every)


@dataclass(frozen=True)
class HalfLifeFraction(Rule):
    """Exponential moving average whose half-life is a constant fraction of the run.

    wₙ = 1 − 2^(−1 / (fraction · (n + 1))),    w₀ = 1

    Example:
        >>> [round(HalfLifeFraction(0.05).weight(n), 3) for n in (0, 10, 100, 1000)]
        [1.0, 0.716, 0.128, 0.014]

    Args:
        fraction: the half-life as a fraction of the updates so far, in (0, 1].
        start, every: see `Rule`.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its interval.

    Source: torchtitan's EMA, and arXiv 2602.03702. Compared update by update with torchtitan's
    formula. It begins at the initial weights, of which 2^(−1 / fraction) are left after the first
    update, 1e-6 with 0.05; this rule copies.
    """

    fraction: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("fraction", self.fraction, "(0, 1]")

    def weight(self, n_averaged: int) -> float:
        return 1.0 - 2.0 ** (-1.0 / (self.fraction * (n_averaged + 1))) if n_averaged > 0 else 1.0


@dataclass(frozen=True)
class LAWA(Rule):
    """Latest weight averaging: the mean of the last k weights.

    wₙ = 1 / min(n + 1, k), after the oldest of k weights is taken out

    Example:
        >>> from averaging_optim import describe
        >>> describe(LAWA(k=2, every=3), steps=9).shares
        (0.0, 0.0, 0.0, 0.0, 0.0, 0.5, 0.0, 0.0, 0.5)

    It needs k tensors for each weight, where other averages need one: the mean and snapshots of
    k − 1 past weights, which a state dict has as `averaged_<name>_1`, `averaged_<name>_2`, …

    Args:
        k: number of weights to average, at least 2.
        start, every: see `Rule`. The published method averages once an epoch.

    Raises:
        TypeError: an argument is not an integer.
        ValueError: an argument is too small.

    Source: Kaddour: Stop Wasting My Time! Saving Days of ImageNet and BERT Training with
    Latest Weight Averaging, 2022, arXiv 2209.14981. Compared update by update with the mean
    of the last k weights in float64.
    """

    k: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_integer("k", self.k, at_least=2)

    def weight(self, n_averaged: int) -> float:
        return 1.0 / min(n_averaged + 1, self.k)

    @property
    def snapshots(self) -> int:
        return self.k - 1


@dataclass(frozen=True)
class Lookahead(Rule):
    """Steps forward, one step back: after each update, training continues from the average.

    wₙ = alpha,    w₀ = 1,    weights ← average after each update but the first

    Example:
        >>> rule = Lookahead(alpha=0.5, every=5)
        >>> [step for step in range(12) if rule.is_due(step)]
        [0, 5, 10]

    The average begins with the weights after `start` steps, by default before the first. The state
    of the wrapped optimizer is not changed. An optimizer that trains copies of the weights (master
    weights) overwrites what this rule writes.

    Args:
        alpha: how far to go towards the weights, in [0, 1]. 1 doesn't change training.
        start, every: see `Rule`. `every` is k in the paper, and the averages are the slow weights.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its interval.

    Source: Zhang, Lucas, Hinton, Ba: Lookahead Optimizer: k steps forward, 1 step back,
    NeurIPS 2019, arXiv 1907.08610. Compared step by step with pytorch_optimizer's `Lookahead`,
    weights and averages.
    """

    alpha: float = 0.5
    every: int | None = field(default=5, kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("alpha", self.alpha, "[0, 1]")

    def weight(self, n_averaged: int) -> float:
        return self.alpha if n_averaged > 0 else 1.0

    def is_due(self, step: int) -> bool:
        return super().is_due(step) or (step == self.start and self.every is not None)

    def writes_back(self, n_averaged: int) -> bool:
        return n_averaged > 1


@dataclass(frozen=True)
class SwitchEMA(Rule):
    """Exponential moving average from which training continues, every so many steps.

    wₙ = 1 − decay,    w₀ = 1,    weights ← average after updates every, 2·every, …

    Example:
        >>> rule = SwitchEMA(decay=0.99, every=100)
        >>> [step for step in range(250) if rule.writes_back(n_averaged=step + 1)]
        [100, 200]

    The average begins with the weights after `start` steps, by default before the first, and is
    updated after each step. An optimizer that trains copies of the weights (master weights)
    overwrites what this rule writes.

    Args:
        decay: the share of the old average, in [0, 1].
        every: steps from one switch to the next, at least 1. The paper takes an epoch. With None it
            switches when you call `update_averages`, for epochs of unknown length.
        start: see `Rule`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument is outside its interval.

    Source: Li, Liu, Tian et al.: Switch EMA: A Free Lunch for Better Flatness and
    Sharpness, 2024, arXiv 2402.09240. Compared step by step with what the paper does, by the
    EMA of torch's `AveragedModel`, weights and averages.
    """

    decay: float = 0.999
    every: int | None = field(kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("decay", self.decay, "[0, 1]")

    def weight(self, n_averaged: int) -> float:
        return 1.0 - self.decay if n_averaged > 0 else 1.0

    def is_due(self, step: int) -> bool:
        return step >= self.start

    def writes_back(self, n_averaged: int) -> bool:
        # The first update is the copy at `start`, from which steps are counted.
        return self.every is not None and n_averaged > 1 and (n_averaged - 1) % self.every == 0

    @property
    def switches_when_asked(self) -> bool:
        return self.every is None


@dataclass(frozen=True)
class PowerRamp(Rule):
    """Share that falls as a power of the number of updates, for `EMA(warmup=...)`.

    wₙ = (1 + n / gamma)^(−power)

    Example:
        >>> [round(PowerRamp(power=2 / 3).weight(n), 3) for n in (0, 1, 2, 3)]
        [1.0, 0.63, 0.481, 0.397]
        >>> [round(1 - PowerRamp(power=2 / 3).weight(n), 4) for n in (10, 1000, 10**6)]
        [0.7978, 0.99, 0.9999]
        >>> round(1 - PowerRamp(power=3 / 4).weight(215_443), 4)
        0.9999

    Args:
        gamma: number of updates before the share begins to fall, in (0, ∞).
        power: in (0, 1]. 2/3 reaches a decay of 0.9999 after a million updates, 3/4 after 0.2
            million. 1, with gamma 1, is SWA.
        start, every: see `Rule`. They have no effect in a `warmup`.

    Raises:
        TypeError: an argument is not a number.
        ValueError: an argument is outside its interval.

    Source: Crowson's EMA with warm-up in k-diffusion. Compared update by update with timm's
    `ModelEmaV3`, diffusers' `EMAModel(use_ema_warmup=True)` and ema-pytorch's `EMA`.
    """

    gamma: float = 1.0
    power: float = 2 / 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_real("gamma", self.gamma, "(0, ∞)")
        check_real("power", self.power, "(0, 1]")

    def weight(self, n_averaged: int) -> float:
        return math.pow(1.0 + n_averaged / self.gamma, -self.power)


@dataclass(frozen=True)
class TFRamp(Rule):
    """TensorFlow's share of early updates, for `EMA(warmup=...)`.

    wₙ = 9 / (10 + n),    w₀ = 1

    Example:
        >>> [round(TFRamp().weight(n), 3) for n in (0, 1, 10, 100)]
        [1.0, 0.818, 0.45, 0.082]

    Args:
        start, every: see `Rule`. They have no effect in a `warmup`.

    Source: `tf.train.ExponentialMovingAverage(decay, num_updates)`, which starts at the initial
    weights and takes the smaller of decay and (1 + num_updates) / (10 + num_updates), whatever
    count it is given. Compared update by update with diffusers' `EMAModel`, which ramps so by
    default, and with torch_ema begun at the same weights.
    """

    def weight(self, n_averaged: int) -> float:
        return 9.0 / (10.0 + n_averaged) if n_averaged > 0 else 1.0


@dataclass(frozen=True)
class Formula(Rule):
    """A function of the number of updates so far, as a rule.

    Example:
        >>> Formula(lambda n: n**-0.5, every=10).weight(n_averaged=4)
        0.5

    Args:
        function: returns the share in [0, 1] after n ≥ 1 updates. The first update copies the
            weights.
        start, every: see `Rule`.

    Raises:
        TypeError: `function` is not callable.
    """

    function: Callable[[int], float]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.function):
            raise TypeError(f"`function` must be callable, got {self.function!r}.")

    def weight(self, n_averaged: int) -> float:
        return self.function(n_averaged) if n_averaged > 0 else 1.0
