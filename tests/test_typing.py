"""A typed use of the whole public API: mypy checks what is written here, pytest that it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from training import loss_of_batch, model_with_batch_norm, train

import averaging_optim
from averaging_optim import (
    EMA,
    LAWA,
    SWA,
    T_ADEMA,
    AveragingOptimizer,
    ExponentialRamp,
    Formula,
    HalfLifeFraction,
    Lookahead,
    PolynomialAverage,
    PowerEMA,
    PowerRamp,
    Profile,
    Rule,
    SwitchEMA,
    TFRamp,
    Together,
    describe,
    post_hoc,
    renamed,
    together,
)


class Half(Rule):
    def weight(self, n_averaged: int) -> float:
        return 0.5


def halved(n: int) -> float:
    return 2.0**-n


RULES: dict[str, Rule | Callable[[int], float]] = {
    "ema": EMA(0.9, debias=True, start=1, every=2),
    "ramped": EMA(0.9, warmup=PowerRamp(gamma=2.0, power=0.75)),
    "tf": EMA(warmup=TFRamp()),
    "half_life": EMA.from_half_life(10.0, every=1).scaled(2.0),
    "swa": SWA(),
    "t_adema": T_ADEMA(alpha=0.9, timescale=10.0),
    "polynomial": PolynomialAverage(eta=2.0),
    "narrow": PowerEMA.from_width(0.05),
    "wide": PowerEMA(gamma=6.94),
    "fraction": HalfLifeFraction(0.05),
    "last": LAWA(k=2),
    "ahead": Lookahead(alpha=0.5, every=5),
    "switch": SwitchEMA(0.9, every=5),
    "yolo": ExponentialRamp(0.9999, tau=2000.0),
    "formula": Formula(halved),
    "function": halved,
    "own": Half(every=None),
}


def test_every_public_name_is_used_here() -> None:
    assert set(averaging_optim.__all__) <= globals().keys()


def test_the_public_api_runs_as_it_is_typed() -> None:
    model: nn.Sequential = model_with_batch_norm()
    optimizer = AveragingOptimizer(
        SGD(model.parameters(), lr=0.1),
        RULES,
        buffers=model.buffers(),
        dtype=torch.float64,
        device="cpu",
        skip_nonfinite=True,
    )
    train(model, optimizer, 2)
    nothing: None = optimizer.step()
    loss: float = optimizer.step(lambda: loss_of_batch(model, 0).item())
    anything: Any = optimizer.step(closure=None)
    assert nothing is None
    assert loss > 0
    assert anything is None
    optimizer.zero_grad()
    optimizer.zero_grad(set_to_none=False)

    wrapped: Optimizer = optimizer.wrapped
    rules: Mapping[str, Rule] = optimizer.rules
    groups: list[dict[str, Any]] = optimizer.param_groups
    defaults: dict[str, Any] = optimizer.defaults
    entry: dict[str, Any] = optimizer.state[next(model.parameters())]
    assert wrapped.param_groups is groups
    assert rules["swa"] == SWA()
    assert defaults["lr"] == 0.1
    assert "averaged_swa" in entry

    optimizer.update_averages("own")
    with optimizer.swap_to_averaged("swa") as inside:
        not_a_thing: None = inside
    assert not_a_thing is None
    results: dict[str, float] = optimizer.evaluate_averages(lambda: loss_of_batch(model, 0).item())
    assert results.keys() == {"weights", *RULES}
    teacher: nn.Sequential = optimizer.averaged_model(model, "swa")
    assert not any(weight.requires_grad for weight in teacher.parameters())
    exported: dict[str, Any] = optimizer.averaged_state_dict(model, name="swa")
    optimizer.load_averaged_state_dict(model, exported, "swa", n_averaged=3)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "average": False})
    saved: dict[str, Any] = optimizer.state_dict()
    optimizer.load_state_dict(saved)

    all_of_it: Together = together(optimizer)
    with all_of_it.swap_to_averaged({"swa": 0.5, "weights": 0.5}):
        count: int = optimizer.n_averaged("swa")
    assert count > 0
    optimizer.restart("swa")
    other_names: dict[str, Any] = renamed(optimizer.state_dict(), {"swa": None})
    assert "n_averaged_swa" not in other_names["param_groups"][0]
    profile: Profile = describe(SWA(), steps=4)
    shares: tuple[float, ...] = profile.shares
    assert shares == (0.25,) * 4


def test_averages_of_other_widths_are_typed() -> None:
    model = model_with_batch_norm()
    widths = {"narrow": PowerEMA.from_width(0.05), "wide": PowerEMA.from_width(0.1)}
    optimizer = AveragingOptimizer(SGD(model.parameters(), lr=0.1), widths)
    train(model, optimizer, 4)
    found: post_hoc.Fit = post_hoc.fit([optimizer.state_dict()], 0.07, optimizer)
    residual: float = found.residual
    weights: dict[str, Any] = post_hoc.reconstruct([optimizer.state_dict()], model, 0.07, optimizer)
    assert residual >= 0
    assert all(isinstance(each, Tensor) for each in weights.values())


def test_mypy_sees_a_mistyped_name_and_so_does_python() -> None:
    optimizer = AveragingOptimizer(SGD([nn.Parameter(torch.ones(1))]), SWA())
    with pytest.raises(AttributeError, match="swap_to_averaged"):
        optimizer.swap_to_average()  # type: ignore[attr-defined]  # unused if mypy missed it
    with pytest.raises(TypeError):
        optimizer.update_averages(names="swa")  # type: ignore[call-arg]
