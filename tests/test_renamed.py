"""Checkpoints whose averages are given other names, or dropped."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_optimizer import Lookahead as OwnFormat
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from training import frozen, model_with_batch_norm, small_model, tensors_in, train

from averaging_optim import EMA, LAWA, SWA, AveragingOptimizer, Rule, renamed

Run = tuple[nn.Module, AveragingOptimizer]
Begin = Callable[[dict[str, Rule]], Run]


def over_momentum(rules: dict[str, Rule]) -> Run:
    model = small_model()
    sgd = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, AveragingOptimizer(sgd, rules)


def with_named_buffers(rules: dict[str, Rule]) -> Run:
    model = model_with_batch_norm()
    sgd = SGD(model.parameters(), lr=0.1)
    return model, AveragingOptimizer(sgd, rules, buffers=model)


def with_listed_buffers(rules: dict[str, Rule]) -> Run:
    model = model_with_batch_norm()
    sgd = SGD(model.parameters(), lr=0.1)
    return model, AveragingOptimizer(sgd, rules, buffers=model.buffers())


def with_a_weight_apart(rules: dict[str, Rule]) -> Run:
    """Of which Adam keeps nothing, for want of gradients."""
    model = small_model()
    model.register_parameter("unused", nn.Parameter(torch.ones(2)))
    return model, AveragingOptimizer(Adam(model.parameters()), rules)


def with_groups(rules: dict[str, Rule]) -> Run:
    model = small_model()
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "average": False},
    ]
    return model, AveragingOptimizer(SGD(groups, lr=0.1), rules)


def with_a_format_of_its_own(rules: dict[str, Rule]) -> Run:
    model = small_model()
    build: Callable[..., Optimizer] = OwnFormat
    return model, AveragingOptimizer(build(SGD(model.parameters(), lr=0.1)), rules)


BEGINS = [
    over_momentum,
    with_named_buffers,
    with_listed_buffers,
    with_a_weight_apart,
    with_groups,
    with_a_format_of_its_own,
]

# The rules of the checkpoint, the new names, and the rules that load it.
CASES: dict[str, tuple[dict[str, Rule], dict[str, str | None], dict[str, Rule]]] = {
    "one": ({"ema": EMA(0.5)}, {"ema": "slow"}, {"slow": EMA(0.5)}),
    "one_of_two": (
        {"ema": EMA(0.5), "swa": SWA()},
        {"swa": "mean"},
        {"ema": EMA(0.5), "mean": SWA()},
    ),
    "exchanged": (
        {"a": EMA(0.5), "b": EMA(0.9)},
        {"a": "b", "b": "a"},
        {"a": EMA(0.9), "b": EMA(0.5)},
    ),
    "passed_on": (
        {"a": EMA(0.5), "b": EMA(0.9)},
        {"a": "b", "b": "c"},
        {"b": EMA(0.5), "c": EMA(0.9)},
    ),
    "dropped": ({"ema": EMA(0.5), "swa": SWA()}, {"swa": None}, {"ema": EMA(0.5)}),
    "dropped_and_replaced": (
        {"ema": EMA(0.5), "swa": SWA()},
        {"swa": None, "ema": "swa"},
        {"swa": EMA(0.5)},
    ),
    "snapshots": ({"last": LAWA(k=2)}, {"last": "mean"}, {"mean": LAWA(k=2)}),
    "snapshots_dropped": (
        {"last": LAWA(k=2), "ema": EMA(0.5)},
        {"last": None},
        {"ema": EMA(0.5)},
    ),
    "snapshots_exchanged": (
        {"a": LAWA(k=2), "b": LAWA(k=3)},
        {"a": "b", "b": "a"},
        {"a": LAWA(k=3), "b": LAWA(k=2)},
    ),
    "number_beside": (
        {"ema": EMA(0.5), "ema_2": EMA(0.9)},
        {"ema": "fast"},
        {"fast": EMA(0.5), "ema_2": EMA(0.9)},
    ),
    "number_itself": (
        {"ema": EMA(0.5), "ema_2": EMA(0.9)},
        {"ema_2": "ema_7"},
        {"ema": EMA(0.5), "ema_7": EMA(0.9)},
    ),
    "number_dropped": (
        {"ema": EMA(0.5), "ema_2": EMA(0.9)},
        {"ema_2": None},
        {"ema": EMA(0.5)},
    ),
    "number_without_stem": ({"ema_2": EMA(0.9)}, {"ema_2": "ema"}, {"ema": EMA(0.9)}),
    "numbered_snapshots": (
        {"last_5": LAWA(k=2), "last": EMA(0.5)},
        {"last": "ema", "last_5": "last"},
        {"last": LAWA(k=2), "ema": EMA(0.5)},
    ),
    "empty": ({"": EMA(0.5), "averaged_": SWA()}, {"": "x"}, {"x": EMA(0.5), "averaged_": SWA()}),
    "as_other_keys": (
        {"lr": EMA(0.5), "params": SWA()},
        {"lr": "slow", "params": "foreach"},
        {"slow": EMA(0.5), "foreach": SWA()},
    ),
    "nothing": ({"ema": EMA(0.5)}, {}, {"ema": EMA(0.5)}),
    "to_itself": ({"ema": EMA(0.5)}, {"ema": "ema"}, {"ema": EMA(0.5)}),
}


HARDEST = ["exchanged", "dropped_and_replaced", "snapshots", "numbered_snapshots"]
PAIRS = [(with_named_buffers, case) for case in CASES] + [
    (begin, case) for begin in BEGINS for case in HARDEST if begin is not with_named_buffers
]


@pytest.mark.parametrize(("begin", "case"), PAIRS)
def test_a_run_resumed_under_new_names_equals_one_that_always_had_them(
    begin: Begin, case: str, tmp_path: Path
) -> None:
    rules, names, new_rules = CASES[case]
    model, optimizer = begin(rules)
    train(model, optimizer, 4)
    saved = {"model": model.state_dict(), "optimizer": renamed(optimizer.state_dict(), names)}
    torch.save(saved, tmp_path / "checkpoint.pt")
    loaded = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    found_model, found = begin(new_rules)
    found_model.load_state_dict(loaded["model"])
    found.load_state_dict(loaded["optimizer"])
    train(found_model, found, 3, first=4)

    expected_model, expected = begin(new_rules)
    train(expected_model, expected, 7)
    assert frozen(by_key(found.state_dict())) == frozen(by_key(expected.state_dict()))
    assert frozen(found_model.state_dict()) == frozen(expected_model.state_dict())


def by_key(nested: Any) -> Any:
    """Return the same with all dicts in the order of their keys, which is no matter here."""
    if isinstance(nested, dict):
        return {key: by_key(nested[key]) for key in sorted(nested, key=str)}
    return [by_key(each) for each in nested] if isinstance(nested, list) else nested


@pytest.mark.parametrize("begin", BEGINS)
def test_the_state_dict_is_left_as_it_is_and_its_tensors_are_referenced(begin: Begin) -> None:
    model, optimizer = begin({"ema": EMA(0.5), "last": LAWA(k=2)})
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    before = frozen(saved)
    result = renamed(saved, {"ema": "slow", "last": "mean"})
    assert frozen(saved) == before
    assert {id(each) for each in tensors_in(result)} == {id(each) for each in tensors_in(saved)}
    assert frozen(by_key(renamed(result, {"slow": "ema", "mean": "last"}))) == frozen(by_key(saved))


def test_entries_that_are_not_averages_keep_their_key() -> None:
    """Also what the wrapped optimizer itself keeps under a key that looks like one."""
    model, optimizer = over_momentum({"ema": EMA(0.5)})
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    saved["state"][0]["averaged_gradient"] = torch.ones(1)
    saved["state"]["shared"] = 3
    saved["epoch"] = 7
    result = renamed(saved, {"ema": "slow"})
    assert set(result["state"][0]) == {"momentum_buffer", "averaged_gradient", "averaged_slow"}
    assert (result["state"]["shared"], result["epoch"]) == (3, 7)


def test_all_averages_dropped_leave_the_checkpoint_of_the_plain_optimizer() -> None:
    model, optimizer = over_momentum({"ema": EMA(0.5), "last": LAWA(k=2)})
    plain_model = small_model()
    plain = SGD(plain_model.parameters(), lr=0.1, momentum=0.9)
    train(model, optimizer, 3)
    train(plain_model, plain, 3)
    result = renamed(optimizer.state_dict(), {"ema": None, "last": None})
    assert frozen(result["state"]) == frozen(plain.state_dict()["state"])
    counters = {"averaging_steps": 3, "n_skipped": 0}
    assert by_key(result["param_groups"]) == by_key(
        [{**group, **counters} for group in plain.state_dict()["param_groups"]]
    )


def ready() -> dict[str, Any]:
    model, optimizer = over_momentum({"ema": EMA(0.5), "swa": SWA()})
    train(model, optimizer, 1)
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("names", "error", "message"),
    [
        ({"x": "y"}, ValueError, r"`names` must map averages in the checkpoint, \['ema', 'swa'\]"),
        ({"averaged_ema": "y"}, ValueError, r"`names` must map averages .*, got 'averaged_ema'\."),
        ({"ema_1": "y"}, ValueError, r"`names` must map averages .*, got 'ema_1'\."),
        ({"ema": "swa"}, ValueError, r"`names` must give each average a different name, got \{"),
        ({"ema": "x", "swa": "x"}, ValueError, r"`names` must give each average a different name"),
        ({"ema": 3}, TypeError, r"`names\['ema'\]` must be a string or None, got 3\."),
        ({3: "ema"}, ValueError, r"`names` must map averages .*, got 3\."),
        (["ema"], ValueError, r"`names` must be a dict, got \['ema'\]\."),
        (None, ValueError, r"`names` must be a dict, got None\."),
    ],
    ids=str,
)
def test_names_that_cannot_be_given_are_refused(
    names: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        renamed(ready(), names)


@pytest.mark.parametrize(
    ("state_dict", "message"),
    [
        (None, r"`state_dict` must be a dict, got None\."),
        ([], r"`state_dict` must be a dict, got \[\]\."),
        ({"state": {}}, r"`param_groups` must be a list, got None\."),
        ({"param_groups": [3]}, r"`param_groups\[0\]` must be a dict, got 3\."),
        ({"averaging_optim": {}}, r"`param_groups` must be a list, got None\."),
        ({"averaging_optim": 3}, r"`state_dict` must be a dict, got 3\."),
    ],
    ids=str,
)
def test_anything_but_a_checkpoint_is_refused(state_dict: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        renamed(state_dict, {})


@pytest.mark.parametrize(
    ("saved_rules", "rules", "name"),
    [
        ({"ema": EMA()}, {"slow": EMA(), "swa": SWA()}, "ema"),
        ({"last": LAWA(k=2)}, {"slow": EMA(), "swa": SWA()}, "last"),
        ({"slow_2": EMA(), "slow": SWA()}, {"slow": EMA(), "swa": SWA()}, "slow_2"),
        ({"slow": LAWA(k=2)}, {"slow": EMA(), "swa": SWA()}, "slow"),
    ],
    ids=["average", "snapshots", "number", "snapshots_no_more"],
)
@pytest.mark.parametrize("begin", [over_momentum, with_named_buffers, with_a_format_of_its_own])
def test_an_average_of_no_rule_is_refused_with_the_rules_there_are_and_what_to_do(
    begin: Begin, saved_rules: dict[str, Rule], rules: dict[str, Rule], name: str
) -> None:
    model, optimizer = begin(saved_rules)
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    message = (
        rf"belongs to no rule of this optimizer \('slow', 'swa'\)\. Name a rule '{name}', or "
        r"rename or drop it with `averaging_optim\.renamed\(state_dict, \.\.\.\)`\."
    )
    _, other = begin(rules)
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(saved)
    with pytest.warns(UserWarning, match=r"no average for .*'swa'"):
        other.load_state_dict(renamed(saved, dict.fromkeys(saved_rules)))
