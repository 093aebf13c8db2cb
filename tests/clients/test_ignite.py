"""ignite."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from ignite.engine import create_supervised_evaluator, create_supervised_trainer
from ignite.handlers import Checkpoint, DiskSaver
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clients.data import INPUTS, TARGETS
from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped

LOADER: Any = DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=16)


def parts(wrap: Wrap) -> dict[str, Any]:
    """Return what a checkpoint is told to save."""
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    optimizer = wrap(torch.optim.Adam(model.parameters(), lr=0.01))
    trainer = create_supervised_trainer(model, optimizer, nn.CrossEntropyLoss())
    return {"trainer": trainer, "model": model, "optimizer": optimizer}


def run_of(parts: dict[str, Any]) -> Run:
    evaluator = create_supervised_evaluator(parts["model"])

    def evaluate() -> Any:
        return evaluator.run([(INPUTS, TARGETS)]).output[0]

    return Run(parts["model"], parts["optimizer"], evaluate)


def train(wrap: Wrap) -> Run:
    made = parts(wrap)
    made["trainer"].run(LOADER, max_epochs=2)
    return run_of(made)


def test_an_engine_trains_as_without_the_wrapper() -> None:
    check_driven(train, steps=8)


def test_an_engine_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    def halves() -> Run:
        first, second = parts(wrapped), parts(wrapped)
        first["trainer"].run(LOADER, max_epochs=1)
        checkpoint = Checkpoint(first, DiskSaver(str(tmp_path)))
        checkpoint(first["trainer"])
        Checkpoint.load_objects(second, tmp_path / str(checkpoint.last_checkpoint))
        second["trainer"].run(LOADER, max_epochs=2)
        return run_of(second)

    check_resumed(seeded(halves), seeded(train, wrapped))
