"""Whatever cannot be meant is refused with the argument's name and value, and changes nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from training import averaging_sgd, everything, small_model, train

from averaging_optim import EMA, AveragingOptimizer


@pytest.mark.parametrize(
    ("rule", "options", "error", "message"),
    [
        (
            "ema",
            {},
            TypeError,
            r"`rule` must be a Rule .* a function .*, or a mapping .*, got 'ema'\.$",
        ),
        (EMA, {}, TypeError, r"`rule` must be .*, got <class .*EMA'>\. Pass EMA\(\)\.$"),
        ({}, {}, ValueError, r"`rule` must contain at least one rule, got \{\}\."),
        ({1: EMA()}, {}, TypeError, r"`rule` must map strings to Rules, got 1: EMA"),
        ({"ema": EMA}, {}, TypeError, r"must map strings .* 'ema': <class .*\. Pass EMA\(\)\.$"),
        ({"ema": 0.9}, {}, TypeError, r"`rule` must map strings to Rules, got 'ema': 0\.9\."),
        (
            EMA(),
            {"buffers": 3},
            TypeError,
            r"`buffers` must be a model or an iterable of tensors, got 3\.",
        ),
        (
            EMA(),
            {"buffers": torch.ones(2)},
            TypeError,
            r"`buffers` must be a model or an iterable of tensors, got tensor",
        ),
        (EMA(), {"buffers": ["x"]}, TypeError, r"`buffers` must contain tensors, got 'x'\."),
        (EMA(), {"dtype": "float32"}, TypeError, r"`dtype` must be a torch\.dtype, got 'float32'"),
        (
            EMA(),
            {"dtype": torch.int32},
            ValueError,
            r"`dtype` must be floating-point, got torch\.int32\.",
        ),
        (
            EMA(),
            {"device": "gpu"},
            ValueError,
            r"`device` must be one that torch can use here, got 'gpu'\.",
        ),
        (
            EMA(),
            {"device": 0.5},
            ValueError,
            r"`device` must be one that torch can use here, got 0\.5\.",
        ),
    ],
)
def test_the_constructor_refuses(
    rule: Any, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    sgd = SGD(small_model().parameters(), lr=0.1)
    groups = repr(sgd)
    with pytest.raises(error, match=message):
        AveragingOptimizer(sgd, rule, **options)
    assert repr(sgd) == groups


def test_buffers_that_are_trained_are_refused() -> None:
    model = small_model()
    with pytest.raises(ValueError, match="`buffers` must contain no trained parameter"):
        averaging_sgd(model, EMA(), buffers=model.parameters())


def test_anything_but_an_optimizer_is_refused() -> None:
    model: Any = small_model()
    with pytest.raises(TypeError, match=r"`optimizer` must be a torch\.optim\.Optimizer, got Seq"):
        AveragingOptimizer(model, EMA())


def test_a_class_of_optimizers_is_refused_with_what_to_pass() -> None:
    kind: Any = SGD
    with pytest.raises(TypeError, match=r"got <class .*\. Pass SGD\(model\.parameters\(\)\)\.$"):
        AveragingOptimizer(kind, EMA())


def test_wrapping_twice_is_refused() -> None:
    optimizer = averaging_sgd(small_model(), EMA())
    with pytest.raises(
        TypeError, match=r"must not be an AveragingOptimizer\. Pass all rules to one"
    ):
        AveragingOptimizer(optimizer, EMA())


def test_the_average_flag_of_a_group_must_be_a_bool() -> None:
    sgd = SGD([{"params": small_model().parameters(), "average": "no"}], lr=0.1)
    with pytest.raises(TypeError, match=r"`average` must be True or False, got 'no'\."):
        AveragingOptimizer(sgd, EMA())


@pytest.mark.parametrize(
    ("group", "error", "message"),
    [
        (
            {"params": [nn.Parameter(torch.ones(1))], "average": 0},
            TypeError,
            r"`average` must be True or False, got 0\.",
        ),
        ([nn.Parameter(torch.ones(1))], TypeError, r"`param_group` must be a dict, got \[Param"),
        ({"params": "x"}, TypeError, "Tensors"),
        ({"params": [nn.Parameter(torch.ones(1)).sum()]}, ValueError, "non-leaf"),
    ],
    ids=["average", "list", "text", "non_leaf"],
)
def test_a_group_that_cannot_be_added_changes_nothing(
    group: Any, error: type[Exception], message: str
) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA())
    train(model, optimizer, 2)
    before = repr(everything(model, optimizer))
    with pytest.raises(error, match=message):
        optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    assert repr(everything(model, optimizer)) == before


def test_buffers_given_twice_are_averaged_once() -> None:
    shared = torch.ones(2)
    optimizer = averaging_sgd(small_model(), EMA(), buffers=[shared, shared])
    optimizer.update_averages()
    assert len(optimizer.state_dict()["averaged_buffers"]["ema"]) == 1
