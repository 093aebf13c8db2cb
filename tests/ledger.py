"""What an optimizer must hold after all that happened to it, kept apart from it in float64."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from training import share

from averaging_optim import Rule


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
        # the roundings of the weight and of the share.
        error = rounding(self.dtype) * 8 * max(largest(self.value), largest(present))
        value = self.value + share * (present.detach().double() - self.value)
        return Kept(value, self.dtype, (1 - share) * self.error + error)

    def is_near(self, average: Tensor) -> bool:
        near = (average.double() - self.value).abs() <= self.error
        # Weights that were not finite may have been exported, and loaded as an average.
        right = torch.where(self.value.isfinite(), near, ~average.isfinite())
        return average.dtype == self.dtype and bool(right.all())


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2 if dtype.is_floating_point else 0.0


def largest(tensor: Tensor) -> float:
    return float(tensor.detach().double().abs().max())


@dataclass
class Ledger:
    """Counters, and for each rule key → average. `present` is key → weight or buffer."""

    rules: Mapping[str, Rule]
    dtype: torch.dtype | None
    skips_nonfinite: bool
    steps: int = 0
    skipped: int = 0
    counts: dict[str, int] = field(default_factory=dict)
    averages: dict[str, dict[str, Kept]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.counts = dict.fromkeys(self.rules, 0)
        self.averages = {name: {} for name in self.rules}

    def counters(self) -> dict[str, int]:
        averaged = {f"n_averaged_{name}": count for name, count in self.counts.items()}
        return {"averaging_steps": self.steps, "n_skipped": self.skipped, **averaged}

    def make(self, present: Mapping[str, Tensor]) -> None:
        for averages in self.averages.values():
            for key, tensor in present.items():
                averages.setdefault(key, self.copy_of(tensor))

    def step(self, present: Mapping[str, Tensor], has_learning_rate: bool) -> None:
        self.make(present)
        if has_learning_rate or any(self.counts.values()):
            self.steps += 1
            self.update(filter(self.is_due, self.rules), present)

    def update(self, names: Iterable[str], present: Mapping[str, Tensor]) -> None:
        names = list(names)
        self.make(present)
        finite = all(tensor.isfinite().all() for tensor in present.values())
        if names and self.skips_nonfinite and not finite:
            self.skipped += 1
            return
        for name in names:
            n = self.counts[name]
            weight = share(self.rules[name], n) if n > 0 else 1
            for key, tensor in present.items():
                self.move(self.averages[name], key, tensor, weight)
            self.counts[name] += 1

    def start(self, name: str, values: Mapping[str, Tensor], n_averaged: int) -> None:
        self.averages[name] = {key: self.copy_of(value) for key, value in values.items()}
        self.counts[name] = n_averaged

    def load(self, saved: Ledger) -> None:
        """Take over what was saved; averages that had not been made then stay."""
        self.steps, self.skipped, self.counts = saved.steps, saved.skipped, saved.counts
        for name, averages in saved.averages.items():
            self.averages[name] = averages or self.averages[name]

    def is_due(self, name: str) -> bool:
        rule = self.rules[name]
        since = self.steps - rule.start
        return rule.every is not None and since > 0 and since % rule.every == 0

    def copy_of(self, tensor: Tensor) -> Kept:
        dtype = tensor.dtype
        if dtype.is_floating_point:
            dtype = self.dtype or (torch.float32 if dtype == torch.bfloat16 else dtype)
        return Kept.copy_of(tensor, dtype)

    def move(self, averages: dict[str, Kept], key: str, present: Tensor, share: float) -> None:
        is_copied = share == 1 or not present.is_floating_point()
        averages[key] = self.copy_of(present) if is_copied else averages[key].moved(present, share)
