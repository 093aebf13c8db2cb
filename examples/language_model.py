"""Does averaging replace the decay? A small language model learns Python's standard library.

`language_plan.py` has the questions and the runs, fixed before the first of them; the model and
its training are in `language_training.py`. Each run has a file for its result. `all` makes those
that are missing, so you can stop it and start it again at any time.

    python examples/language_model.py list      # the runs, and which of them have a result
    python examples/language_model.py run constant-100-rate-0.004 --resume
    python examples/language_model.py all       # up to three hours of two cores
    python examples/language_model.py report    # tables and pictures of the results
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import language_plan as plan
import torch
from language_plan import Run, Scale
from language_results import COSTS, read_results, write_json, write_report
from language_training import (
    Corpus,
    Decoder,
    Training,
    bits_a_byte,
    plain_optimizers,
    standard_library,
    train,
)
from rich import box
from rich.console import Console
from rich.table import Table
from torch.optim import Optimizer
from tqdm import tqdm

from averaging_optim import EMA, LAWA, AveragingOptimizer, PowerEMA, Rule, together

FOLDER = Path(__file__).with_suffix("")
BYTES_A_SECOND = 14_000  # of one core, evaluation included: see the budget in language_plan.py
BLOCKS = 5  # of steps that are timed

Step = Callable[[int], object]


def run_one(run: Run, scale: Scale, folder: Path, *, resume: bool) -> None:
    """Train, with a bar of the steps, and write the result."""
    torch.set_num_threads(1)
    progress: tqdm[NoReturn]
    with tqdm(total=scale.steps_of(run.percent), desc=run.name, unit="step") as progress:
        train(run, scale, standard_library(), folder, resume=resume, progress=progress.update)


def run_in_pool(run: Run, scale: Scale, folder: Path) -> Run:
    torch.set_num_threads(1)
    train(run, scale, standard_library(), folder, resume=True)
    return run


def run_all(scale: Scale, folder: Path, processes: int, console: Console) -> None:
    """Make the results that are missing, one process a core, and continue runs that were stopped.

    The rates are found before the runs that need them, and costs measured when all else is done.
    """
    console.print(forecast(missing_of(everything(), folder), scale, processes))
    for runs in (plan.sweep(), plan.reported()):
        run_side_by_side(missing_of(runs, folder), scale, folder, processes)
    if COSTS not in read_results(folder):
        console.print("Measuring what averaging costs, on one core.")
        write_json(folder / f"{COSTS}.json", measured_costs(scale, standard_library()))


def everything() -> list[Run]:
    return plan.sweep() + plan.reported()


def missing_of(runs: Sequence[Run], folder: Path) -> list[Run]:
    """Return the runs without a result, longest first, so that the cores end together."""
    done = read_results(folder)
    return sorted((run for run in runs if run.name not in done), key=lambda run: -run.percent)


def bytes_of(run: Run, scale: Scale) -> int:
    return scale.steps_of(run.percent) * scale.batch * scale.context


def forecast(runs: Sequence[Run], scale: Scale, processes: int) -> str:
    total = sum(bytes_of(run, scale) for run in runs)
    minutes = total / BYTES_A_SECOND / processes / 60
    return (
        f"{len(runs)} runs of {len(everything())} have no result yet: {total / 1e6:.0f} million "
        f"bytes to train on, about {minutes:.0f} minutes if {processes} cores are idle. "
        "Stop with Ctrl-C, and start again to continue."
    )


def run_side_by_side(runs: Sequence[Run], scale: Scale, folder: Path, processes: int) -> None:
    if not runs:
        return
    # Spawned, as torch is not safe to fork once it has threads. Ctrl-C is for the parent alone.
    context = multiprocessing.get_context("spawn")
    execute = partial(run_in_pool, scale=scale, folder=folder)
    total = sum(bytes_of(run, scale) for run in runs)
    ignore_interrupts = (signal.SIGINT, signal.SIG_IGN)
    progress: tqdm[NoReturn]
    with (
        context.Pool(min(processes, len(runs)), signal.signal, ignore_interrupts) as pool,
        tqdm(total=total, unit="B", unit_scale=True) as progress,
    ):
        for run in pool.imap_unordered(execute, runs):
            progress.write(f"{run.name} is done.")
            progress.update(bytes_of(run, scale))


def measured_costs(scale: Scale, corpus: Corpus, steps: int = 40) -> dict[str, Any]:
    """Return way to average → seconds of a step, the median of each block.

    The ways take turns step by step, so that what else the machine does slows all of them.
    """
    torch.set_num_threads(1)
    ways = ways_to_average(scale, corpus)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for block in tqdm(range(BLOCKS), unit="block"):
        rounds = [
            {name: timed(step, block * steps + i) for name, step in ways.items()}
            for i in range(steps)
        ]
        for name, medians in seconds.items():
            medians.append(statistics.median(each[name] for each in rounds))
    return {"seconds": seconds}


def timed(step: Step, number: int) -> float:
    begin = time.perf_counter()
    step(number)
    return time.perf_counter() - begin


def ways_to_average(scale: Scale, corpus: Corpus) -> dict[str, Step]:
    widths = {plan.kept(width): PowerEMA.from_width(width) for width in plan.WIDTHS}
    step = partial(stepper, scale, corpus)
    constant = Training(Run("constant", 100, plan.SWEEP_SEED), scale, corpus)
    return {
        "none": step({}),
        "EMA": step({"EMA": EMA(0.99)}),
        "EMA, with a swap after each step": step({"EMA": EMA(0.99)}, swaps=True),
        "EMA every 10 steps": step({"EMA": EMA(0.9, every=10)}),
        "EMA in bfloat16": step({"EMA": EMA(0.99)}, dtype=torch.bfloat16),
        "EMA in bfloat16, stochastic": step(
            {"EMA": EMA(0.99)}, dtype=torch.bfloat16, rounding="stochastic"
        ),
        "LAWA of 8": step({"LAWA": LAWA(8)}),
        "a dozen PowerEMA": step(dict(widths)),
        "all of a constant run": lambda _: constant.step(rate=0.0),
    }


def stepper(
    scale: Scale, corpus: Corpus, rules: dict[str, Rule], *, swaps: bool = False, **options: Any
) -> Step:
    """Return a training step with these averages, or the same without any."""
    model = Decoder(scale.width, scale.layers, scale.context)
    plain = plain_optimizers(model)
    averaging = [AveragingOptimizer(each, rules, **options) for each in plain] if rules else []
    optimizers: Sequence[Optimizer] = averaging or plain

    def step(number: int) -> None:
        for optimizer in optimizers:
            optimizer.zero_grad()
        bits_a_byte(model, corpus.batch(scale, plan.SWEEP_SEED, number)).backward()
        for optimizer in optimizers:
            optimizer.step()
        if swaps:
            with together(*averaging).swap_to_averaged():
                pass

    return step


def check_alike(scale: Scale, folder: Path) -> None:
    """Refuse to add results of another size or text to those in the folder."""
    text = standard_library().about["sha256"]
    for name, result in read_results(folder).items():
        if name != COSTS and (result["scale"], result["corpus"]["sha256"]) != (vars(scale), text):
            raise SystemExit(
                f"{folder / name}.json is of another size of run or another Python's library "
                f"({result['corpus']['python']}). Use that Python, or another `--folder`."
            )


def listing(folder: Path) -> Table:
    results = read_results(folder)
    table = Table("run", "rate", "seconds", box=box.MARKDOWN)
    for run in everything():
        result = results.get(run.name)
        cells = (f"{result['rate']:g}", f"{result['seconds']:.0f}") if result else ("", "")
        table.add_row(run.name, *cells)
    return table


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the results are")
    parser.add_argument("--small", action="store_true", help="tiny runs, to try the program")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="show the runs of the plan")
    commands.add_parser("report", help="print the tables and draw the pictures")
    run = commands.add_parser("run", help="train once")
    run.add_argument("name", choices=[each.name for each in everything()], metavar="NAME")
    run.add_argument("--resume", action="store_true", help="continue where it was stopped")
    every = commands.add_parser("all", help="make all results that are missing")
    every.add_argument("--processes", type=int, default=os.cpu_count(), help="one a core")
    return parser.parse_args()


def main() -> None:
    arguments = parsed()
    scale, folder = plan.SMALL if arguments.small else Scale(), arguments.folder
    check_alike(scale, folder)
    console = Console()
    if arguments.command == "run":
        run = next(each for each in everything() if each.name == arguments.name)
        run_one(run, scale, folder, resume=arguments.resume)
    elif arguments.command == "all":
        try:
            run_all(scale, folder, arguments.processes, console)
        except KeyboardInterrupt:
            raise SystemExit("Stopped. Start again to continue.") from None
    elif arguments.command == "list":
        console.print(listing(folder))
    else:
        write_report(read_results(folder), folder, console)


if __name__ == "__main__":
    main()
