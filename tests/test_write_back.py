"""Averages that the weights go on from, step by step beside the algorithms as published."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from training import (
    assert_same_steps,
    averages,
    averaging_sgd,
    fill,
    loss_of_batch,
    model_with_batch_norm,
    recurrence,
    same,
    small_model,
    train,
    values,
)

from averaging_optim import EMA, SWA, AveragingOptimizer, Lookahead, Rule, SwitchEMA

STEPS = 12
OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "sgd": lambda weights: SGD(weights, lr=0.1, momentum=0.9),
    "adam": lambda weights: Adam(weights, lr=0.01),
}


@torch.no_grad()
def copy_all(targets: Any, sources: list[Tensor]) -> None:
    for target, source in zip(targets, sources, strict=True):
        target.copy_(source)


def lookahead(inner: str, alpha: float, k: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield slow and fast weights after each step, as Zhang et al. have them (Algorithm 1)."""
    model = small_model()
    optimizer = OPTIMIZERS[inner](model.parameters())
    slow = values(model.parameters())
    for t in range(1, STEPS + 1):
        train(model, optimizer, 1, first=t - 1)
        if t % k == 0:
            fast = values(model.parameters())
            slow = [s.lerp(f, alpha) for s, f in zip(slow, fast, strict=True)]
            copy_all(model.parameters(), slow)
        yield slow, values(model.parameters())


def switch_ema(inner: str, decay: float, every: int) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Yield average and weights after each step, as Li et al. have them (Algorithm 1)."""
    model = small_model()
    optimizer = OPTIMIZERS[inner](model.parameters())
    ema = values(model.parameters())
    for t in range(1, STEPS + 1):
        train(model, optimizer, 1, first=t - 1)
        ema = [a.lerp(w, 1 - decay) for a, w in zip(ema, values(model.parameters()), strict=True)]
        if t % every == 0:
            copy_all(model.parameters(), ema)
        yield ema, values(model.parameters())


@pytest.mark.parametrize("inner", OPTIMIZERS)
@pytest.mark.parametrize(
    ("rule", "published"),
    [
        (Lookahead(), lambda inner: lookahead(inner, 0.5, 5)),
        (Lookahead(alpha=0.8, every=1), lambda inner: lookahead(inner, 0.8, 1)),
        (Lookahead(alpha=0, every=4), lambda inner: lookahead(inner, 0, 4)),
        (SwitchEMA(0.9, every=4), lambda inner: switch_ema(inner, 0.9, 4)),
        (SwitchEMA(0.5, every=1), lambda inner: switch_ema(inner, 0.5, 1)),
    ],
    ids=repr,
)
def test_each_step_is_the_published_one_bit_for_bit(
    rule: Rule, published: Callable[[str], Any], inner: str
) -> None:
    model = small_model()
    optimizer = AveragingOptimizer(OPTIMIZERS[inner](model.parameters()), {"one": rule})
    for step, (average, weights) in enumerate(published(inner)):
        train(model, optimizer, 1, first=step)
        assert same(model.parameters(), weights)
        assert same(averages(optimizer, "one"), average)


def test_lookahead_with_alpha_1_leaves_training_as_it_is() -> None:
    plain, ahead = small_model(), small_model()
    expected = train(plain, OPTIMIZERS["adam"](plain.parameters()), STEPS)
    optimizer = AveragingOptimizer(OPTIMIZERS["adam"](ahead.parameters()), Lookahead(alpha=1))
    assert_same_steps(train(ahead, optimizer, STEPS), expected)


@pytest.mark.parametrize(
    "rule", [Lookahead(0.5, start=3, every=2), SwitchEMA(0.5, start=3, every=2)]
)
def test_a_late_start_begins_with_the_weights_after_so_many_steps(rule: Rule) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, {"one": rule})
    began = train(model, optimizer, 3)[-1]
    assert same(averages(optimizer, "one"), began)
    assert optimizer.param_groups[0]["n_averaged_one"] == 1
    train(model, optimizer, 2, first=3)
    assert same(averages(optimizer, "one"), values(model.parameters()))
    assert not same(began, model.parameters())


@pytest.mark.parametrize("names", [["ahead", "ema", "mean"], ["ema", "mean", "ahead"]], ids=str)
def test_other_averages_are_of_the_weights_after_the_write_back(names: list[str]) -> None:
    rules = {"ahead": Lookahead(every=2), "ema": EMA(0.5), "mean": SWA(start=3, every=3)}
    model = small_model()
    optimizer = averaging_sgd(model, {name: rules[name] for name in names})
    snapshots = train(model, optimizer, STEPS)
    for name in ("ema", "mean"):
        assert same(averages(optimizer, name), recurrence(rules[name], snapshots))


def test_averages_that_write_back_do_so_one_after_the_other() -> None:
    weight = nn.Parameter(torch.zeros(1))
    rules = {"first": Lookahead(0.5, every=1), "second": Lookahead(0.25, every=1)}
    optimizer = AveragingOptimizer(SGD([weight], lr=1.0), rules)
    weight.grad = -torch.full((1,), 16.0)
    optimizer.step()  # 0 → 16, half of it is 8, a quarter of that is 2
    assert averages(optimizer, "first") == [8.0]
    assert averages(optimizer, "second") == [2.0]
    assert weight.item() == 2


def test_low_precision_weights_are_those_of_the_average_rounded() -> None:
    model = small_model(torch.bfloat16)
    optimizer = averaging_sgd(model, {"one": Lookahead(every=2)})
    train(model, optimizer, 4)
    kept = averages(optimizer, "one")
    assert {average.dtype for average in kept} == {torch.float32}
    assert same(model.parameters(), [average.bfloat16() for average in kept])
    assert not same(kept, [weight.float() for weight in model.parameters()])


def test_an_average_of_less_precision_does_not_round_the_weights_as_it_begins() -> None:
    model = small_model()
    began = values(model.parameters())
    optimizer = averaging_sgd(model, Lookahead(every=None), dtype=torch.bfloat16)
    optimizer.update_averages()
    assert same(model.parameters(), began)
    optimizer.update_averages()
    assert same(model.parameters(), [weight.bfloat16().float() for weight in began])


def test_averaged_buffers_are_written_back_with_the_weights() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, Lookahead(every=2), buffers=model.buffers())
    train(model, optimizer, 4)
    written = values([*model.parameters(), *model.buffers()])
    with optimizer.swap_to_averaged():
        assert same([*model.parameters(), *model.buffers()], written)


def test_a_group_that_is_not_averaged_is_not_written_to() -> None:
    model = small_model()
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "average": False},
    ]
    optimizer = AveragingOptimizer(SGD(groups, lr=0.1), Lookahead(alpha=0, every=1))
    began = values(model.parameters())
    train(model, optimizer, 3)
    assert same(model[0].parameters(), began[:2])
    assert not same(model[2].parameters(), began[2:])


def test_the_step_that_initialises_the_state_does_not_start_the_average() -> None:
    """torch.distributed.checkpoint takes such a step, before it loads the weights."""
    weight = nn.Parameter(torch.zeros(1))
    optimizer = AveragingOptimizer(SGD([weight], lr=0.0), Lookahead(0.5, every=1))
    weight.grad = torch.zeros(1)
    optimizer.step()
    assert optimizer.param_groups[0]["n_averaged_lookahead"] == 0
    fill(weight, 4.0)
    weight.grad = -torch.ones(1)
    optimizer.param_groups[0]["lr"] = 2.0
    optimizer.step()  # 4 → 6
    assert weight.item() == 5


def test_a_first_step_that_is_skipped_does_not_begin_twice() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = AveragingOptimizer(SGD([weight], lr=1.0, fused=True), Lookahead(0.5, every=1))
    scaler = torch.amp.GradScaler("cpu")
    for gradient in (torch.inf, -4.0):
        optimizer.zero_grad()
        loss: Any = scaler.scale((weight * gradient).sum())
        loss.backward()
        scaler.step(optimizer)
        scaler.update()
    assert weight.item() == 2
    assert optimizer.param_groups[0]["n_averaged_lookahead"] == 2


def test_updates_by_hand_write_back_too() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = AveragingOptimizer(SGD([weight], lr=1.0), Lookahead(0.5, every=None))
    optimizer.update_averages()
    for _ in range(3):
        weight.grad = -torch.ones(1)
        optimizer.step()
    assert weight.item() == 3
    optimizer.update_averages()
    assert weight.item() == 1.5


def test_lookahead_continues_from_an_exported_average_that_is_loaded() -> None:
    model = small_model()
    exported = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    optimizer = averaging_sgd(model, Lookahead(every=1))
    optimizer.load_averaged_state_dict(model, exported)
    train(model, optimizer, 1)
    plain = small_model()
    (after_a_step,) = train(plain, OPTIMIZERS["sgd"](plain.parameters()), 1)
    assert same(model.parameters(), [weight / 2 for weight in after_a_step])


def test_the_swap_puts_the_average_in_and_the_weights_back() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, Lookahead(every=5))
    train(model, optimizer, 7)
    weights, average = values(model.parameters()), averages(optimizer, "lookahead")
    with optimizer.swap_to_averaged():
        assert same(model.parameters(), average)
    assert same(model.parameters(), weights)
    assert not same(weights, average)


def test_a_rule_of_ones_own_writes_back_when_it_says_so() -> None:
    class Every2nd(Rule):
        def weight(self, n_averaged: int) -> float:
            return 0.5

        def writes_back(self, n_averaged: int) -> bool:
            return n_averaged % 2 == 0

    weight = nn.Parameter(torch.zeros(1))
    optimizer = AveragingOptimizer(SGD([weight], lr=1.0), Every2nd())
    seen = []
    for _ in range(4):
        weight.grad = -torch.ones(1)
        optimizer.step()
        seen.append(weight.item())
    # The average: 1, then 1.5, toward 2.5 it is 2, toward 3.5 it is 2.75.
    assert seen == [1, 1.5, 2.5, 2.75]


def test_a_gradient_after_the_write_back_is_that_at_the_average() -> None:
    model, reference = small_model(), small_model()
    optimizer = averaging_sgd(model, Lookahead(every=1))
    train(model, optimizer, 1)
    copy_all(reference.parameters(), averages(optimizer, "lookahead"))
    for each in (model, reference):
        each.zero_grad()
        loss_of_batch(each, 1).backward()
    gradients = [[weight.grad for weight in each.parameters()] for each in (model, reference)]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("inner", OPTIMIZERS)
def test_a_switch_when_asked_is_that_after_so_many_steps(inner: str) -> None:
    model = small_model()
    rules: dict[str, Rule] = {"switch": SwitchEMA(0.9, every=None), "mean": SWA()}
    optimizer = AveragingOptimizer(OPTIMIZERS[inner](model.parameters()), rules)
    for t, (ema, weights) in enumerate(switch_ema(inner, 0.9, 4), 1):
        train(model, optimizer, 1, first=t - 1)
        if t % 4 == 0:
            optimizer.update_averages("switch")
        assert same(averages(optimizer, "switch"), ema)
        assert same(model.parameters(), weights)
    assert optimizer.n_averaged("switch") == STEPS + 1


def test_asked_before_the_first_step_a_switch_has_its_average_begin_there() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, SwitchEMA(0.9, every=None))
    initial = values(model.parameters())
    optimizer.update_averages()
    assert same(averages(optimizer, "switchema"), initial)
    assert optimizer.n_averaged() == 1


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["alike", "double"])
def test_a_reference_model_is_the_initial_weights_and_its_updates_touch_no_memory(
    dtype: torch.dtype | None,
) -> None:
    """What reinforcement learning keeps of a language model, beside other averages."""
    model = small_model()
    rules: dict[str, Rule] = {"reference": EMA(decay=1), "ema": EMA(0.9)}
    optimizer = averaging_sgd(model, rules, dtype=dtype)
    initial = values(model.parameters())
    optimizer.update_averages()
    kept = [optimizer.state[weight]["averaged_reference"] for weight in model.parameters()]
    versions = [tensor._version for tensor in kept]
    train(model, optimizer, 5)
    assert [tensor._version for tensor in kept] == versions
    with optimizer.swap_to_averaged("reference"):
        assert same(model.parameters(), initial)
    assert optimizer.n_averaged("reference") == optimizer.n_averaged("ema") == 6
