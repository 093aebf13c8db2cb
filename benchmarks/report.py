"""Show what the races measured as tables, Markdown and a picture."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from peers import PACKAGES
from race import Quartiles
from rich import box
from rich.console import Console
from rich.table import Table

WIDTH = 160
HEADING = """\
# Averaging on a CPU

`make bench` writes this page. It times averaging alone, Python included: the step of the wrapped
optimizer does nothing, except where a row names AdamW. Each ratio compares two calls in the same
round. You see the median of {rounds} rounds, and the quartiles.
"""
PICTURE = "![Ratio to target, and cost by model size](results.png)"


@dataclass(frozen=True)
class Row:
    """One measurement.

    measured, reference: what is divided by what, with the time of each.
    value: the ratio, or a quantity in `unit`.
    target: the largest median that meets the target, or None.
    """

    case: str
    measured: str
    reference: str
    value: Quartiles
    target: float | None
    unit: str = ""


@dataclass(frozen=True)
class Cost:
    """Seconds of one averaging step, and of one flat `lerp_` over as many weights."""

    weights: int
    tensors: int
    seconds: float
    limit: float


def terminal() -> Console:
    """Return a console that doesn't wrap rows unless they go to a terminal."""
    console = Console()
    return console if console.is_terminal else Console(width=WIDTH)


def show(rows: Sequence[Row], costs: Sequence[Cost], console: Console) -> None:
    if rows:
        console.print(targets_table(rows))
    if costs:
        console.print(costs_table(costs))


def write(rows: Sequence[Row], costs: Sequence[Cost], rounds: int, folder: Path) -> None:
    """Write results.md and results.png into the folder."""
    draw(rows, costs, folder / "results.png")
    console = Console(width=WIDTH)
    with console.capture() as tables:
        show(rows, costs, console)
    measured = "\n".join(line.rstrip() for line in tables.get().splitlines())
    parts = [HEADING.format(rounds=rounds), *machine(), measured, PICTURE]
    (folder / "results.md").write_text("\n".join(parts) + "\n")


def machine() -> list[str]:
    """Return what the numbers depend on, as a Markdown list."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return [
        f"- {_processor()}, {os.cpu_count()} cores, {memory:.0f} GiB, {platform.system()}",
        f"- Python {platform.python_version()}, torch {torch.__version__}, "
        f"{torch.get_num_threads()} threads",
        f"- {versions}",
        f"- {date.today().isoformat()}, "
        f"load {os.getloadavg()[2]:.1f} over the last 15 minutes, including this run",
    ]


def targets_table(rows: Sequence[Row]) -> Table:
    table = Table("case", "measured", "against", box=box.MARKDOWN)
    for heading in ("median", "quartiles", "target"):
        table.add_column(heading, justify="right")
    table.add_column("met")
    for row in rows:
        value = row.value
        quartiles = f"{value.low:.2f} … {value.high:.2f}" if row.reference else ""
        target = "" if row.target is None else f"≤ {row.target:.2f}{row.unit}"
        median = f"{value.median:.2f}{row.unit}"
        table.add_row(row.case, row.measured, row.reference, median, quartiles, target, _met(row))
    return table


def costs_table(costs: Sequence[Cost]) -> Table:
    """Return milliseconds, and the ratio to the limit in brackets."""
    tensors = sorted({cost.tensors for cost in costs})
    table = Table("weights", "flat lerp_ (ms)", box=box.MARKDOWN)
    for number in tensors:
        table.add_column(f"{number:,} tensors", justify="right")
    for weights, limit in limits(costs).items():
        cells = [
            f"{1e3 * cost.seconds:,.3f} ({cost.seconds / cost.limit:.2f})"
            for cost in costs
            if cost.weights == weights
        ]
        table.add_row(f"{weights:,}", f"{1e3 * limit:,.3f}", *cells)
    return table


def limits(costs: Sequence[Cost]) -> dict[int, float]:
    """Return weights → seconds of the flat `lerp_`, which every model is raced against."""
    return {
        weights: statistics.median(cost.limit for cost in costs if cost.weights == weights)
        for weights in sorted({cost.weights for cost in costs})
    }


def draw(rows: Sequence[Row], costs: Sequence[Cost], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(16, 8), layout="constrained")
    _draw_ratios(rows, left)
    _draw_costs(costs, right)
    figure.savefig(path, dpi=120)


def _draw_ratios(rows: Sequence[Row], axes: Axes) -> None:
    labels: list[str] = []
    for row in reversed(rows):
        if row.target is not None:
            _draw_ratio(row.value, row.target, len(labels), axes)
            labels.append(_label(row))
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xscale="log", xlabel="measured / target: met up to the line")


def _draw_ratio(value: Quartiles, target: float, height: int, axes: Axes) -> None:
    colour = "tab:green" if value.median <= target else "tab:red"
    axes.plot([value.low / target, value.high / target], [height, height], color=colour)
    axes.plot(value.median / target, height, "o", color=colour)


def _draw_costs(costs: Sequence[Cost], axes: Axes) -> None:
    for tensors in sorted({cost.tensors for cost in costs}):
        line = [cost for cost in costs if cost.tensors == tensors]
        seconds = [cost.seconds for cost in line]
        axes.plot([cost.weights for cost in line], seconds, "o-", label=f"{tensors:,} tensors")
    by_weights = limits(costs)
    axes.plot(list(by_weights), list(by_weights.values()), "k--", label="one flat lerp_")
    axes.set(xscale="log", yscale="log", xlabel="weights", ylabel="seconds an averaging step")
    axes.set_title("Cost by model size")
    axes.legend()


def _met(row: Row) -> str:
    if row.target is None:
        return ""
    return "yes" if row.value.median <= row.target else "**no**"


def _label(row: Row) -> str:
    return f"{row.case} / {row.reference}" if row.reference else f"{row.case}, {row.measured}"


def _processor() -> str:
    """Return the processor's name, which `platform.processor` leaves out on Linux."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
