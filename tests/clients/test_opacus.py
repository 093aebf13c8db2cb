"""opacus."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from opacus import PrivacyEngine
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clients.data import INPUTS, TARGETS
from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped


def private(wrap: Wrap) -> tuple[PrivacyEngine, Any, Any, Any]:
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    optimizer = wrap(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    engine = PrivacyEngine()
    made = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(TensorDataset(INPUTS, TARGETS), batch_size=16),
        noise_multiplier=1.0,
        max_grad_norm=1.0,
    )
    return engine, *made


def train_an_epoch(model: nn.Module, optimizer: Any, loader: Any) -> Run:
    for images, labels in loader:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return Run(model, optimizer.original_optimizer, lambda: model(INPUTS).detach())


def train(wrap: Wrap) -> Run:
    _, model, optimizer, loader = private(wrap)
    return train_an_epoch(model, optimizer, loader)


def test_private_training_is_as_without_the_wrapper() -> None:
    check_driven(train, steps=4)


def test_a_privacy_engine_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    def whole() -> Run:
        _, *parts = private(wrapped)
        train_an_epoch(*parts)
        torch.manual_seed(1)
        return train_an_epoch(*parts)

    def halves() -> Run:
        engine, model, optimizer, loader = private(wrapped)
        train_an_epoch(model, optimizer, loader)
        engine.save_checkpoint(path=tmp_path / "half", module=model, optimizer=optimizer)
        engine, model, optimizer, loader = private(wrapped)
        engine.load_checkpoint(path=tmp_path / "half", module=model, optimizer=optimizer)
        torch.manual_seed(1)
        return train_an_epoch(model, optimizer, loader)

    check_resumed(seeded(halves), seeded(whole))
