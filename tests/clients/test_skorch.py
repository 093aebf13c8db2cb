"""skorch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from skorch import NeuralNetClassifier
from torch import nn

from clients.data import IMAGES, LABELS
from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped


def classifier(wrap: Wrap) -> Any:
    def adam(parameters: Any, **arguments: Any) -> Any:
        return wrap(torch.optim.Adam(parameters, **arguments))

    module = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10), nn.Softmax(-1))
    return NeuralNetClassifier(
        module, optimizer=adam, lr=0.01, batch_size=16, max_epochs=2, train_split=None, verbose=0
    )


def run_of(net: Any) -> Run:
    return Run(net.module_, net.optimizer_, lambda: torch.tensor(net.predict_proba(IMAGES)))


def train(wrap: Wrap) -> Run:
    return run_of(classifier(wrap).fit(IMAGES, LABELS))


def test_a_net_is_fitted_as_without_the_wrapper() -> None:
    check_driven(train, steps=8)


def test_partial_fit_resumes_from_saved_params(tmp_path: Path) -> None:
    files = {"f_params": str(tmp_path / "p"), "f_optimizer": str(tmp_path / "o")}

    def halves() -> Run:
        classifier(wrapped).fit(IMAGES, LABELS).save_params(**files)
        resumed = classifier(wrapped).initialize()
        resumed.load_params(**files)
        return run_of(resumed.partial_fit(IMAGES, LABELS))

    def whole() -> Run:
        return run_of(classifier(wrapped).fit(IMAGES, LABELS).partial_fit(IMAGES, LABELS))

    check_resumed(seeded(halves), seeded(whole))
