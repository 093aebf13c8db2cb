"""What an optimizer must hold after all that happened to it, kept apart from it in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from training import share

from averaging_optim import LAWA, Lookahead, Rule, SwitchEMA

Present = Mapping[str, Tensor]


@dataclass
class Kept:
    """An average in float64, and how far from it the one of this dtype may be."""

    value: Tensor
    dtype: torch.dtype
    error: float

    @classmethod
    def copy_of(cls, present: Tensor, dtype: torch.dtype) -> Kept:
        value = present.detach().to(torch.float64, copy=True)
        is_exact = torch.promote_types(present.dtype, dtype) == dtype
        return cls(value, dtype, 0.0 if is_exact else rounding(dtype) * largest(value))

    def moved(self, present: Tensor, share: float) -> Kept:
        # A difference, a product and a sum, of up to twice the largest number there is, and
        # the roundings of the weight and of the share. Below normal numbers the spacing stays.
        number = max(largest(self.value), largest(present), smallest_normal(self.dtype))
        error = rounding(self.dtype) * 8 * number
        value = self.value + share * (present.detach().double() - self.value)
        return Kept(value, self.dtype, (1 - share) * self.error + error)

    def is_near(self, average: Tensor) -> bool:
        near = (average.double() - self.value).abs() <= self.error
        # Weights that were not finite may have been exported, and loaded as an average.
        right = torch.where(self.value.isfinite(), near, ~average.isfinite())
        return average.dtype == self.dtype and bool(right.all())


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0


def smallest_normal(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).smallest_normal if dtype.is_floating_point else 0.0


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().double().abs().max())


WriteBack = Callable[[str], None]


@dataclass
class Ledger:
    """Counters, and for each rule key → average. `present` is key → weight or buffer.

    windows: for each rule key → the last values, as many as the rule averages over.
    write_back: name → None, gives what is present the values of this average.
    """

    rules: Mapping[str, Rule]
    dtype: torch.dtype | None
    skips_nonfinite: bool
    steps: int = 0
    skipped: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    averages: dict[str, dict[str, Kept]] = field(default_factory=dict)
    windows: dict[str, dict[str, list[Kept]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = dict.fromkeys(self.rules, 0)
        self.averages = {name: {} for name in self.rules}
        self.windows = {name: {} for name in self.rules}

    def counters(self) -> dict[str, int]:
        averaged = {f"n_averaged_{name}": count for name, count in self.counts.items()}
        return {"averaging_steps": self.steps, "n_skipped": self.skipped, **averaged}

    def make(self, present: Present, *, only_begun: bool = False) -> None:
        for name, averages in self.averages.items():
            if only_begun and not averages:
                continue
            for key in present.keys() - averages.keys():
                averages[key] = self.copy_of(present[key])
                self.windows[name][key] = [averages[key]] * self.counts[name]

    def begin(self, present: Present, can_move: bool) -> None:
        """Before a step: let those rules begin that do so with the weights before the first."""
        if self.steps == 0 and can_move:
            names = [name for name in filter(self.is_due, self.rules) if self.counts[name] == 0]
            if names:
                self.update(names, present, lambda name: None)  # no first average is written

    def step(self, present: Present, can_move: bool, write_back: WriteBack) -> None:
        self.make(present)
        if can_move:
            self.steps += 1
            self.update(filter(self.is_due, self.rules), present, write_back)

    def update(self, names: Iterable[str], present: Present, write_back: WriteBack) -> None:
        names = list(names)
        self.make(present)
        finite = all(tensor.isfinite().all() for tensor in present.values())
        if names and self.skips_nonfinite and not finite:
            self.skipped += 1
            return
        for name in sorted(names, key=self.reads_only):
            is_written = not self.reads_only(name)
            for key, tensor in present.items():
                self.move(name, key, tensor)
            self.counts[name] += 1
            if is_written:
                write_back(name)

    def start(self, name: str, values: Present, n_averaged: int) -> None:
        self.averages[name] = {key: self.copy_of(value) for key, value in values.items()}
        self.windows[name] = {key: [kept] * n_averaged for key, kept in self.averages[name].items()}
        self.counts[name] = n_averaged

    def load(self, saved: Ledger, present: Present) -> None:
        """Take over what was saved; averages that had not been made then start afresh."""
        self.steps, self.skipped, self.counts = saved.steps, saved.skipped, saved.counts
        for name, averages in saved.averages.items():
            afresh = {key: self.copy_of(present[key]) for key in self.averages[name]}
            self.averages[name] = averages or afresh
            self.windows[name] = saved.windows[name] or {key: [] for key in self.averages[name]}

    def is_due(self, name: str) -> bool:
        rule = self.rules[name]
        since = self.steps - rule.start
        if isinstance(rule, SwitchEMA):
            return since >= 0
        begins = 0 if isinstance(rule, Lookahead) else 1
        return rule.every is not None and since >= begins and since % rule.every == 0

    def reads_only(self, name: str) -> bool:
        """Return whether the next update of this average leaves the weights alone."""
        rule, n = self.rules[name], self.counts[name]
        if isinstance(rule, SwitchEMA):
            return n == 0 or rule.every is None or n % rule.every != 0
        return n == 0 or not isinstance(rule, Lookahead)

    def copy_of(self, tensor: Tensor) -> Kept:
        dtype = tensor.dtype
        if dtype.is_floating_point:
            dtype = self.dtype or (torch.float32 if dtype == torch.bfloat16 else dtype)
        return Kept.copy_of(tensor, dtype)

    def move(self, name: str, key: str, present: Tensor) -> None:
        rule, averages = self.rules[name], self.averages[name]
        if isinstance(rule, LAWA):
            window = [*self.windows[name][key], self.copy_of(present)][-rule.k :]
            self.windows[name][key] = window
            averages[key] = mean(window) if present.is_floating_point() else window[-1]
            return
        weight = share(rule, self.counts[name]) if self.counts[name] > 0 else 1
        is_copied = weight == 1 or not present.is_floating_point()
        averages[key] = self.copy_of(present) if is_copied else averages[key].moved(present, weight)


def mean(window: list[Kept]) -> Kept:
    average = window[0]
    for n, kept in enumerate(window[1:], 1):
        average = average.moved(kept.value, 1 / (n + 1))
    return average
