"""Averaged weights for PyTorch, kept by the optimizer."""

from averaging_optim._checkpoints.renaming import renamed
from averaging_optim._optimizer import AveragingOptimizer
from averaging_optim._profile import Profile, describe
from averaging_optim._rules import (
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
from averaging_optim._together import Together, together

__all__ = [
    "EMA",
    "LAWA",
    "SWA",
    "T_ADEMA",
    "AveragingOptimizer",
    "ExponentialRamp",
    "Formula",
    "HalfLifeFraction",
    "Lookahead",
    "PolynomialAverage",
    "PowerEMA",
    "PowerRamp",
    "Profile",
    "Rule",
    "SwitchEMA",
    "TFRamp",
    "Together",
    "describe",
    "renamed",
    "together",
]
__version__ = "0.1.0"
