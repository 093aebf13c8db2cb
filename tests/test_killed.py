"""A training process that is killed, also while it saves, and resumed ends as one never killed."""

from __future__ import annotations

import contextlib
import io
import signal
import time
import zipfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import torch
from killable import EVERY, Moment, Wrapped, train_and_save
from processes import SERVER
from torch.optim import SGD, Adam
from training import same

AIMS = ["step", "writing", "replacing", "writing"] * 5
RUNS: dict[str, tuple[Wrapped, str]] = {
    "adam": (Adam, "examples/digits.py"),
    "sgd": (SGD, "docs/how-to/saving.md"),
}


class Life(NamedTuple):
    """What one process reported, and the files in its folder when it had ended."""

    kill: Moment | None
    moments: list[Moment]
    completed: bytes | None  # the checkpoint as it was when last reported as saved
    checkpoint: bytes | None
    temporary: bytes | None


class History(NamedTuple):
    lives: list[Life]
    end: Any
    expected: Any

    def killed_at(self, event: str) -> list[Life]:
        return [life for life in self.lives if life.kill and life.kill.event == event]


@pytest.fixture(scope="module", params=RUNS)
def history(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> History:
    """Run the program in one folder without a kill, and in another through all kills to its end."""
    never, often = tmp_path_factory.mktemp("never"), tmp_path_factory.mktemp("often")
    moments = live(never, request.param, None).moments
    lives = [live(often, request.param, kill) for kill in [*kills(moments), None]]
    return History(lives, torch.load(often / "end.pt"), torch.load(never / "end.pt"))


def kills(moments: list[Moment]) -> list[Moment]:
    """Choose as many moments of each kind as there are aims, three before the first checkpoint."""
    random = Random(0)
    first = [moment for moment in moments if moment.step < EVERY]
    ranges = [first] * 3 + [moments] * (len(AIMS) - 3)
    chosen = [
        random.choice([moment for moment in among if moment.event == aim])
        for aim, among in zip(AIMS, ranges, strict=True)
    ]
    return sorted(chosen, key=lambda moment: moment.step)


def live(folder: Path, run: str, kill: Moment | None) -> Life:
    """Start the program, and let it go on from moment to moment to the kill or its end."""
    path = folder / "checkpoint.pt"
    here, there = SERVER.Pipe()
    process = SERVER.Process(target=train_and_save, args=(folder, *RUNS[run], there))
    process.start()
    there.close()
    moments: list[Moment] = []
    completed = content(path)
    for moment in answered(here):
        moments.append(moment)
        if moment.event == "saved":
            completed = content(path)
        # Not ==: what was loaded shares fewer strings, and takes a few bytes more.
        if kill and moment[:2] == kill[:2] and moment.offset >= kill.offset:
            if kill.event == "step":  # to die at work: at other moments it dies where it waits
                here.send(None)
                time.sleep(Random(kill.step).uniform(0, 0.002))
            process.kill()
            break
    process.join()
    assert process.exitcode == (-signal.SIGKILL if kill else 0)
    return Life(kill, moments, completed, content(path), content(folder / "checkpoint.pt.tmp"))


def answered(reports: Connection) -> Iterator[Moment]:
    """Yield what the process reports, and let it go on when the next report is asked for."""
    with reports, contextlib.suppress(EOFError):
        while True:
            yield reports.recv()
            reports.send(None)


def content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None


def step_of(checkpoint: bytes | None) -> int:
    step: int = torch.load(io.BytesIO(checkpoint))["step"] if checkpoint else 0
    return step


def test_a_run_killed_twenty_times_ends_bit_for_bit_as_one_never_killed(history: History) -> None:
    assert len(history.lives) == 20 + 1
    (tensors, others), (expected_tensors, expected_others) = history.end, history.expected
    assert same(tensors, expected_tensors)
    assert others == expected_others


def test_every_life_resumes_from_the_last_complete_checkpoint(history: History) -> None:
    starts = [life.moments[0] for life in history.lives]
    saved = [step_of(life.completed) for life in history.lives]
    assert starts == [Moment(step, "step", 0) for step in [0, *saved[:-1]]]
    assert saved[:3] == [0, 0, 0]


def test_no_kill_harms_the_last_complete_checkpoint(history: History) -> None:
    assert all(life.checkpoint == life.completed for life in history.lives)


def test_half_of_the_kills_cut_off_a_checkpoint_that_was_being_written(history: History) -> None:
    cut = [life.temporary for life in history.killed_at("writing")]
    assert len(cut) == 10
    assert not any(part is None or zipfile.is_zipfile(io.BytesIO(part)) for part in cut)


def test_a_kill_before_the_replacement_leaves_the_new_checkpoint_unused(history: History) -> None:
    lives = history.killed_at("replacing")
    assert len(lives) == 5
    unused = [step_of(life.temporary) for life in lives]
    assert unused == [step_of(life.checkpoint) + EVERY for life in lives]
