"""The language-model example: runs resume exactly, the plan is whole, its report is made."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import language_plan as plan
import pytest
from language_model import everything, measured_costs
from language_plan import SMALL, Run
from language_results import COSTS, read_results, write_json
from language_training import PARTS, Corpus, standard_library, train

PROGRAM = Path(__file__).parent.parent / "examples" / "language_model.py"
KINDS = [(schedule, percent) for schedule in plan.SCHEDULES for percent in plan.percents(schedule)]
MISSING = ["cosine-025-rate-0.004", "wsd-025-seed-1"]


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return standard_library()


class StoppedError(Exception):
    pass


def stop_after(steps: int) -> Callable[[], None]:
    """Return what is called after each step, and raises after so many."""
    left = iter(range(steps - 1))

    def progress() -> None:
        if next(left, None) is None:
            raise StoppedError

    return progress


def trained(path: Path) -> dict[str, Any]:
    """Return the result of a run without what differs between two of the same."""
    result: dict[str, Any] = json.loads(path.read_text())
    del result["seconds"]
    return result


@pytest.fixture(scope="module")
def constant(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The result of a constant run that never stopped."""
    return trained(train(run_of("constant"), SMALL, corpus, tmp_path_factory.mktemp("constant")))


def run_of(schedule: str, percent: int = 100) -> Run:
    return Run(schedule, percent, seed=7, rate=0.01)


def resumed(schedule: str, corpus: Corpus, folder: Path) -> dict[str, Any]:
    """Return the result of a run that was stopped after 10 steps, and resumed."""
    with pytest.raises(StoppedError):
        train(run_of(schedule), SMALL, corpus, folder, progress=stop_after(10))
    remaining: list[None] = []
    path = train(
        *(run_of(schedule), SMALL, corpus, folder),
        resume=True,
        progress=lambda: remaining.append(None),
    )
    assert len(remaining) == SMALL.steps - 8  # there is a point after every fourth step
    assert list(folder.iterdir()) == [path]
    return trained(path)


def test_a_constant_run_that_was_stopped_and_resumed_is_the_run_that_never_stopped(
    constant: dict[str, Any], corpus: Corpus, tmp_path: Path
) -> None:
    assert resumed("constant", corpus, tmp_path) == constant


@pytest.mark.parametrize("schedule", ["cosine", "wsd", "lookahead"])
def test_a_run_that_was_stopped_and_resumed_is_the_run_that_never_stopped(
    schedule: str, corpus: Corpus, tmp_path: Path
) -> None:
    never_stopped = train(run_of(schedule), SMALL, corpus, tmp_path / "whole")
    assert resumed(schedule, corpus, tmp_path / "parts") == trained(never_stopped)


@pytest.mark.parametrize("width", plan.SAVED_WIDTHS)
def test_a_width_made_after_training_is_the_one_that_was_kept(
    width: float, constant: dict[str, Any]
) -> None:
    last = constant["points"][-1]["report"]
    # Made in float64 and kept in float32.
    assert last[plan.made(width)] == pytest.approx(last[plan.kept(width)], rel=1e-5)


def test_training_learns(constant: dict[str, Any]) -> None:
    losses = [point["choose"]["weights"] for point in constant["points"]]
    assert losses == sorted(losses, reverse=True)


def test_each_run_of_the_plan_has_a_name_of_its_own() -> None:
    names = [run.name for run in everything()]
    assert len(set(names)) == len(names)


def test_the_plan_takes_as_many_lengths_of_a_run_as_its_budget_says() -> None:
    assert plan.__doc__ is not None
    lengths = sum(run.percent for run in everything()) / 100
    assert re.findall(r"(\d+) lengths", plan.__doc__) == [f"{lengths:g}"]


def test_all_parts_of_the_text_differ(corpus: Corpus) -> None:
    texts = [corpus.texts[part].numpy().tobytes() for part in PARTS]
    assert len(set(texts)) == len(PARTS)
    assert all(corpus.about["bytes"][part] > 100_000 for part in PARTS)


def nearly_all_results(corpus: Corpus, folder: Path) -> None:
    """Write a result for each run of the plan but two; those of a kind share a training."""
    for schedule, percent in KINDS:
        path = train(run_of(schedule, percent), SMALL, corpus, folder)
        result = json.loads(path.read_text())
        path.unlink()
        for run in everything():
            if (run.schedule, run.percent) == (schedule, percent) and run.name not in MISSING:
                write_json(folder / f"{run.name}.json", result | {"rate": run.rate or 0.01})
    write_json(folder / f"{COSTS}.json", measured_costs(SMALL, corpus, steps=1))


def run_program(folder: Path, *arguments: str) -> str:
    command = [sys.executable, str(PROGRAM), "--small", f"--folder={folder}", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_what_is_missing_is_made_and_all_is_reported(corpus: Corpus, tmp_path: Path) -> None:
    nearly_all_results(corpus, tmp_path)
    before = read_results(tmp_path)
    assert "2 runs of 90" in run_program(tmp_path, "all", "--processes=1")
    after = read_results(tmp_path)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == set(MISSING)
    assert after["wsd-025-seed-1"]["rate"] in plan.RATES

    run_program(tmp_path, "report")
    report = (tmp_path / "results.md").read_text()
    assert re.findall(r"^## (\w)\.", report, re.MULTILINE) == list("abcdef")
    for picture in ("curves.png", "widths.png"):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")
