"""Memory that weights, buffers or averages have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from training import (
    TWO_RULES,
    assert_same_steps,
    averages,
    frozen,
    in_place,
    recurrence,
    same,
    small_model,
    train,
    values,
)

from averaging_optim import EMA, LAWA, SWA, AveragingOptimizer, Lookahead, Rule

# A parameter that is twice in a group.
pytestmark = pytest.mark.filterwarnings("ignore:optimizer contains a parameter group:UserWarning")

Shared = tuple[list[nn.Parameter], list[Tensor]]


def memory() -> Tensor:
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(0))


def parameter_in(part: Tensor) -> nn.Parameter:
    parameter = nn.Parameter(torch.zeros_like(part))
    parameter.data = part
    return parameter


def weights_in(*parts: Callable[[Tensor], Tensor]) -> Callable[[], Shared]:
    def make() -> Shared:
        base = memory()
        return [parameter_in(part(base)) for part in parts], []

    return make


def buffer_in(part: Callable[[Tensor], Tensor]) -> Callable[[], Shared]:
    def make() -> Shared:
        base = memory()
        return [parameter_in(base)], [part(base)]

    return make


def twice() -> Shared:
    weight = parameter_in(memory())
    return [weight, weight], []


# Weights, and buffers, of which some memory is that of another.
SHARED: dict[str, Callable[[], Shared]] = {
    "overlapping": weights_in(lambda base: base[:4], lambda base: base[2:]),
    "three": weights_in(lambda b: b, lambda b: b[1:2], lambda b: b.flatten()[7:8]),
    "the_same": weights_in(lambda base: base, lambda base: base),
    "transposed": weights_in(lambda base: base, lambda base: base.t()),
    "interleaved": weights_in(lambda base: base[:, ::2], lambda base: base[:, 1::2]),
    "side_by_side": weights_in(lambda base: base[:2], lambda base: base[2:]),
    "buffer": buffer_in(lambda base: base),
    "part_of_buffer": buffer_in(lambda base: base[1:3]),
    "twice": twice,
}
shared = pytest.mark.parametrize("make", SHARED.values(), ids=SHARED)
RULE = EMA(0.9)


def train_sharing(
    optimizer: torch.optim.Optimizer, weights: Iterable[Tensor], held: Iterable[Tensor]
) -> list[list[Tensor]]:
    """Return what weights and buffers hold after each step."""
    generator, snapshots = torch.Generator().manual_seed(1), []
    for _ in range(4):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
        snapshots.append(values(held))
    return snapshots


def averaging(made: Shared, rule: Rule = RULE) -> tuple[AveragingOptimizer, list[Tensor]]:
    """Return an optimizer, and all that it averages, each once."""
    weights, buffers = made
    sgd = SGD(weights, lr=0.1)
    return AveragingOptimizer(sgd, rule, buffers=buffers), [*dict.fromkeys(weights), *buffers]


@in_place
@shared
def test_what_shares_memory_is_trained_averaged_and_swapped_as_if_it_did_not(
    make: Callable[[], Shared], in_place: bool
) -> None:
    made, (bare_weights, bare_buffers) = make(), make()
    optimizer, held = averaging(made)
    bare_held = [*dict.fromkeys(bare_weights), *bare_buffers]
    expected = train_sharing(SGD(bare_weights, lr=0.1), bare_weights, bare_held)
    snapshots = train_sharing(optimizer, made[0], held)
    assert_same_steps(snapshots, expected)
    optimizer.update_averages()
    averaged = recurrence(RULE, [*expected, expected[-1]])
    state = frozen(optimizer.state_dict())
    for _ in range(2):
        with optimizer.swap_to_averaged(in_place=in_place):
            assert same(held, averaged)
            with optimizer.swap_to_averaged(in_place=in_place):
                assert frozen(optimizer.state_dict()) == state
        assert same(held, expected[-1])
        assert frozen(optimizer.state_dict()) == state


@shared
def test_an_average_is_written_back_into_shared_memory_once(make: Callable[[], Shared]) -> None:
    made, (bare_weights, bare_buffers) = make(), make()
    optimizer, held = averaging(made, Lookahead(0.5, every=1))
    bare_held = [*dict.fromkeys(bare_weights), *bare_buffers]
    bare = SGD(bare_weights, lr=0.1)
    slow = values(bare_held)

    def look_ahead(*_: Any) -> None:
        for i, fast in enumerate(bare_held):
            slow[i] = slow[i].lerp(fast.detach(), 0.5)
        for fast, average in zip(bare_held, slow, strict=True):
            fast.data.copy_(average)

    bare.register_step_post_hook(look_ahead)
    expected = train_sharing(bare, bare_weights, bare_held)
    assert_same_steps(train_sharing(optimizer, made[0], held), expected)


@in_place
@shared
def test_what_shares_memory_is_saved_and_loaded(make: Callable[[], Shared], in_place: bool) -> None:
    made = make()
    optimizer, held = averaging(made)
    snapshots = train_sharing(optimizer, made[0], held)
    saved = copy.deepcopy(optimizer.state_dict())
    loaded, present = averaging(make())
    before = values(present)
    loaded.load_state_dict(saved)
    assert frozen(loaded.state_dict()) == frozen(saved)
    with loaded.swap_to_averaged(in_place=in_place):
        assert same(present, recurrence(RULE, snapshots))
    assert same(present, before)


def test_a_weight_that_overlaps_itself_is_refused() -> None:
    weight = parameter_in(torch.arange(5.0).as_strided((3, 3), (1, 1)))
    with pytest.raises(ValueError, match=r"that is overlapping itself, of shape \(3, 3\)"):
        AveragingOptimizer(SGD([weight], lr=0.1), EMA())


Entries = list[dict[str, Any]]


def parts(*slices: Callable[[Tensor], Tensor]) -> Callable[..., list[Tensor]]:
    def give(*_: Any) -> list[Tensor]:
        flat = memory().flatten()
        return [part(flat) for part in slices]

    return give


# What is given as the averages "swa" of two weights that have four numbers each.
GIVEN: dict[str, Callable[[list[nn.Parameter], Entries], list[Tensor]]] = {
    "average_of_another_rule": lambda _, entries: [each["averaged_ema"] for each in entries],
    "view_of_it": lambda _, entries: [each["averaged_ema"].view(2, 2) for each in entries],
    "snapshot": lambda _, entries: [each["averaged_last_1"] for each in entries],
    "average_of_another_weight": lambda _, entries: [
        each["averaged_ema"] for each in reversed(entries)
    ],
    "weight": lambda weights, _: [weight.data for weight in weights],
    "another_weight": lambda weights, _: [weight.data.t().detach() for weight in weights[::-1]],
    "one_for_both": parts(lambda flat: flat[:4].view(2, 2), lambda flat: flat[:4].view(2, 2)),
    "two_parts_of_one": parts(lambda flat: flat[:4].view(2, 2), lambda flat: flat[2:6].view(2, 2)),
    "expanded": parts(lambda flat: flat[0].expand(2, 2), lambda flat: flat[:2].expand(2, 2)),
}


@pytest.mark.parametrize("give", GIVEN.values(), ids=GIVEN)
def test_an_average_that_is_given_is_averaged_apart_from_whatever_it_shares_memory_with(
    give: Callable[[list[nn.Parameter], Entries], list[Tensor]],
) -> None:
    weights = [parameter_in(memory()[i : i + 2, :2].clone()) for i in (0, 2)]
    rules: dict[str, Rule] = {"ema": EMA(0.9), "swa": SWA(), "last": LAWA(k=2)}
    optimizer = AveragingOptimizer(SGD(weights, lr=0.1), rules)
    optimizer.update_averages()
    entries = [optimizer.state[weight] for weight in weights]
    for weight in weights:
        weight.data.mul_(3)
    optimizer.update_averages()
    given = give(weights, entries)
    start = values(given)
    ema = averages(optimizer, "ema")
    for entry, value in zip(entries, given, strict=True):
        del entry["averaged_swa"]
        entry["averaged_swa"] = value
    former = values(weights)
    for weight in weights:
        weight.data.mul_(5)
    before = values(weights)
    optimizer.update_averages()
    moved = {"ema": (ema, 1 - 0.9), "swa": (start, 1 / 3), "last": (former, 1 / 2)}
    assert {name: frozen(averages(optimizer, name)) for name in rules} == {
        name: frozen([a.lerp(w, share) for a, w in zip(average, before, strict=True)])
        for name, (average, share) in moved.items()
    }
    assert same(weights, before)


@pytest.mark.parametrize(
    "alias", [lambda each: each, lambda each: each.view(each.shape)], ids=["itself", "view"]
)
def test_averages_that_change_places_by_loading_do_not_overwrite_each_other(
    alias: Callable[[Tensor], Tensor],
) -> None:
    model = small_model()
    sgd = SGD(model.parameters(), lr=0.1)
    optimizer = AveragingOptimizer(sgd, TWO_RULES)
    train(model, optimizer, 3)
    former = averages(optimizer, "ema"), averages(optimizer, "swa")
    state_dict = optimizer.state_dict()
    for entry in state_dict["state"].values():
        entry["averaged_ema"], entry["averaged_swa"] = (
            alias(entry["averaged_swa"]),
            alias(entry["averaged_ema"]),
        )
    optimizer.load_state_dict(state_dict)
    assert same(averages(optimizer, "swa"), former[0])
    assert same(averages(optimizer, "ema"), former[1])
