"""Weighted sums of averages and weights, in the model and in exports."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from training import averages, everything, model_with_batch_norm, same, small_model, train, values

from averaging_optim import EMA, SWA, AveragingOptimizer, Formula, Rule, together

RULES: dict[str, Rule] = {"ema": EMA(0.9), "first": EMA(decay=1), "late": SWA(start=100)}


def averaging(model: nn.Module, **options: Any) -> AveragingOptimizer:
    sgd = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return AveragingOptimizer(sgd, RULES, buffers=model, **options)


def summed(*terms: tuple[float, list[Tensor]]) -> list[Tensor]:
    """Return the sum in float64."""
    lists = [[factor * tensor.detach().double() for tensor in each] for factor, each in terms]
    return [torch.stack(parts).sum(0) for parts in zip(*lists, strict=True)]


def assert_close(found: Any, expected: list[Tensor]) -> None:
    # Sums of three in float32.
    torch.testing.assert_close([each.double() for each in found], expected, rtol=1e-6, atol=1e-7)


FACTORS: dict[str, dict[str, float]] = {
    "bema": {"ema": 1.0, "first": -0.3, "weights": 0.3},
    "between": {"ema": 0.5, "weights": 0.5},
    "difference": {"ema": 1.0, "weights": -1.0},
    "weights_alone": {"weights": 2.0},
    "not_yet_averaged": {"late": 1.0, "first": 1.0},
}


@pytest.mark.parametrize("factors", FACTORS.values(), ids=FACTORS)
def test_inside_the_weights_are_the_sum_and_outside_themselves(factors: dict[str, float]) -> None:
    model = small_model()
    optimizer = averaging(model)
    optimizer.update_averages("first")
    train(model, optimizer, 5)
    terms = {
        "ema": averages(optimizer, "ema"),
        "first": averages(optimizer, "first"),
        "late": values(model.parameters()),
        "weights": values(model.parameters()),
    }
    before = everything(model, optimizer)
    with optimizer.swap_to_averaged(factors):
        expected = summed(*((factor, terms[name]) for name, factor in factors.items()))
        assert_close(model.parameters(), expected)
    assert same(everything(model, optimizer), before)


def test_the_bias_corrected_ema_is_that_of_its_paper() -> None:
    """arXiv 2508.00180: θ_EMA + α (θ − θ₀), α = (ρ + γ t)^−η, with the EMA's share (ρ + γ t)^−κ."""
    rho, gamma, eta, kappa = 10.0, 1.0, 0.2, 0.5
    model = small_model(torch.float64)
    ema = Formula(lambda n: (rho + gamma * n) ** -kappa)
    rules: dict[str, Rule] = {"ema": ema, "first": EMA(decay=1)}
    sgd = SGD(model.parameters(), lr=0.1)
    optimizer = AveragingOptimizer(sgd, rules)
    optimizer.update_averages()
    first = kept = values(model.parameters())
    for t in range(1, 21):
        (weights,) = train(model, optimizer, 1, first=t)
        share = (rho + gamma * t) ** -kappa
        kept = [(1 - share) * e + share * w for e, w in zip(kept, weights, strict=True)]
        alpha = (rho + gamma * t) ** -eta
        bema = summed((1, kept), (alpha, weights), (-alpha, first))
        with optimizer.swap_to_averaged({"ema": 1, "first": -alpha, "weights": alpha}):
            torch.testing.assert_close([*model.parameters()], bema, rtol=1e-12, atol=1e-14)


def test_exports_hold_the_sum() -> None:
    model = small_model()
    optimizer = averaging(model)
    train(model, optimizer, 5)
    exported = optimizer.averaged_state_dict(model, {"ema": 0.25, "weights": 0.75})
    terms = (0.25, averages(optimizer, "ema")), (0.75, values(model.parameters()))
    assert_close(exported.values(), summed(*terms))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_any_dtype_are_summed_in_that_of_their_averages(dtype: torch.dtype) -> None:
    model = small_model(dtype)
    optimizer = averaging(model)
    train(model, optimizer, 5)
    terms = (2.0, averages(optimizer, "ema")), (-1.0, values(model.parameters()))
    expected = [each.to(dtype) for each in summed(*terms)]
    with optimizer.swap_to_averaged({"ema": 2, "weights": -1}):
        # Twice rounded: by a sum in float32, and to the dtype.
        torch.testing.assert_close([*model.parameters()], expected)


def test_buffers_are_summed_and_variances_stay_above_0() -> None:
    model = model_with_batch_norm()
    optimizer = averaging(model)
    train(model, optimizer, 5)
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm1d)
    assert norm.running_var is not None
    with torch.no_grad():
        norm.running_var.fill_(1e-6)  # far below its average
    before = values(model.buffers())
    with optimizer.swap_to_averaged({"weights": 2, "ema": -1}):
        assert bool((norm.running_var > 0).all())
    assert same(model.buffers(), before)


def test_a_sum_may_overlap_itself_and_nothing_else() -> None:
    model = small_model()
    optimizer = averaging(model)
    train(model, optimizer, 5)
    before = values(model.parameters())
    with optimizer.swap_to_averaged({"ema": 1, "weights": 1}):
        inside = values(model.parameters())
        with optimizer.swap_to_averaged({"ema": 1, "weights": 1}):
            assert same(model.parameters(), inside)
        with pytest.raises(RuntimeError, match=r"not allowed inside `swap_to_averaged\(\{'ema': 1"):
            optimizer.swap_to_averaged("ema").__enter__()
        with pytest.raises(RuntimeError, match=r"`step` is not allowed inside"):
            optimizer.step()
        assert same(model.parameters(), inside)
    assert same(model.parameters(), before)


def test_optimizers_together_have_the_sum_of_all() -> None:
    model, whole = small_model(), small_model()
    parts = [
        AveragingOptimizer(SGD(layer.parameters(), lr=0.1, momentum=0.9), RULES)
        for layer in (model[0], model[2])
    ]
    optimizer = averaging(whole)
    for step in range(5):
        train(whole, optimizer, 1, first=step)
        for own, other in zip(model.parameters(), whole.parameters(), strict=True):
            own.grad = copy.deepcopy(other.grad)
        for part in parts:
            part.step()
    factors = {"ema": 1.5, "weights": -0.5}
    with together(*parts).swap_to_averaged(factors), optimizer.swap_to_averaged(factors):
        assert same(model.parameters(), whole.parameters())


@pytest.mark.parametrize(
    ("factors", "options", "error", "message"),
    [
        ({}, {}, ValueError, r"`name` must map some of 'ema', 'first', 'late', 'weights' to"),
        ({"x": 1.0}, {}, ValueError, r"to factors, got 'x'\."),
        ({"ema": "1"}, {}, TypeError, r"`name\['ema'\]` must be a number in \(-∞, ∞\), got '1'"),
        ({"ema": float("nan")}, {}, ValueError, r"`name\['ema'\]` must be in .*, got nan"),
        ({"ema": 1.0}, {"in_place": True}, ValueError, r"`in_place` must be False for a weighted"),
    ],
    ids=["empty", "unknown", "text", "nan", "in_place"],
)
def test_anything_but_a_sum_of_averages_is_refused(
    factors: dict[str, Any], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    optimizer = averaging(small_model())
    with pytest.raises(error, match=message):
        optimizer.swap_to_averaged(factors, **options)


def test_a_copy_of_the_model_can_be_of_one_average_only() -> None:
    model = small_model()
    unhashable: Any = {"ema": 1.0}
    with pytest.raises(ValueError, match="`name` must be one of 'ema', 'first', 'late', got"):
        averaging(model).averaged_model(model, unhashable)
