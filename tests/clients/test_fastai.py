"""fastai's Learner makes, drives, saves and resumes the wrapper in its OptimWrapper."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from fastai.tabular.all import DataLoader, DataLoaders, Learner, OptimWrapper
from torch import nn

from clients.data import INPUTS, TARGETS
from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped


def learner(wrap: Wrap, folder: Path | None = None) -> Any:
    def adamw(parameters: Any, **arguments: Any) -> Any:
        return wrap(torch.optim.AdamW(parameters, **arguments))

    data = list(zip(INPUTS, TARGETS, strict=True))
    loaders = DataLoaders(DataLoader(data, bs=16), DataLoader(data[:16], bs=16))
    model = nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10))
    learn = Learner(
        loaders, model, nn.functional.cross_entropy, partial(OptimWrapper, opt=adamw), path=folder
    )
    learn.remove_cbs([learn.progress, learn.recorder])
    return learn


def run_of(learn: Any) -> Run:
    return Run(learn.model, learn.opt.opt, lambda: learn.get_preds()[0])


def train(wrap: Wrap) -> Run:
    learn = learner(wrap)
    learn.fit_one_cycle(2, 0.01)
    return run_of(learn)


def test_one_cycle_trains_as_without_the_wrapper() -> None:
    check_driven(train, steps=8)


def test_a_learner_resumes_from_what_it_has_saved(tmp_path: Path) -> None:
    def whole() -> Run:
        learn = learner(wrapped)
        learn.fit(1, 0.01)
        torch.manual_seed(1)
        learn.fit(1, 0.01)
        return run_of(learn)

    def halves() -> Run:
        first = learner(wrapped, tmp_path)
        first.fit(1, 0.01)
        first.save("half")
        second = learner(wrapped, tmp_path).load("half")
        torch.manual_seed(1)
        second.fit(1, 0.01)
        return run_of(second)

    check_resumed(seeded(halves), seeded(whole))
