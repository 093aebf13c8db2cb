"""A wrapped checkpoint in the plain optimizer, and back, whichever weights had gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from training import frozen, recurrence, same, values

from averaging_optim import EMA, LAWA, SWA, AveragingOptimizer, Rule, renamed

RULES: dict[str, Rule] = {"ema": EMA(0.75), "swa": SWA(start=1), "last": LAWA(k=2)}
Build = Callable[[Iterable[Any]], Optimizer]

# All of torch's that take dense gradients and need no closure, and what they need to keep a state.
OPTIMIZERS: dict[str, Build] = {
    "adadelta": lambda p: optim.Adadelta(p, lr=0.1),
    "adafactor": lambda p: optim.Adafactor(p, lr=0.1),
    "adagrad": lambda p: optim.Adagrad(p, lr=0.1),
    "adam": lambda p: optim.Adam(p, lr=0.1),
    "adam_amsgrad": lambda p: optim.Adam(p, lr=0.1, amsgrad=True, weight_decay=0.1),
    "adam_capturable": lambda p: optim.Adam(p, lr=0.1, fused=True),
    "adamax": lambda p: optim.Adamax(p, lr=0.1),
    "adamw": lambda p: optim.AdamW(p, lr=0.1),
    "asgd": lambda p: optim.ASGD(p, lr=0.1, t0=2),
    "nadam": lambda p: optim.NAdam(p, lr=0.1),
    "radam": lambda p: optim.RAdam(p, lr=0.1),
    "rmsprop": lambda p: optim.RMSprop(p, lr=0.1),
    "rmsprop_centred": lambda p: optim.RMSprop(p, lr=0.1, momentum=0.9, centered=True),
    "rprop": lambda p: optim.Rprop(p, lr=0.1),
    "sgd": lambda p: optim.SGD(p, lr=0.1),
    "sgd_momentum": lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
    "sgd_nesterov": lambda p: optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
}
if hasattr(optim, "Muon"):  # from torch 2.9 on
    OPTIMIZERS["muon"] = lambda p: optim.Muon(p, lr=0.1)

ALL = (0, 1, 2)
# Which of three weights have gradients until the checkpoint is written.
BEFORE = {"all": ALL, "not_the_first": (1, 2), "not_the_last": (0, 1), "one": (1,)}


def three_weights() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(3, 2)) for _ in range(3)]


def train(
    weights: list[nn.Parameter], optimizer: Optimizer, steps: range, having: tuple[int, ...]
) -> list[list[Tensor]]:
    """Train these of the weights, and return the values of all after each step."""
    snapshots = []
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        gradients = [torch.randn(weight.shape, generator=generator) for weight in weights]
        for i, weight in enumerate(weights):
            weight.grad = gradients[i] if i in having else None
        optimizer.step()
        snapshots.append(values(weights))
    return snapshots


def resumed(
    weights: list[nn.Parameter], saved: dict[str, Any], build: Build
) -> tuple[list[nn.Parameter], Any]:
    """Return the same weights, and an optimizer of them that has loaded what was saved."""
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    optimizer = build(others)
    optimizer.load_state_dict(saved)
    return others, optimizer


@pytest.mark.parametrize("having", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_plain_optimizer_resumes_from_a_wrapped_checkpoint_as_if_it_was_never_wrapped(
    name: str, having: tuple[int, ...]
) -> None:
    build = OPTIMIZERS[name]
    never_wrapped = three_weights()
    plain = build(never_wrapped)
    train(never_wrapped, plain, range(3), having)
    expected = train(never_wrapped, plain, range(3, 6), ALL)

    weights = three_weights()
    optimizer = AveragingOptimizer(build(weights), RULES)
    train(weights, optimizer, range(3), having)
    others, other = resumed(weights, copy.deepcopy(optimizer.state_dict()), build)
    found = train(others, other, range(3, 6), ALL)
    assert [frozen(each) for each in found] == [frozen(each) for each in expected]


@pytest.mark.parametrize("having", BEFORE.values(), ids=BEFORE)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_wrapped_checkpoint_brings_back_the_averages_of_weights_without_gradients_too(
    name: str, having: tuple[int, ...]
) -> None:
    build = OPTIMIZERS[name]
    weights = three_weights()
    optimizer = AveragingOptimizer(build(weights), RULES)
    snapshots = train(weights, optimizer, range(3), having)
    others, other = resumed(
        weights,
        copy.deepcopy(optimizer.state_dict()),
        lambda parameters: AveragingOptimizer(build(parameters), RULES),
    )
    assert frozen(other.state_dict()) == frozen(optimizer.state_dict())
    snapshots += train(others, other, range(3, 6), ALL)
    expected = {key: recurrence(rule, snapshots) for key, rule in RULES.items()}
    found = {key: [other.state[p][f"averaged_{key}"] for p in others] for key in RULES}
    assert frozen(found) == frozen(expected)


@pytest.mark.parametrize("having", BEFORE.values(), ids=BEFORE)
def test_the_plain_optimizer_finds_entries_of_weights_that_had_gradients_alone(
    having: tuple[int, ...],
) -> None:
    """As it would take a weight with an entry of averages for one that is initialised."""
    weights = three_weights()
    optimizer = AveragingOptimizer(optim.Adam(weights), RULES)
    train(weights, optimizer, range(3), having)
    _, plain = resumed(weights, optimizer.state_dict(), lambda p: optim.Adam(p))
    assert tuple(plain.state_dict()["state"]) == having


def test_what_a_plain_optimizer_has_trained_on_is_wrapped_again_without_the_former_averages() -> (
    None
):
    weights = three_weights()
    optimizer = AveragingOptimizer(optim.Adam(weights), RULES)
    train(weights, optimizer, range(3), (0, 1))
    others, plain = resumed(weights, optimizer.state_dict(), lambda p: optim.Adam(p))
    train(others, plain, range(3, 5), ALL)
    saved = plain.state_dict()
    wrapped = AveragingOptimizer(optim.Adam(others), RULES)
    message = (
        r"`state\[2\]\['averaged_ema'\]` must be a tensor, got None\. To start the average over, "
        r"drop it with `averaging_optim\.renamed\(state_dict, \{'ema': None\}\)`\."
    )
    with pytest.raises(ValueError, match=message):
        wrapped.load_state_dict(saved)
    with pytest.warns(UserWarning, match="no average for 'ema', 'swa', 'last'"):
        wrapped.load_state_dict(renamed(saved, dict.fromkeys(RULES)))
    snapshots = train(others, wrapped, range(5, 8), ALL)
    found = [wrapped.state[weight]["averaged_ema"] for weight in others]
    assert same(found, recurrence(RULES["ema"], snapshots))
