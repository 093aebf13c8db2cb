"""Lightning Fabric sets up, saves and resumes the wrapper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clients.data import INPUTS, TARGETS
from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped

FABRIC = Fabric(accelerator="cpu", devices=1)


def set_up(wrap: Wrap) -> dict[str, Any]:
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    optimizer = wrap(torch.optim.Adam(model.parameters(), lr=0.01))
    model, optimizer = FABRIC.setup(model, optimizer)
    return {"model": model, "optimizer": optimizer}


def train_an_epoch(model: Any, optimizer: Any) -> Run:
    for images, labels in FABRIC.setup_dataloaders(
        DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=16)
    ):
        optimizer.zero_grad()
        FABRIC.backward(nn.functional.cross_entropy(model(images), labels))
        FABRIC.clip_gradients(model, optimizer, max_norm=1.0)
        optimizer.step()
    return Run(model, optimizer.optimizer, lambda: model(INPUTS).detach())


def test_a_loop_trains_as_without_the_wrapper() -> None:
    check_driven(lambda wrap: train_an_epoch(**set_up(wrap)), steps=4)


def test_a_loop_resumes_from_what_fabric_has_saved(tmp_path: Path) -> None:
    def whole() -> Run:
        parts = set_up(wrapped)
        train_an_epoch(**parts)
        return train_an_epoch(**parts)

    def halves() -> Run:
        first, second = set_up(wrapped), set_up(wrapped)
        train_an_epoch(**first)
        FABRIC.save(tmp_path / "half", first)
        FABRIC.load(tmp_path / "half", second)
        return train_an_epoch(**second)

    check_resumed(seeded(halves), seeded(whole))
