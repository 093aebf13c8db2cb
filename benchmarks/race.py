"""Race candidates in one process, each once per round, so that noise hits all of them alike."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from time import perf_counter

WARM_UP = 3
# A repeated call finds its tensors in the cache, where training doesn't leave them: on an EPYC with
# 32 MiB, one lerp_ of ResNet-18's 94 MB takes 1.5 ms in laps of 20 ms, and 2.7 ms if called once.
LAP_SECONDS = 0.001


@dataclass(frozen=True)
class Quartiles:
    """The median of many measurements, and their spread: half of them are in low … high."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Quartiles:
        return cls(*statistics.quantiles(values, n=4, method="inclusive"))


@dataclass(frozen=True)
class Race:
    """The result of a race.

    seconds: candidate → time of one call in each round.
    """

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, reference: str) -> Quartiles:
        """Return a candidate's time divided by another's in the same round."""
        rounds = zip(self.seconds[name], self.seconds[reference], strict=True)
        return Quartiles.of([own / other for own, other in rounds])


def race(candidates: Mapping[str, Callable[[], object]], rounds: int) -> Race:
    """Time each candidate once per round.

    The order changes every round, because a call finds in the cache what the one before it left.

    Args:
        candidates: name → call. Repeats a short call until a lap lasts `LAP_SECONDS`.
        rounds: at least 2.
    """
    repeats = {name: _repeats(call) for name, call in candidates.items()}
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    with _no_garbage_collection():
        for order in _shuffled(candidates, rounds):
            for name in order:
                seconds[name].append(_lap(candidates[name], repeats[name]))
    return Race(seconds)


def _repeats(call: Callable[[], object]) -> int:
    fastest = min(_lap(call, 1) for _ in range(WARM_UP))
    return math.ceil(LAP_SECONDS / fastest)


def _lap(call: Callable[[], object], repeats: int) -> float:
    """Return the mean time of a call."""
    started = perf_counter()
    for _ in range(repeats):
        call()
    return (perf_counter() - started) / repeats


def _shuffled(names: Iterable[str], rounds: int) -> Iterator[list[str]]:
    order, random = list(names), Random(0)
    for _ in range(rounds):
        random.shuffle(order)
        yield order


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
