"""How exact is an average after a million updates, and what does more exactness cost?

One weight jumps from 0 to 1 after its first update, and one rises evenly from 1 to 2. Their exact
averages have closed forms. Compare with these the averages kept in float32, in float32 with
compensation for rounding, and in float64. Prints a table.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from race import race
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

UPDATES = 10**6
DECAY = 0.99999
WEIGHTS_TO_TIME = 12_000_000
ROUNDS = 30
UNIT_ROUNDOFF = 2.0**-24


class Plain:
    """One lerp."""

    bytes_a_weight = 4

    def __init__(self, first: Tensor) -> None:
        self.average = first.clone()

    def update(self, weight: Tensor, share: float) -> None:
        self.average.lerp_(weight, share)


class Compensated(Plain):
    """Kahan summation: add to each increment what rounding took from the one before."""

    bytes_a_weight = 8

    def __init__(self, first: Tensor) -> None:
        super().__init__(first)
        self.lost = torch.zeros_like(first)

    def update(self, weight: Tensor, share: float) -> None:
        increment = torch.sub(weight, self.average).mul_(share).sub_(self.lost)
        increased = self.average + increment
        torch.sub(increased, self.average, out=self.lost).sub_(increment)
        self.average.copy_(increased)


class Double(Plain):
    bytes_a_weight = 8

    def __init__(self, first: Tensor) -> None:
        super().__init__(first.double())

    def update(self, weight: Tensor, share: float) -> None:
        self.average.lerp_(weight.double(), share)


KINDS = {"float32": Plain, "float32, compensated": Compensated, "float64": Double}


def weights(n: int) -> Tensor:
    """Return the two weights at update n; the first update is 0."""
    return torch.tensor([float(n > 0), 1 + n / UPDATES])


def exact_ema() -> Tensor:
    last, forgotten = UPDATES - 1, DECAY ** (UPDATES - 1)
    lag = DECAY / (1 - DECAY) * (1 - forgotten)
    return torch.tensor([1 - forgotten, 1 + (last - lag) / UPDATES], dtype=torch.float64)


def exact_swa() -> Tensor:
    last = UPDATES - 1
    return torch.tensor([last / UPDATES, 1 + last / 2 / UPDATES], dtype=torch.float64)


def errors(kind: type[Plain]) -> list[float]:
    """Return the errors of EMA and SWA of both weights, in units of float32's roundoff."""
    ema, swa = kind(weights(0)), kind(weights(0))
    for n in range(1, UPDATES):
        present = weights(n)
        ema.update(present, 1 - DECAY)
        swa.update(present, 1 / (n + 1))
    pairs = [(ema.average, exact_ema()), (swa.average, exact_swa())]
    return [
        error / UNIT_ROUNDOFF
        for average, exact in pairs
        for error in (average.double() - exact).abs().tolist()
    ]


def pass_over(kind: type[Plain]) -> Callable[[], object]:
    """Return an update of many weights, in blocks that stay in cache between operations."""
    blocks = torch.rand(WEIGHTS_TO_TIME).split(2**18)
    kept = [kind(block) for block in blocks]

    def update() -> None:
        for each, block in zip(kept, blocks, strict=True):
            each.update(block, 0.1)

    return update


def main() -> None:
    times = race({name: pass_over(kind) for name, kind in KINDS.items()}, ROUNDS)
    headings = ("EMA of jump", "EMA of ramp", "SWA of jump", "SWA of ramp")
    table = Table("kept in", "bytes", "time", *headings, box=box.MARKDOWN)
    for name, kind in KINDS.items():
        cells = [f"{error:,.3g}" for error in errors(kind)]
        time = f"{times.ratio(name, 'float32').median:.2f}"
        table.add_row(name, str(kind.bytes_a_weight), time, *cells)
    console = Console(width=100)
    console.print(table)
    console.print(
        f"Errors are in units of 2^-24, after {UPDATES:,} updates, with an EMA decay of {DECAY}. "
        "Half a unit comes from the ramp's weights, which are float32. Time is relative to float32."
    )


if __name__ == "__main__":
    main()
