"""A training program that resumes by itself, and stops for its parent wherever it may be killed."""

from __future__ import annotations

import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from training import everything, model_with_batch_norm, train

from averaging_optim import EMA, SWA, T_ADEMA, AveragingOptimizer, Rule

ROOT = Path(__file__).parent.parent
RULES: dict[str, Rule] = {"ema": EMA(0.9), "swa": SWA(start=10, every=3), "ramp": T_ADEMA(0.99, 20)}
STEPS = 60
EVERY = 5
BLOCK = 512

Wrapped = Callable[[Iterator[nn.Parameter]], Optimizer]
Report = Callable[[str, int], None]
Save = Callable[[dict[str, Any], Path], None]


class Moment(NamedTuple):
    """Before a step, a block of a file or its replacement; or after a checkpoint was saved."""

    step: int
    event: str
    offset: int


def train_and_save(folder: Path, wrapped: Wrapped, page: str, parent: Connection) -> None:
    """Train on from the last checkpoint, saving in the way of the page, and write `end.pt`.

    Each moment is sent to the parent, and lasts until it answers.
    """

    def report(event: str, offset: int = 0) -> None:
        parent.send(Moment(step, event, offset))
        parent.recv()

    torch.set_num_threads(1)
    run, save_safely, path = new_run(wrapped), saving(page, report), folder / "checkpoint.pt"
    for step in range(resume(run, path), STEPS):
        report("step")
        train(run["model"], run["optimizer"], 1, first=step)
        run["scheduler"].step()
        if (step + 1) % EVERY == 0:
            states = {name: part.state_dict() for name, part in run.items()}
            save_safely({"step": step + 1, **states}, path)
            report("saved")
    torch.save(end_of(**run), folder / "end.pt")


def new_run(wrapped: Wrapped) -> dict[str, Any]:
    model = model_with_batch_norm()
    optimizer = AveragingOptimizer(wrapped(model.parameters()), RULES, buffers=model.buffers())
    scheduler = OneCycleLR(optimizer, max_lr=0.1, total_steps=STEPS)  # gives SGD a momentum too
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def resume(run: dict[str, Any], path: Path) -> int:
    """Load the checkpoint, if there is one, and return the step to go on from."""
    if not path.exists():
        return 0
    checkpoint = torch.load(path, weights_only=True)
    for name, part in run.items():
        part.load_state_dict(checkpoint[name])
    step: int = checkpoint["step"]
    return step


def end_of(model: nn.Module, optimizer: AveragingOptimizer, scheduler: OneCycleLR) -> Any:
    """Return all tensors of the run, and all else."""
    groups = optimizer.state_dict()["param_groups"]
    return everything(model, optimizer), [groups, scheduler.state_dict()]


def saving(page: str, report: Report) -> Save:
    """Return the page's `save_safely`, made to report what it does to its real files."""

    def watched(path: str, mode: str) -> io.BufferedWriter:
        return io.BufferedWriter(WatchedFile(path, mode, report))

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "os.rename":  # raised by `os.replace` before it acts
            report("replacing", 0)

    sys.addaudithook(watch)
    (shown,) = re.findall(r"^def save_safely\(.*?^$", (ROOT / page).read_text(), re.M | re.S)
    namespace: dict[str, Any] = {"open": watched, "os": os, "torch": torch}
    exec(shown, namespace)
    save_safely: Save = namespace["save_safely"]
    return save_safely


class WatchedFile(io.FileIO):
    """A file that is written in small blocks, each of which is reported first."""

    def __init__(self, path: str, mode: str, report: Report) -> None:
        super().__init__(path, mode)
        self._report = report

    def write(self, data: Any, /) -> int:
        self._report("writing", self.tell())
        return super().write(memoryview(data)[:BLOCK])
