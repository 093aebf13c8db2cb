"""fastai's Learner makes, drives, saves and resumes the wrapper in its OptimWrapper."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from fastai.tabular.all import (
    DataLoader,
    DataLoaders,
    GradientAccumulation,
    GradientClip,
    Learner,
    OptimWrapper,
    params,
)
from torch import nn

from clients.data import INPUTS, TARGETS
from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped


def learner(wrap: Wrap, folder: Path | None = None) -> Any:
    def adamw(parameters: Any, **arguments: Any) -> Any:
        return wrap(torch.optim.AdamW(parameters, **arguments))

    def body_and_head(model: Any) -> list[Any]:
        return [params(model[:3]), params(model[3:])]

    data = list(zip(INPUTS, TARGETS, strict=True))
    learn = Learner(
        DataLoaders(DataLoader(data, bs=16), DataLoader(data[:16], bs=16)),
        nn.Sequential(nn.Linear(64, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 10)),
        nn.functional.cross_entropy,
        partial(OptimWrapper, opt=adamw),
        splitter=body_and_head,
        path=folder,
    )
    learn.remove_cb(learn.progress)
    learn.logger = lambda *_: None
    return learn


def run_of(learn: Any) -> Run:
    return Run(learn.model, learn.opt.opt, lambda: learn.get_preds()[0])


def fit_one_cycle(learn: Any) -> None:
    learn.fit_one_cycle(2, 0.01)


def fine_tune(learn: Any) -> None:
    learn.fine_tune(1, 0.01)


def accumulate(learn: Any) -> None:
    learn.fit(4, 0.01, cbs=[GradientAccumulation(32), GradientClip(0.1)])


@pytest.mark.parametrize("fit", [fit_one_cycle, fine_tune, accumulate])
def test_a_learner_trains_as_without_the_wrapper(fit: Callable[[Any], None]) -> None:
    def train(wrap: Wrap) -> Run:
        learn = learner(wrap)
        fit(learn)
        return run_of(learn)

    check_driven(train, steps=8)


def test_finding_a_learning_rate_leaves_nothing_in_the_average(tmp_path: Path) -> None:
    def trained(learn: Any) -> Run:
        fit_one_cycle(learn)
        return run_of(learn)

    def found() -> Any:
        learn = learner(wrapped, tmp_path)
        learn.lr_find(num_it=5, show_plot=False)
        return learn

    check_resumed(seeded(lambda: trained(found())), seeded(lambda: trained(learner(wrapped))))


def test_a_learner_resumes_from_what_it_has_saved(tmp_path: Path) -> None:
    def whole() -> Run:
        learn = learner(wrapped)
        learn.fit(1, 0.01)
        learn.fit(1, 0.01)
        return run_of(learn)

    def halves() -> Run:
        first = learner(wrapped, tmp_path)
        first.fit(1, 0.01)
        first.save("half")
        second = learner(wrapped, tmp_path).load("half")
        second.fit(1, 0.01)
        return run_of(second)

    check_resumed(seeded(halves), seeded(whole))
