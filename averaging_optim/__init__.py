"""Averaged weights for PyTorch, kept by the optimizer."""

from averaging_optim._optimizer import AveragingOptimizer
from averaging_optim._profile import Profile, describe
from averaging_optim._rules import (
    EMA,
    SWA,
    T_ADEMA,
    Formula,
    HalfLifeFraction,
    PolynomialAverage,
    PowerEMA,
    PowerRamp,
    Rule,
    TFRamp,
)

__all__ = [
    "EMA",
    "SWA",
    "T_ADEMA",
    "AveragingOptimizer",
    "Formula",
    "HalfLifeFraction",
    "PolynomialAverage",
    "PowerEMA",
    "PowerRamp",
    "Profile",
    "Rule",
    "TFRamp",
    "describe",
]
__version__ = "0.1.0"
