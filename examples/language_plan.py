"""The plan of examples/language_model.py: questions, runs and budget, fixed before the first run.

The task: a decoder of 0.46 million weights predicts the next byte of Python's standard library.
Files are split once, by a hash of their path: 90 % to train, 5 % to choose with, 5 % to report.
Whatever is chosen (rates, widths) is chosen on the second part, and only the third is reported.

Questions, each answered as the mean ± standard error over five seeds, of the loss in bits a byte:

a. Does averaging at a constant rate replace the decay? LAWA, the mean of a tail (SWA), EMA,
   PowerEMA, T_ADEMA, HalfLifeFraction and merged checkpoints, against cosine and WSD runs of the
   same length.
b. At any time? One constant run at 25, 50, 75 and 100 % of its length, against runs planned to
   end there.
c. Is a width that is chosen after training as good as the best of a dozen that were kept?
d. Do averages in bfloat16 suffice, rounded to the nearest or stochastically?
e. Do BEMA and Lookahead gain anything?
f. What does averaging cost in seconds?

Each schedule trains at its best rate: seed 0 tries `RATES` for each schedule and each length, and
is not reported. `JUDGED` says by which weights. The constant run has one rate for all lengths and
averages: that at which the best of its averages is best at the end. A best rate at the edge of the
grid is reported as such. The grid surrounds the best rate of a trial, a cosine run of 25 % with a
seed that is not used again. Within a seed, all runs begin with the same weights and see the same
batches, so differences are paired.

The budget, in lengths of a full run: the rates take 4 for constant, 4 for Lookahead and
4 · (0.25 + 0.5 + 0.75 + 1) = 10 each for cosine and WSD, together 28. A reported seed takes
1 + 1 + 2.5 + 2.5 = 7, five of them 35. So all take 63 lengths, of 1600 steps of 2048 bytes: 206
million bytes. Measured in CPU time on one core (AMD EPYC, AVX-512, shared with others):

    54 without all averages, 1600 steps of 0.114 s (18,000 bytes a second)       9,800 s
    9 constant runs, 1600 steps of 0.125 s, and 216 evaluations of 0.9 s         3,600 s
    evaluations of the other 81 runs, 900 of 0.9 s                                 800 s
    starting Python 90 times, measuring costs                                      600 s
    together 14,800 s of one core, 2 h 3 min of two
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from averaging_optim import (
    EMA,
    LAWA,
    SWA,
    T_ADEMA,
    Formula,
    HalfLifeFraction,
    Lookahead,
    PowerEMA,
    Rule,
)

PERCENTS = (25, 50, 75, 100)
RATES = (0.004, 0.008, 0.016, 0.032)
SWEEP_SEED = 0
SEEDS = (1, 2, 3, 4, 5)
PLANNED = ("cosine", "wsd")  # runs that must know their length
SCHEDULES = ("constant", *PLANNED, "lookahead")
# By which weights the rate is chosen. In a constant run, by whichever average is best.
JUDGED = {"cosine": ["weights"], "wsd": ["weights"], "lookahead": ["Lookahead"]}

WARM_UP = 50  # steps
DECAY = 0.2  # WSD decays in this last part of a run; SWA and merging average over it
MERGED = 8  # checkpoints in that part
MERGES = ("linear", "cosine", "sqrt")
WIDTHS = (0.01, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.125, 0.15, 0.175, 0.2, 0.25)
SAVED_WIDTHS = (0.05, 0.1)  # from which post_hoc makes the others
IN_BFLOAT16 = ("EMA 0.99", "EMA 0.998")


@dataclass(frozen=True)
class Scale:
    """The size of every run. Tests take a smaller one."""

    steps: int = 1600  # of a run of 100 %
    batch: int = 16
    context: int = 128
    width: int = 128
    layers: int = 2
    points: int = 8  # at which a run of 100 % is evaluated, a multiple of 4
    windows: int = 128  # of `context` bytes to choose with, and as many to report

    def steps_of(self, percent: int) -> int:
        return self.steps * percent // 100

    def is_point(self, step: int) -> bool:
        return step % (self.steps // self.points) == 0

    def is_mark(self, step: int) -> bool:
        return step in map(self.steps_of, PERCENTS)

    def merged_steps(self, end: int) -> list[int]:
        """The steps after which the checkpoints are kept that are merged after step `end`."""
        return [round(end * (1 - DECAY * j / MERGED)) for j in reversed(range(MERGED))]

    def kept_steps(self) -> list[int]:
        """The steps after which a constant run keeps a checkpoint.

        Those that are merged, and some early ones, of which wide averages are made.
        """
        merged = {step for p in PERCENTS for step in self.merged_steps(self.steps_of(p))}
        return sorted(merged | {step for step in range(1, self.steps) if self.is_point(step)})


SMALL = Scale(
    steps=16, batch=2, context=16, width=32, layers=1, points=4, windows=2
)  # to try the program


@dataclass(frozen=True)
class Run:
    """One training run. Without a rate it takes the best one that the sweep found."""

    schedule: str
    percent: int
    seed: int
    rate: float | None = None

    @property
    def name(self) -> str:
        how = f"seed-{self.seed}" if self.rate is None else f"rate-{self.rate:g}"
        return f"{self.schedule}-{self.percent:03}-{how}"


def sweep() -> list[Run]:
    """The runs that find the rates."""
    return [
        Run(schedule, percent, SWEEP_SEED, rate)
        for schedule in SCHEDULES
        for percent in percents(schedule)
        for rate in RATES
    ]


def reported() -> list[Run]:
    """The runs that answer the questions, at the rates that the sweep found."""
    return [
        Run(schedule, percent, seed)
        for seed in SEEDS
        for schedule in SCHEDULES
        for percent in percents(schedule)
    ]


def percents(schedule: str) -> tuple[int, ...]:
    return PERCENTS if schedule in PLANNED else (100,)


def relative_rate(schedule: str, step: int, steps: int) -> float:
    """Return the factor of the rate in step 0, 1, … of a run."""
    warm = min(1.0, (step + 1) / WARM_UP)
    left = 1 - step / steps
    if schedule == "cosine":
        return warm * (1 - math.cos(math.pi * left)) / 2
    if schedule == "wsd":
        return warm * min(1.0, left / DECAY)
    return warm


def rules(schedule: str, steps: int) -> dict[str, Rule]:
    """The averages that a run keeps. A constant run keeps all of them at once."""
    common: dict[str, Rule] = {"EMA 0.99": EMA(0.99)}
    if schedule == "lookahead":
        return {"Lookahead": Lookahead(0.5, every=5), **common}
    if schedule in PLANNED:
        return common
    return {
        **common,
        "EMA 0.998": EMA(0.998),
        "LAWA": LAWA(k=8, every=max(1, steps // 80)),
        "SWA of the tail": SWA(start=round((1 - DECAY) * steps)),
        "T_ADEMA": T_ADEMA(0.998, timescale=steps / 4),
        "HalfLifeFraction": HalfLifeFraction(0.05),
        **{kept(width): PowerEMA.from_width(width) for width in WIDTHS},
        "BEMA's EMA": Formula(lambda n: (10 + n) ** -0.5),
        "first": EMA(decay=1),  # the initial weights, for BEMA
    }


def bema(step: int) -> dict[str, float]:
    """Return the factors of BEMA's sum after a step, with its paper's lag of 10 and power of 0.2.

    Source: Block, Zhang: EMA Without the Lag: Bias-Corrected Iterate Averaging Schemes, 2025,
    arXiv 2508.00180.
    """
    alpha = (10 + step) ** -0.2
    return {"BEMA's EMA": 1.0, "weights": alpha, "first": -alpha}


def kept(width: float) -> str:
    return f"PowerEMA {width:g}"


def made(width: float) -> str:
    """The name of an average that post_hoc made after training."""
    return f"post-hoc {width:g}"


def merged(kind: str) -> str:
    return f"merged, {kind}"
