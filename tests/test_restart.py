"""How many updates an average stands for, and averages that begin anew."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from training import (
    averages,
    averaging_sgd,
    fill,
    first_layer,
    frozen,
    model_with_batch_norm,
    recurrence,
    same,
    small_model,
    train,
    update_with,
    values,
)

from averaging_optim import EMA, LAWA, SWA, T_ADEMA, AveragingOptimizer, Rule

RULES: dict[str, Rule] = {
    "ema": EMA(0.75),
    "swa": SWA(),
    "t_adema": T_ADEMA(0.9, 5),
    "last": LAWA(k=3),
}


def several() -> tuple[nn.Sequential, AveragingOptimizer]:
    model = small_model()
    return model, averaging_sgd(model, RULES)


def counts(optimizer: AveragingOptimizer) -> dict[str, int]:
    return {name: optimizer.n_averaged(name) for name in optimizer.rules}


def in_groups(optimizer: AveragingOptimizer, group: int = 0) -> dict[str, int]:
    saved = optimizer.state_dict()["param_groups"][group]
    return {name: saved[f"n_averaged_{name}"] for name in optimizer.rules}


def test_the_count_is_that_in_every_parameter_group_whatever_happens() -> None:
    rules: dict[str, Rule] = {"ema": EMA(), "late": SWA(start=2, every=2), "mine": SWA(every=None)}
    model = small_model()
    optimizer = averaging_sgd(model, rules)
    assert counts(optimizer) == in_groups(optimizer) == {"ema": 0, "late": 0, "mine": 0}
    train(model, optimizer, 5)
    optimizer.update_averages("mine")
    assert counts(optimizer) == in_groups(optimizer) == {"ema": 5, "late": 1, "mine": 1}
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    assert counts(optimizer) == in_groups(optimizer, group=1)
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.restart("ema")
    assert counts(optimizer) == in_groups(optimizer) == {"ema": 0, "late": 1, "mine": 1}
    optimizer.load_state_dict(saved)
    assert counts(optimizer) == in_groups(optimizer) == {"ema": 5, "late": 1, "mine": 1}


def test_the_count_of_the_only_average_needs_no_name() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, SWA(start=1))
    train(model, optimizer, 3)
    assert optimizer.n_averaged() == 2
    with optimizer.swap_to_averaged():
        assert optimizer.n_averaged() == 2


@pytest.mark.parametrize("name", [None, "x", ""])
def test_the_count_of_an_average_that_is_not_named_is_refused(name: str | None) -> None:
    _, optimizer = several()
    message = rf"`name` must be one of 'ema', 'swa', 't_adema', 'last', got {name!r}\."
    with pytest.raises(ValueError, match=message):
        optimizer.n_averaged(name)


@pytest.mark.parametrize("before", [1, 2, 5])
def test_averages_that_are_restarted_are_those_of_what_comes_after(before: int) -> None:
    model, optimizer = several()
    train(model, optimizer, before)
    optimizer.restart()
    after = train(model, optimizer, 5, first=before)
    expected = {name: recurrence(rule, after) for name, rule in RULES.items()}
    assert frozen({name: averages(optimizer, name) for name in RULES}) == frozen(expected)
    assert counts(optimizer) == dict.fromkeys(RULES, 5)


@pytest.mark.parametrize("name", RULES)
def test_one_of_several_is_restarted_alone(name: str) -> None:
    model, optimizer = several()
    before = train(model, optimizer, 3)
    optimizer.restart(name)
    after = train(model, optimizer, 4, first=3)
    expected = {
        each: recurrence(rule, after if each == name else before + after)
        for each, rule in RULES.items()
    }
    # LAWA keeps the last three, of which there are as many without the restart.
    assert frozen({each: averages(optimizer, each) for each in RULES}) == frozen(expected)
    assert counts(optimizer) == {each: 4 if each == name else 7 for each in RULES}


def test_until_the_next_update_a_restarted_average_is_the_present_weights() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, {"swa": SWA(), "last": LAWA(k=2)}, buffers=model.buffers())
    train(model, optimizer, 3)
    teacher = optimizer.averaged_model(model, "swa")
    optimizer.restart("swa")
    present = values(model.state_dict().values())
    assert same(teacher.state_dict().values(), present)
    assert same(averages(optimizer, "swa"), model.parameters())
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    changed = values(model.state_dict().values())
    with optimizer.swap_to_averaged("swa"):
        assert same(model.state_dict().values(), changed)
    with optimizer.swap_to_averaged("last"):
        assert not same(model.state_dict().values(), changed)
    optimizer.update_averages("swa")
    assert same(teacher.state_dict().values(), changed)


def test_restarting_restarts_the_averages_of_buffers_too() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, SWA(), buffers=model.buffers())
    train(model, optimizer, 3)
    optimizer.restart()
    kept = []
    for step in range(3, 6):
        train(model, optimizer, 1, first=step)
        kept.append(values(model.buffers())[:2])
    found = optimizer.state_dict()["averaged_buffers"]["swa"]
    assert same(found[:2], recurrence(SWA(), kept))


def test_restarting_leaves_the_steps_at_which_a_rule_is_due() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, SWA(start=1, every=3))
    train(model, optimizer, 5)
    optimizer.restart()
    after = train(model, optimizer, 6, first=5)
    # After steps 7 and 10, where the third and the sixth of these are 8 and 11.
    assert same(averages(optimizer, "swa"), recurrence(SWA(), [after[1], after[4]]))


def test_a_run_that_was_restarted_is_resumed_as_one() -> None:
    model, optimizer = several()
    train(model, optimizer, 3)
    optimizer.restart()
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    other_model, other = several()
    other_model.load_state_dict(saved["model"])
    other.load_state_dict(saved["optimizer"])
    train(model, optimizer, 4, first=3)
    train(other_model, other, 4, first=3)
    assert frozen(other.state_dict()) == frozen(optimizer.state_dict())


def test_restarting_restarts_the_average_of_a_frozen_weight_too() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, SWA())
    train(model, optimizer, 3)
    first_layer(model).requires_grad_(False)
    optimizer.restart()
    present = values(first_layer(model).parameters())
    optimizer.update_averages()
    with optimizer.swap_to_averaged():
        assert same(first_layer(model).parameters(), present)


def nothing(optimizer: AveragingOptimizer, weight: Tensor) -> None:
    pass


def one_update(optimizer: AveragingOptimizer, weight: Tensor) -> None:
    optimizer.update_averages()
    fill(weight, 5.0)


@pytest.mark.parametrize("before", [nothing, one_update])
def test_restarting_early_or_twice_equals_restarting_once(
    before: Callable[[AveragingOptimizer, Tensor], None],
) -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), SWA())
    before(optimizer, weight)
    optimizer.restart()
    optimizer.restart()
    assert optimizer.n_averaged() == 0
    update_with(optimizer, weight, 8.0)
    assert same([optimizer.state[weight]["averaged_swa"]], [torch.tensor([8.0])])


def test_a_restart_inside_a_swap_is_refused_and_changes_nothing() -> None:
    model, optimizer = several()
    train(model, optimizer, 3)
    before = frozen(optimizer.state_dict())
    with (
        optimizer.swap_to_averaged("ema"),
        pytest.raises(RuntimeError, match=r"`restart` is not allowed inside `swap_to_averaged"),
    ):
        optimizer.restart("swa")
    assert frozen(optimizer.state_dict()) == before


def test_restarting_an_unknown_average_is_refused_and_changes_nothing() -> None:
    model, optimizer = several()
    train(model, optimizer, 3)
    before = frozen(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"`name` must be one of 'ema', .*, got 'x'\."):
        optimizer.restart("x")
    assert frozen(optimizer.state_dict()) == before
