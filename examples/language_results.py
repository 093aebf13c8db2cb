"""The results of language-model runs: a file each, the tables and pictures made of them."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import language_plan as plan
import matplotlib.pyplot as plt
import torch
from language_plan import Run, Scale
from rich import box
from rich.console import Console
from rich.table import Table

COSTS = "costs"
CURVES = ("weights", "EMA 0.99", "EMA 0.998", "LAWA", "PowerEMA 0.1", "T_ADEMA")
ANYTIME = (*CURVES, "HalfLifeFraction", *map(plan.merged, plan.MERGES))
NOT_IN_TABLE = {"first", *map(plan.kept, plan.WIDTHS), *map(plan.made, plan.WIDTHS)}

HEADING = """\
# A small language model and its averages

Written by `make language-model`: bits a byte, mean ± standard error over {seeds} seeds. Rates and
widths were chosen on other text. The questions are in [the plan](../language_plan.py). Costs are
those of {processor}, Python {python}, torch {torch}.

![Loss against steps](curves.png) ![Loss against width](widths.png)
"""

Result = dict[str, Any]
Results = Mapping[str, Result]
Series = list[float]  # one value for each seed


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let `path` never hold a part of what is written, even if the process is killed."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())  # or a power failure may leave the new name with no content
    temporary.replace(path)


def write_json(path: Path, result: Result) -> Path:
    text = json.dumps(result | {"machine": machine()}, indent=1)
    write_atomically(path, lambda file: file.write(text.encode()))
    return path


def write_result(folder: Path, run: Run, scale: Scale, result: Result) -> Path:
    about = {"run": dataclasses.asdict(run), "scale": dataclasses.asdict(scale)}
    return write_json(folder / f"{run.name}.json", about | result)


def machine() -> dict[str, str]:
    return {
        "processor": processor(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{os.cpu_count()} × {names[0]}" if names else platform.processor()


def read_results(folder: Path) -> dict[str, Result]:
    """Return the results of the runs that have one, by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}


def best_average(result: Result, names: Iterable[str] | None = None) -> str:
    """Return which of these (all, by default) is best at the end, on the part to choose with."""
    losses = result["points"][-1]["choose"]
    return min(names or losses, key=lambda name: losses[name])


def tried(schedule: str, percent: int, results: Results) -> dict[float, float]:
    """Return rate → the loss that the rates are judged by, on the part to choose with."""
    runs = [Run(schedule, percent, plan.SWEEP_SEED, rate) for rate in plan.RATES]
    found = [results[run.name] for run in runs if run.name in results]
    judged = plan.JUDGED.get(schedule)
    return {
        each["rate"]: each["points"][-1]["choose"][best_average(each, judged)] for each in found
    }


def best_rate(run: Run, results: Results) -> float:
    rates = tried(run.schedule, run.percent, results)
    if len(rates) < len(plan.RATES):
        raise SystemExit(f"{run.name} needs the runs that find its rate. Start `all` first.")
    return min(rates, key=lambda rate: rates[rate])


def point_at(percent: int, scale: Mapping[str, int]) -> int:
    """Return the index of the point after this part of a run of 100 %."""
    return scale["points"] * percent // 100 - 1


def series(
    results: Results, schedule: str, name: str, percent: int = 100, point: int = -1
) -> Series:
    """Return the losses of an average in the reported runs of this length, one for each seed."""
    runs = [results[Run(schedule, percent, seed).name] for seed in plan.SEEDS]
    return [result["points"][point]["report"][name] for result in runs]


def anytime(results: Results, name: str) -> list[Series]:
    """Return the losses in the constant runs after 25, 50, 75 and 100 %."""
    scale = results[Run("constant", 100, plan.SEEDS[0]).name]["scale"]
    points = [point_at(percent, scale) for percent in plan.PERCENTS]
    return [series(results, "constant", name, point=point) for point in points]


def shown(values: Sequence[float], digits: int = 4) -> str:
    """Return mean ± standard error."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    error = statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):.{digits}f} ± {error:.{digits}f}"


def minus(one: Series, other: Series) -> Series:
    return [a - b for a, b in zip(one, other, strict=True)]


def tables(results: Results) -> list[Table]:
    """Return the rates, and a table for each question of the plan."""
    return [
        rates_table(results),
        decay_table(results),
        anytime_table(results),
        widths_table(results),
        precision_table(results),
        gains_table(results),
        costs_table(results[COSTS]),
    ]


def new_table(title: str, *columns: str) -> Table:
    return Table(*columns, title=title, title_justify="left", box=box.MARKDOWN)


def rates_table(results: Results) -> Table:
    table = new_table("Rates tried with seed 0", "schedule", "%", *(f"{r:g}" for r in plan.RATES))
    for schedule in plan.SCHEDULES:
        for percent in plan.percents(schedule):
            losses = tried(schedule, percent, results)
            best = min(losses, key=lambda rate: losses[rate])
            mark = " ← edge" if best in (plan.RATES[0], plan.RATES[-1]) else " ←"
            cells = [f"{each:.4f}{mark * (rate == best)}" for rate, each in losses.items()]
            table.add_row(schedule, str(percent), *cells)
    return table


def decay_table(results: Results) -> Table:
    """Of everything at the end of the runs: the loss, and its difference to cosine's."""
    table = new_table("a. Instead of a decay", "schedule", "weights", "bits a byte", "minus cosine")
    reference = series(results, "cosine", "weights")
    for schedule in plan.SCHEDULES:
        first = results[Run(schedule, 100, plan.SEEDS[0]).name]
        for name in first["points"][-1]["report"]:
            if name not in NOT_IN_TABLE:
                found = series(results, schedule, name)
                table.add_row(schedule, name, shown(found), shown(minus(found, reference)))
    return table


def anytime_table(results: Results) -> Table:
    percents = [f"{percent} %" for percent in plan.PERCENTS]
    table = new_table("b. At any time", "schedule", "weights", *percents)
    for schedule in plan.PLANNED:
        cells = [shown(series(results, schedule, "weights", p)) for p in plan.PERCENTS]
        table.add_row(f"{schedule}, planned to end there", "weights", *cells)
    for name in ANYTIME:
        table.add_row("constant", name, *map(shown, anytime(results, name)))
    return table


def widths_table(results: Results) -> Table:
    table = new_table("c. A width chosen after training", "width", "kept", "made", "made − kept")
    for width in plan.WIDTHS:
        pair = [series(results, "constant", name(width)) for name in (plan.kept, plan.made)]
        table.add_row(f"{width:g}", *map(shown, pair), shown(minus(pair[1], pair[0]), 5))
    chosen = [chosen_losses(results, name) for name in (plan.kept, plan.made)]
    table.add_row("best to choose with", *map(shown, chosen), shown(minus(chosen[1], chosen[0]), 5))
    return table


def chosen_losses(results: Results, name: Callable[[float], str]) -> Series:
    """Return, for each seed, the reported loss of the width that is best to choose with."""
    ends = [results[Run("constant", 100, seed).name] for seed in plan.SEEDS]
    names = list(map(name, plan.WIDTHS))
    return [end["points"][-1]["report"][best_average(end, names)] for end in ends]


def precision_table(results: Results) -> Table:
    dtypes = ("bfloat16", "stochastic bfloat16")
    table = new_table("d. Averages of 16 bits, minus float32", "average", "float32", *dtypes)
    for name in plan.IN_BFLOAT16:
        exact = series(results, "constant", name)
        others = [series(results, "constant", f"{name}, {dtype}") for dtype in dtypes]
        table.add_row(name, shown(exact), *(shown(minus(each, exact), 5) for each in others))
    return table


def gains_table(results: Results) -> Table:
    table = new_table("e. BEMA and Lookahead", "weights", "bits a byte", "against", "difference")
    for schedule, name, other in (
        ("constant", "BEMA", "BEMA's EMA"),
        ("constant", "BEMA", "EMA 0.99"),
        ("lookahead", "Lookahead", "weights"),
        ("lookahead", "Lookahead", "EMA 0.99"),
    ):
        found, against = series(results, schedule, name), series(results, "constant", other)
        table.add_row(name, shown(found), f"constant, {other}", shown(minus(found, against)))
    return table


def costs_table(costs: Result) -> Table:
    """Of each way to average: milliseconds a step, and how many more than without averages."""
    table = new_table("f. Costs, one core", "averages", "ms a step", "% more than none")
    none = costs["seconds"]["none"]
    for name, seconds in costs["seconds"].items():
        more = [100 * (mine / plain - 1) for mine, plain in zip(seconds, none, strict=True)]
        table.add_row(name, shown([1000 * each for each in seconds], 2), shown(more, 1))
    return table


def write_report(results: Results, folder: Path, console: Console) -> None:
    """Print the tables, write them to results.md, and draw the pictures."""
    names = [run.name for run in plan.sweep() + plan.reported()] + [COSTS]
    if missing := [name for name in names if name not in results]:
        raise SystemExit(f"{len(missing)} runs have no result yet. Start `all` first.")
    everything = tables(results)
    for table in everything:
        console.print(table)
    write_atomically(folder / "results.md", lambda file: file.write(markdown(everything, results)))
    draw_curves(results, folder / "curves.png")
    draw_widths(results, folder / "widths.png")


def markdown(everything: Sequence[Table], results: Results) -> bytes:
    console = Console(width=160)
    with console.capture() as captured:
        heading = HEADING.format(seeds=len(plan.SEEDS), **results[COSTS]["machine"])
        console.print(heading, markup=False)
        for table in everything:
            console.print(f"## {table.title}")
            table.title = None
            console.print(table)
    return "\n".join(line.rstrip() for line in captured.get().splitlines()).encode() + b"\n"


def draw_curves(results: Results, path: Path) -> None:
    """Draw the loss against steps: one constant run, and where planned runs end."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    points = results[Run("constant", 100, plan.SEEDS[0]).name]["points"]
    steps = [point["step"] for point in points]
    for name in CURVES:
        by_point = [series(results, "constant", name, point=i) for i in range(len(steps))]
        axes.plot(steps, list(map(statistics.mean, by_point)), label=f"constant, {name}")
    for schedule, marker in zip(plan.PLANNED, "o^", strict=True):
        ends = [steps[-1] * percent // 100 for percent in plan.PERCENTS]
        losses = [series(results, schedule, "weights", percent) for percent in plan.PERCENTS]
        axes.plot(ends, list(map(statistics.mean, losses)), f"k{marker}", label=schedule)
    axes.set(xlabel="step", ylabel="bits a byte", yscale="log")
    figure.legend(loc="outside right upper")
    figure.savefig(path, dpi=120)


def draw_widths(results: Results, path: Path) -> None:
    """Draw the loss at the end against the width, kept and made after training."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name, style in ((plan.kept, "o-"), (plan.made, "x--")):
        losses = [series(results, "constant", name(width)) for width in plan.WIDTHS]
        axes.plot(plan.WIDTHS, list(map(statistics.mean, losses)), style, label=name.__name__)
    for schedule, style in zip(plan.PLANNED, ("k:", "k-."), strict=True):
        mean = statistics.mean(series(results, schedule, "weights"))
        axes.axline((0, mean), slope=0, ls=style[1:], color="k", label=schedule)
    axes.set(xlabel="relative width", ylabel="bits a byte")
    axes.legend()
    figure.savefig(path, dpi=120)
