"""Weights that are frozen, for a while or for good, and weights that are excluded."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from training import (
    averaging_sgd,
    fill,
    first_layer,
    frozen,
    same,
    share,
    small_model,
    train,
    values,
)

from averaging_optim import EMA, LAWA, SWA, AveragingOptimizer, Rule

RULES: dict[str, Rule] = {"ema": EMA(0.75), "swa": SWA()}


def number(value: float) -> Tensor:
    return torch.tensor([value])


def two_weights(
    first: float = 1.0, second: float = 2.0, rules: Rule | dict[str, Rule] = RULES, **options: Any
) -> tuple[nn.Parameter, nn.Parameter, AveragingOptimizer]:
    weights = nn.Parameter(number(first)), nn.Parameter(number(second))
    return *weights, AveragingOptimizer(SGD(weights, lr=0.1), rules, **options)


def kept_of(optimizer: AveragingOptimizer, index: int) -> dict[str, Tensor]:
    """Return name → average of a parameter in the state dict, where it may be in two places."""
    saved = optimizer.state_dict()
    entry: dict[str, Tensor] = {
        **saved["state"].get(index, {}),
        **saved.get("averaged_parameters", {}).get(index, {}),
    }
    return {key.removeprefix("averaged_"): value for key, value in entry.items()}


def test_the_averages_of_a_model_with_a_large_frozen_part_are_as_small_as_what_is_trained() -> None:
    backbone = nn.Linear(1024, 1024, bias=False, dtype=torch.bfloat16).requires_grad_(False)
    head = nn.Linear(1000, 1, bias=False)
    weights = [*backbone.parameters(), *head.parameters()]
    optimizer = AveragingOptimizer(SGD(weights, lr=0.1), RULES)
    for weight in head.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    optimizer.averaged_model(nn.ModuleList([backbone, head]), "ema")
    kept = [each for index in (0, 1) for each in kept_of(optimizer, index).values()]
    assert sum(each.untyped_storage().nbytes() for each in kept) == 2 * 4_000


def test_a_frozen_weight_has_its_own_value_in_swaps_exports_and_averaged_models() -> None:
    model = small_model()
    backbone = first_layer(model).requires_grad_(False)
    optimizer = averaging_sgd(model, SWA())
    train(model, optimizer, 3)
    fill(backbone.weight, 7)
    expected = values([torch.full((4, 3), 7.0), backbone.bias])
    with optimizer.swap_to_averaged():
        assert same(backbone.parameters(), expected)
    exported = optimizer.averaged_state_dict(model)
    assert same([exported["0.weight"], exported["0.bias"]], expected)
    assert list(optimizer.averaged_state_dict(model, only_averaged=True)) == ["2.weight", "2.bias"]
    teacher = optimizer.averaged_model(model)
    fill(backbone.weight, 8)
    assert same([first_layer(teacher).weight], [torch.full((4, 3), 8.0)])


# A letter for each update: whether the weight is trained or frozen then.
LIVES = {
    "frozen_from_the_start": "ffff",
    "unfrozen": "fftttt",
    "frozen_late": "tttfff",
    "frozen_for_a_while": "ttfftt",
    "unfrozen_for_a_while": "ffttff",
    "in_turn": "tftftftf",
    "in_turn_the_other_way": "ftftftft",
}


def average_of(rule: Rule, life: str, present: list[float]) -> Tensor | None:
    """Return the average, which begins with the first update at which the weight is trained."""
    average = None
    for n, (phase, value) in enumerate(zip(life, present, strict=True)):
        if average is not None:
            average = average.lerp(number(value), share(rule, n))
        elif phase == "t":
            average = number(value)
    return average


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("life", LIVES.values(), ids=LIVES)
def test_an_average_starts_when_its_weight_is_first_trained_and_continues_while_it_is_frozen(
    life: str, name: str
) -> None:
    """Also while it is frozen: the average then moves toward the value at which it is."""
    _, weight, optimizer = two_weights()
    present = [float(3 * i * i + 1) for i in range(len(life))]
    for phase, value in zip(life, present, strict=True):
        weight.requires_grad_(phase == "t")
        fill(weight, value)
        optimizer.update_averages()
    expected = average_of(RULES[name], life, present)
    assert frozen(kept_of(optimizer, 1).get(name)) == frozen(expected)
    with optimizer.swap_to_averaged(name):
        assert same([weight], [number(present[-1]) if expected is None else expected])


def test_a_player_that_is_frozen_in_the_others_turn_is_averaged_all_the_time() -> None:
    """As in a GAN whose two parts are trained in turn by optimizers of their own."""
    parts = small_model(), small_model()
    optimizers = [averaging_sgd(part, SWA()) for part in parts]
    kept = []
    for step in range(6):
        mine, other = parts[step % 2], parts[1 - step % 2]
        mine.requires_grad_(True)
        other.requires_grad_(False)
        for optimizer in optimizers:
            optimizer.zero_grad()
        train(mine, optimizers[step % 2], 1, first=step)
        optimizers[1 - step % 2].update_averages()
        kept.append(values(parts[0].parameters()))
    expected = kept[0]
    for n in range(1, 6):
        expected = [a.lerp(w, 1 / (n + 1)) for a, w in zip(expected, kept[n], strict=True)]
    with optimizers[0].swap_to_averaged():
        assert same(parts[0].parameters(), expected)


def test_weights_that_are_trained_by_gradients_given_to_them_count_as_trained() -> None:
    """As with `differentiable=True`, where weights may be results that require no gradient."""
    weight = number(4.0)
    optimizer = AveragingOptimizer(SGD([weight], lr=1.0, differentiable=True), EMA(0.5))
    kept = []
    for gradient in (1.0, 2.0):
        weight.grad = number(gradient)
        optimizer.step()
        kept.append(weight.item())
    assert kept == [3.0, 1.0]
    assert same([optimizer.state[weight]["averaged_ema"]], [number(2.0)])
    optimizer.zero_grad()
    optimizer.update_averages()
    assert same([optimizer.state[weight]["averaged_ema"]], [number(1.5)])


# Checkpoints.

Loads = Callable[[nn.Module, AveragingOptimizer, dict[str, Any]], None]


def model_first(model: nn.Module, optimizer: AveragingOptimizer, saved: dict[str, Any]) -> None:
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])


def optimizer_first(model: nn.Module, optimizer: AveragingOptimizer, saved: dict[str, Any]) -> None:
    optimizer.load_state_dict(saved["optimizer"])
    model.load_state_dict(saved["model"])


ORDERS = pytest.mark.parametrize("load", [model_first, optimizer_first])


def begin(inner: type[Optimizer], *, trains: bool) -> tuple[nn.Sequential, AveragingOptimizer]:
    """Return a model whose first layer is trained or frozen, at other values each time."""
    model = small_model()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(torch.rand(()))
    first_layer(model).requires_grad_(trains)
    build: Callable[..., Optimizer] = inner
    rules: dict[str, Rule] = {"ema": EMA(0.75), "last": LAWA(k=2)}
    return model, AveragingOptimizer(build(model.parameters(), lr=0.1), rules)


def save(model: nn.Module, optimizer: AveragingOptimizer) -> dict[str, Any]:
    return copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})


def averaged(model: nn.Module, optimizer: AveragingOptimizer) -> dict[str, Any]:
    return {name: optimizer.averaged_state_dict(model, name) for name in optimizer.rules}


@ORDERS
@pytest.mark.parametrize("inner", [SGD, Adam])
def test_resuming_with_frozen_weights_equals_never_stopping(
    inner: type[Optimizer], load: Loads
) -> None:
    model, optimizer = begin(inner, trains=False)
    train(model, optimizer, 3)
    saved = save(model, optimizer)
    resumed_model, resumed = begin(inner, trains=False)
    load(resumed_model, resumed, saved)
    assert frozen(averaged(resumed_model, resumed)) == frozen(averaged(model, optimizer))
    for run in ((model, optimizer), (resumed_model, resumed)):
        train(*run, 3, first=3)
    assert frozen(save(resumed_model, resumed)) == frozen(save(model, optimizer))
    assert frozen(averaged(resumed_model, resumed)) == frozen(averaged(model, optimizer))


@ORDERS
@pytest.mark.parametrize("inner", [SGD, Adam])
@pytest.mark.parametrize("had_averages", [False, True], ids=["new", "rolled_back"])
def test_a_run_whose_weights_are_unfrozen_when_it_is_loaded_is_one_that_unfroze_them(
    inner: type[Optimizer], load: Loads, had_averages: bool
) -> None:
    model, optimizer = begin(inner, trains=False)
    train(model, optimizer, 3)
    saved = save(model, optimizer)
    other_model, other = begin(inner, trains=True)
    if had_averages:
        train(other_model, other, 2)
    load(other_model, other, saved)
    first_layer(model).requires_grad_(True)
    for run in ((model, optimizer), (other_model, other)):
        train(*run, 3, first=3)
    assert frozen(save(other_model, other)) == frozen(save(model, optimizer))


@ORDERS
@pytest.mark.parametrize("inner", [SGD, Adam])
def test_averages_of_weights_that_are_frozen_when_they_are_loaded_come_back_and_continue(
    inner: type[Optimizer], load: Loads
) -> None:
    model, optimizer = begin(inner, trains=True)
    train(model, optimizer, 3)
    saved = save(model, optimizer)
    other_model, other = begin(inner, trains=False)
    load(other_model, other, saved)
    assert frozen(averaged(other_model, other)) == frozen(averaged(model, optimizer))
    first_layer(model).requires_grad_(False)
    for run in ((model, optimizer), (other_model, other)):
        run[1].zero_grad()
        train(*run, 3, first=3)
    assert frozen(averaged(other_model, other)) == frozen(averaged(model, optimizer))


@ORDERS
@pytest.mark.parametrize("refreezes_first", [False, True], ids=["loads_first", "refreezes_first"])
def test_a_run_that_is_rolled_back_to_when_weights_were_frozen_has_no_averages_of_them(
    load: Loads, refreezes_first: bool
) -> None:
    model, optimizer = begin(SGD, trains=False)
    train(model, optimizer, 2)
    saved = save(model, optimizer)
    before = frozen(averaged(model, optimizer))
    first_layer(model).requires_grad_(True)
    train(model, optimizer, 2, first=2)
    assert set(kept_of(optimizer, 0)) >= {"ema", "last"}
    first_layer(model).requires_grad_(not refreezes_first)
    optimizer.zero_grad()
    load(model, optimizer, saved)
    first_layer(model).requires_grad_(False)
    assert frozen(averaged(model, optimizer)) == before
    assert frozen(save(model, optimizer)) == frozen(saved)


def test_a_run_that_is_rolled_back_to_when_weights_were_trained_has_their_averages() -> None:
    model, optimizer = begin(Adam, trains=True)
    train(model, optimizer, 2)
    saved = save(model, optimizer)
    before = frozen(averaged(model, optimizer))
    first_layer(model).requires_grad_(False)
    train(model, optimizer, 2, first=2)
    model_first(model, optimizer, saved)
    assert frozen(averaged(model, optimizer)) == before


def test_loading_frozen_weights_is_silent_and_a_lost_average_is_still_an_error() -> None:
    model, optimizer = begin(Adam, trains=False)
    train(model, optimizer, 2)
    saved = optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(saved)
    first_layer(model).requires_grad_(True)
    del saved["averaged_parameters"][0]
    with pytest.raises(ValueError, match=r"`state\[0\]\['averaged_ema'\]` must be a tensor, got"):
        optimizer.load_state_dict(saved)


# Weights that are excluded.


def is_bias(weight: Tensor) -> bool:
    return weight.dim() == 1


def biases(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.dim() == 1]


def by_predicate(model: nn.Module) -> Any:
    return is_bias


def by_list(model: nn.Module) -> Any:
    return biases(model)


def by_generator(model: nn.Module) -> Any:
    return (weight for weight in biases(model))


WAYS = pytest.mark.parametrize("way", [by_predicate, by_list, by_generator])


def excluding(
    way: Callable[[nn.Module], Any] | None, inner: type[Optimizer] = SGD
) -> tuple[nn.Sequential, AveragingOptimizer]:
    model = small_model()
    build: Callable[..., Optimizer] = inner
    exclude = None if way is None else way(model)
    wrapped = build(model.parameters(), lr=0.1)
    return model, AveragingOptimizer(wrapped, SWA(), exclude=exclude)


@WAYS
def test_what_is_excluded_is_trained_and_has_no_average(way: Callable[[nn.Module], Any]) -> None:
    model, optimizer = excluding(way)
    bare_model = small_model()
    snapshots = train(model, optimizer, 3)
    assert same(snapshots[-1], train(bare_model, SGD(bare_model.parameters(), lr=0.1), 3)[-1])
    assert [set(kept_of(optimizer, i)) for i in range(4)] == [{"swa"}, set(), {"swa"}, set()]
    mean = snapshots[0]
    for n in (1, 2):
        mean = [a.lerp(w, 1 / (n + 1)) for a, w in zip(mean, snapshots[n], strict=True)]
    expected = [mean[0], snapshots[2][1], mean[2], snapshots[2][3]]
    with optimizer.swap_to_averaged():
        assert same(model.parameters(), expected)
    assert same(optimizer.averaged_state_dict(model).values(), expected)
    kept = optimizer.averaged_state_dict(model, only_averaged=True)
    assert list(kept) == ["0.weight", "2.weight"]


@pytest.mark.parametrize("inner", [SGD, Adam])
@pytest.mark.parametrize(
    ("saved_with", "loaded_with"),
    [(None, by_predicate), (by_predicate, None), (by_predicate, by_list)],
    ids=["exclude_now", "exclude_no_more", "exclude_still"],
)
def test_a_run_that_excludes_others_when_it_is_loaded_has_averages_of_the_rest_as_saved(
    saved_with: Any, loaded_with: Any, inner: type[Optimizer]
) -> None:
    model, optimizer = excluding(saved_with, inner)
    train(model, optimizer, 3)
    other_model, other = excluding(loaded_with, inner)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer_first(other_model, other, save(model, optimizer))
    expected = values(model.parameters())
    for i in (0, 2):
        expected[i] = kept_of(optimizer, i)["swa"].clone()
    with other.swap_to_averaged():
        assert same(other_model.parameters(), expected)
    is_kept = [{"swa"}, set() if loaded_with else {"swa"}]
    assert [set(kept_of(other, i)) & {"swa"} for i in range(4)] == is_kept * 2
    assert other.n_averaged() == 3
    train(other_model, other, 1, first=3)


def test_groups_that_are_added_later_are_asked_too() -> None:
    *_, optimizer = two_weights(exclude=lambda weight: weight.numel() == 2)
    optimizer.update_averages()
    left_out, averaged = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [left_out, averaged]})
    optimizer.update_averages()
    assert [set(kept_of(optimizer, i)) for i in (2, 3)] == [set(), {"ema", "swa"}]
    assert set(kept_of(optimizer, 0)) == {"ema", "swa"}


@pytest.mark.parametrize("answer", [None, 0, "no", torch.tensor(True)], ids=repr)
def test_a_predicate_that_gives_no_bool_is_refused(answer: Any) -> None:
    with pytest.raises(TypeError, match=r"`exclude` must return True or False, got "):
        two_weights(exclude=lambda weight: answer)


def test_a_predicate_that_raises_does_so_before_anything_is_wrapped() -> None:
    def fails(weight: Tensor) -> bool:
        raise KeyError("no such weight")

    sgd = SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    before = copy.deepcopy(sgd.state_dict())
    with pytest.raises(KeyError, match="no such weight"):
        AveragingOptimizer(sgd, SWA(), exclude=fails)
    assert sgd.state_dict() == before


@pytest.mark.parametrize("exclude", [3, torch.ones(1), nn.Linear(1, 1), nn.Linear], ids=repr)
def test_what_names_no_parameters_is_refused(exclude: Any) -> None:
    rule = r"`exclude` must be a function of a parameter or an iterable of parameters, got "
    with pytest.raises(TypeError, match=rule):
        two_weights(exclude=exclude)


def test_names_are_no_parameters() -> None:
    with pytest.raises(TypeError, match=r"`exclude` must contain tensors, got 'bias'\."):
        two_weights(exclude=["bias"])
