"""What is saved, what can be loaded, and that a resumed run is the run that never stopped."""

from __future__ import annotations

import copy
import functools
import operator
import pickle
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from training import (
    Run,
    assert_same_averages,
    assert_same_steps,
    averages,
    averaging_sgd,
    everything,
    first_layer,
    frozen,
    model_with_batch_norm,
    of_bfloat16_weights,
    same,
    small_model,
    train,
    values,
    with_snapshots,
)

from averaging_optim import (
    EMA,
    SWA,
    T_ADEMA,
    AveragingOptimizer,
    Lookahead,
    Rule,
    SwitchEMA,
)

RULES: dict[str, Rule] = {"ema": EMA(0.9), "swa": SWA(start=2, every=3)}


def plain() -> Run:
    model = small_model()
    return model, averaging_sgd(model, T_ADEMA(0.9, 10))


def with_several_rules_over_adam() -> Run:
    model = small_model()
    return model, AveragingOptimizer(Adam(model.parameters(), amsgrad=True), RULES)


def with_buffers() -> Run:
    model = model_with_batch_norm()
    return model, averaging_sgd(model, RULES, buffers=model.buffers())


def with_averages_in_double() -> Run:
    model = small_model()
    return model, averaging_sgd(model, SWA(), dtype=torch.float64)


def with_a_group_left_out() -> Run:
    model = small_model()
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "average": False, "lr": 0.01},
    ]
    return model, AveragingOptimizer(SGD(groups, lr=0.1), EMA(0.9))


def with_weights_that_look_ahead() -> Run:
    model = small_model(torch.bfloat16)
    return model, averaging_sgd(model, {"ahead": Lookahead(every=3), "ema": EMA(0.9)})


def with_weights_that_switch() -> Run:
    model = model_with_batch_norm()
    return model, averaging_sgd(model, SwitchEMA(0.9, every=3), buffers=model.buffers())


RUNS = [
    plain,
    with_several_rules_over_adam,
    with_buffers,
    of_bfloat16_weights,
    with_averages_in_double,
    with_a_group_left_out,
    with_snapshots,
    with_weights_that_look_ahead,
    with_weights_that_switch,
]


@pytest.mark.parametrize("steps", [1, 5])
@pytest.mark.parametrize("start", RUNS)
def test_resuming_equals_never_stopping(
    start: Callable[[], Run], steps: int, tmp_path: Path
) -> None:
    model, optimizer = start()
    train(model, optimizer, steps)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    train(model, optimizer, 5, first=steps)

    resumed_model, resumed = start()
    checkpoint = torch.load(path, weights_only=True)
    resumed_model.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    train(resumed_model, resumed, 5, first=steps)
    assert same(everything(resumed_model, resumed), everything(model, optimizer))
    groups = optimizer.state_dict()["param_groups"]
    assert resumed.state_dict()["param_groups"] == groups


def test_the_format_is_torchs_with_the_averages_among_the_entries() -> None:
    model, optimizer = with_buffers()
    train(model, optimizer, 5)
    saved = optimizer.state_dict()
    assert set(saved) == {"state", "param_groups", "averaged_buffers"}
    assert list(saved["state"]) == [0, 1, 2, 3, 4, 5]
    assert set(saved["state"][0]) == {"momentum_buffer", "averaged_ema", "averaged_swa"}
    (group,) = saved["param_groups"]
    assert (group["averaging_steps"], group["n_averaged_ema"], group["n_averaged_swa"]) == (5, 5, 1)
    assert {name: len(kept) for name, kept in saved["averaged_buffers"].items()} == {
        "ema": 3,
        "swa": 3,
    }


def test_a_rule_adds_nothing_but_averages_and_counters_to_the_wrapped_state() -> None:
    model, optimizer = plain()
    train(model, optimizer, 3)
    saved, wrapped = optimizer.state_dict(), optimizer.wrapped.state_dict()
    assert set(saved) == set(wrapped)
    assert saved["param_groups"] == wrapped["param_groups"]
    for index, entry in wrapped["state"].items():
        assert set(saved["state"][index]) - set(entry) == {"averaged_t_adema"}


def test_tensors_are_referenced_and_not_copied() -> None:
    model, optimizer = plain()
    train(model, optimizer, 3)
    weight = first_layer(model).weight
    saved = optimizer.state_dict()["state"][0]
    assert saved["averaged_t_adema"] is optimizer.state[weight]["averaged_t_adema"]
    assert saved["momentum_buffer"] is optimizer.state[weight]["momentum_buffer"]


def test_counters_are_in_every_group_from_the_start() -> None:
    optimizer = averaging_sgd(small_model(), RULES)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]})
    for group in optimizer.state_dict()["param_groups"]:
        counters = {key: group[key] for key in group if key.startswith(("n_averaged", "averaging"))}
        assert counters == {"averaging_steps": 0, "n_averaged_ema": 0, "n_averaged_swa": 0}


@pytest.mark.parametrize("start", RUNS)
def test_averages_keep_their_dtype_and_their_memory_when_loaded(start: Callable[[], Run]) -> None:
    model, optimizer = start()
    train(model, optimizer, 5)
    name = next(iter(optimizer.rules))
    kept = [entry[f"averaged_{name}"] for entry in optimizer.state.values() if len(entry)]
    addresses, expected = [average.data_ptr() for average in kept], values(kept)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 2, first=5)
    assert not same(kept, expected)
    optimizer.load_state_dict(saved)
    assert same(kept, expected)
    assert same(averages(optimizer, name), expected)
    assert [average.data_ptr() for average in kept] == addresses


def test_the_dtype_asked_for_wins_over_the_one_saved() -> None:
    model = small_model()
    double = averaging_sgd(model, EMA(0.9), dtype=torch.float64)
    train(model, double, 3)
    single = averaging_sgd(model, EMA(0.9))
    single.load_state_dict(double.state_dict())
    expected = [average.float() for average in averages(double, "ema")]
    assert same(averages(single, "ema"), expected)


def test_a_loaded_average_does_not_alias_the_state_dict() -> None:
    model, optimizer = plain()
    train(model, optimizer, 3)
    saved = optimizer.state_dict()
    other_model, other = plain()
    other.load_state_dict(saved)
    before = averages(optimizer, "t_adema")
    train(other_model, other, 1, first=3)
    assert same(averages(optimizer, "t_adema"), before)


def momenta_of(model: nn.Module, optimizer: Optimizer) -> list[Tensor]:
    return [optimizer.state[weight]["momentum_buffer"] for weight in model.parameters()]


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "wrapped"])
def test_a_checkpoint_without_averages_loads_with_one_warning(wrapped: bool) -> None:
    model = small_model()
    bare = SGD(model.parameters(), lr=0.1, momentum=0.9)
    train(model, AveragingOptimizer(bare, RULES) if wrapped else bare, 5)

    optimizer = averaging_sgd(model, RULES)
    message = r"^The state dict has no average for 'ema', 'swa': averaging starts at the present "
    with pytest.warns(UserWarning, match=message) as caught:
        optimizer.load_state_dict(bare.state_dict())
    assert len(caught) == 1
    assert caught[0].filename == __file__
    assert same(momenta_of(model, optimizer), momenta_of(model, bare))
    group = optimizer.param_groups[0]
    assert (group["averaging_steps"], group["n_averaged_ema"], group["n_averaged_swa"]) == (0, 0, 0)
    train(model, optimizer, 1, first=5)
    assert same(averages(optimizer, "ema"), model.parameters())


def test_loading_a_checkpoint_without_averages_restarts_the_present_averages() -> None:
    model, optimizer = plain()
    train(model, optimizer, 3)
    saved = SGD(model.parameters(), lr=0.1).state_dict()
    with pytest.warns(UserWarning, match="no average for 't_adema'"):
        optimizer.load_state_dict(saved)
    train(model, optimizer, 1, first=3)
    assert same(averages(optimizer, "t_adema"), model.parameters())


def test_a_rule_that_the_checkpoint_does_not_have_restarts() -> None:
    model = small_model()
    saved_from = averaging_sgd(model, EMA(0.9))
    train(model, saved_from, 3)
    optimizer = averaging_sgd(model, RULES)
    with pytest.warns(
        UserWarning, match=r"no average for 'swa': averaging starts at the present weights\."
    ):
        optimizer.load_state_dict(saved_from.state_dict())
    assert same(averages(optimizer, "ema"), averages(saved_from, "ema"))
    group = optimizer.param_groups[0]
    assert (group["averaging_steps"], group["n_averaged_ema"], group["n_averaged_swa"]) == (3, 3, 0)


def test_buffers_that_the_checkpoint_does_not_hold_start_at_their_present_values() -> None:
    model = model_with_batch_norm()
    without = averaging_sgd(model, EMA(0.9))
    train(model, without, 3)
    optimizer = averaging_sgd(model, EMA(0.9), buffers=model.buffers())
    with pytest.warns(UserWarning, match=r"no average for the buffers of 'ema'"):
        optimizer.load_state_dict(without.state_dict())
    present = values(model.buffers())
    with optimizer.swap_to_averaged():
        assert same(model.buffers(), present)
    train(model, optimizer, 1, first=3)


@pytest.mark.parametrize("steps", [0, 1])
def test_a_checkpoint_from_before_the_first_average_loads_silently(steps: int) -> None:
    model = small_model()
    early = averaging_sgd(model, SWA(start=100))
    train(model, early, steps)
    optimizer = averaging_sgd(model, SWA(start=100))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.load_state_dict(early.state_dict())
    assert optimizer.param_groups[0]["averaging_steps"] == steps


def test_a_plain_checkpoint_loads_silently_when_nothing_is_to_be_averaged() -> None:
    def groups() -> list[dict[str, Any]]:
        return [{"params": [nn.Parameter(torch.ones(1))], "average": False}]

    optimizer = AveragingOptimizer(SGD(groups(), lr=0.1), EMA())
    optimizer.load_state_dict(SGD(groups(), lr=0.2).state_dict())
    assert optimizer.param_groups[0]["lr"] == 0.2
    assert optimizer.param_groups[0]["n_averaged_ema"] == 0


@pytest.mark.parametrize("inner", [SGD, Adam])
def test_a_wrapped_checkpoint_loads_into_the_plain_optimizer(inner: type[Optimizer]) -> None:
    model, bare_model = small_model(), small_model()
    build: Callable[..., Optimizer] = inner
    optimizer = AveragingOptimizer(build(model.parameters(), lr=0.01), RULES)
    train(model, optimizer, 3)
    bare = build(bare_model.parameters(), lr=0.01)
    bare_model.load_state_dict(model.state_dict())
    bare.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_steps(train(model, optimizer, 3, first=3), train(bare_model, bare, 3, first=3))


def test_an_optimizer_without_state_stays_without_when_averages_are_loaded() -> None:
    model = small_model()
    saved_from = AveragingOptimizer(SGD(model.parameters(), lr=0.1), EMA())
    train(model, saved_from, 3)
    optimizer = AveragingOptimizer(SGD(model.parameters(), lr=0.1), EMA())
    optimizer.load_state_dict(saved_from.state_dict())
    assert not optimizer.wrapped.state
    assert same(averages(optimizer, "ema"), averages(saved_from, "ema"))


@pytest.mark.parametrize("saved_flag", [False, None])
def test_a_group_keeps_out_of_averaging_by_its_saved_flag_or_else_its_own(
    saved_flag: bool | None,
) -> None:
    model, saved_from = with_a_group_left_out()
    train(model, saved_from, 3)
    saved = saved_from.state_dict()
    if saved_flag is None:
        del saved["param_groups"][1]["average"]
    _, optimizer = with_a_group_left_out()
    optimizer.load_state_dict(saved)
    assert [group.get("average", True) for group in optimizer.param_groups] == [True, False]
    assert len(list(optimizer.state)) == 2


Damage = Callable[[dict[str, Any]], Any]


def put(*path: Any) -> Damage:
    """Return a function that puts the last item into the place that the others lead to."""
    *way, key, value = path
    return lambda state_dict: place(state_dict, way).__setitem__(key, value)


def drop(*path: Any) -> Damage:
    """Return a function that deletes what the items lead to."""
    *way, key = path
    return lambda state_dict: place(state_dict, way).__delitem__(key)


def place(nested: Any, way: list[Any]) -> Any:
    return functools.reduce(operator.getitem, way, nested)


COUNTER = r"`param_groups\[0\]\['{}'\]` must be a non-negative int, got {}\."
NO_RULE = (
    r" belongs to no rule of this optimizer \('ema', 'swa'\)\. Name a rule 'x', or rename or drop"
)
DAMAGES: dict[str, tuple[Damage, str]] = {
    "state_missing": (drop("state"), r"`state` must be a dict, got None\."),
    "state_list": (put("state", []), r"`state` must be a dict, got \[\]\."),
    "entry_text": (put("state", 0, "x"), r"`state\[0\]` must be a dict, got 'x'\."),
    "groups_missing": (
        drop("param_groups"),
        r"`param_groups` must be a list of 2 groups, .*, got ",
    ),
    "group_lost": (drop("param_groups", 1), r"`param_groups` must be a list of 2 groups, .*, got "),
    "group_text": (put("param_groups", 1, "x"), r"`param_groups\[1\]` must be a dict, got 'x'\."),
    "params_missing": (
        drop("param_groups", 0, "params"),
        r"`param_groups\[0\]\['params'\]` must be a list of 4 parameters, .*, got ",
    ),
    "params_lost": (
        drop("param_groups", 0, "params", 2),
        r"`param_groups\[0\]\['params'\]` must be a list of 4 parameters, .*, got ",
    ),
    "average_flag": (
        put("param_groups", 1, "average", "no"),
        r"`param_groups\[1\]\['average'\]` must be True or False, got 'no'\.",
    ),
    "average_of_no_rule": (
        lambda state_dict: (
            put("state", 1, "averaged_x", torch.ones(4))(state_dict),
            put("param_groups", 0, "n_averaged_x", 3)(state_dict),
        ),
        r"`state\[1\]\['averaged_x'\]`" + NO_RULE,
    ),
    "average_of_no_weight": (
        put("state", 9, {"averaged_ema": torch.ones(4)}),
        r"`state\[9\]\['averaged_ema'\]` belongs to a parameter that this optimizer "
        r"doesn't average\.",
    ),
    "counter_of_no_rule": (
        put("param_groups", 0, "n_averaged_x", 3),
        r"`param_groups\[0\]\['n_averaged_x'\]`" + NO_RULE,
    ),
    "average_lost": (
        drop("state", 2, "averaged_ema"),
        r"`state\[2\]\['averaged_ema'\]` must be a tensor, got None\.",
    ),
    "entry_lost": (drop("state", 2), r"`state\[2\]\['averaged_ema'\]` must be a tensor, got None"),
    "average_shape": (
        put("state", 3, "averaged_swa", torch.ones(1)),
        r"`state\[3\]\['averaged_swa'\]` must have the shape \(2,\), got \(1,\)\.",
    ),
    "average_integer": (
        put("state", 3, "averaged_swa", torch.ones(2, dtype=torch.int64)),
        r"`state\[3\]\['averaged_swa'\]` must be floating-point, got torch\.int64\.",
    ),
    "average_complex": (
        put("state", 3, "averaged_swa", torch.ones(2, dtype=torch.complex64)),
        r"`state\[3\]\['averaged_swa'\]` must be floating-point, got torch\.complex64\.",
    ),
    "average_list": (
        put("state", 3, "averaged_swa", [1.0, 1.0]),
        r"`state\[3\]\['averaged_swa'\]` must be a tensor, got \[1\.0, 1\.0\]\.",
    ),
    "steps_negative": (
        put("param_groups", 0, "averaging_steps", -1),
        COUNTER.format("averaging_steps", "-1"),
    ),
    "steps_missing": (
        drop("param_groups", 0, "averaging_steps"),
        COUNTER.format("averaging_steps", "None"),
    ),
    "count_float": (
        put("param_groups", 0, "n_averaged_ema", 3.0),
        COUNTER.format("n_averaged_ema", "3.0"),
    ),
    "count_bool": (
        put("param_groups", 0, "n_averaged_ema", True),
        COUNTER.format("n_averaged_ema", "True"),
    ),
    "count_text": (
        put("param_groups", 0, "n_averaged_ema", "3"),
        COUNTER.format("n_averaged_ema", "'3'"),
    ),
    "count_lost_in_one_group": (
        drop("param_groups", 1, "n_averaged_ema"),
        r"`param_groups\[1\]\['n_averaged_ema'\]` must be a non-negative int, got None\.",
    ),
    "counts_differ": (
        put("param_groups", 1, "n_averaged_ema", 7),
        r"`param_groups\[1\]\['n_averaged_ema'\]` must be 3, as in the first group, got 7\.",
    ),
    "buffers_list": (
        put("averaged_buffers", []),
        r"`averaged_buffers` must be a dict, got \[\]\.",
    ),
    "buffers_of_no_rule": (
        put("averaged_buffers", "x", []),
        r"`averaged_buffers\['x'\]`" + NO_RULE,
    ),
    "buffer_lost": (
        drop("averaged_buffers", "ema", 0),
        r"`averaged_buffers\['ema'\]` must be a list of 1 tensors, got ",
    ),
    "buffers_tensor": (
        put("averaged_buffers", "ema", torch.ones(1)),
        r"`averaged_buffers\['ema'\]` must be a list of 1 tensors, got ",
    ),
    "buffer_shape": (
        put("averaged_buffers", "ema", 0, torch.ones(5)),
        r"`averaged_buffers\['ema'\]\[0\]` must have the shape \(3,\), got \(5,\)\.",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_refused_and_changes_nothing(damage: str) -> None:
    def build() -> Run:
        model = small_model()
        sgd = SGD(model.parameters(), lr=0.1, momentum=0.9)
        sgd.add_param_group({"params": [extra], "average": False})
        return model, AveragingOptimizer(sgd, RULES, buffers=[torch.ones(3)])

    extra = nn.Parameter(torch.ones(1))
    model, optimizer = build()
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    act, message = DAMAGES[damage]
    act(saved)
    model, optimizer = build()
    train(model, optimizer, 1)
    before, given = everything(model, optimizer), pickle.dumps(saved)
    groups = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert same(everything(model, optimizer), before)
    assert optimizer.state_dict()["param_groups"] == groups
    assert pickle.dumps(saved) == given


@pytest.mark.parametrize("start", RUNS)
def test_loading_leaves_the_dict_it_was_given_alone(start: Callable[[], Run]) -> None:
    model, optimizer = start()
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    given = pickle.dumps(saved)
    optimizer.load_state_dict(saved)
    optimizer.update_averages()
    assert pickle.dumps(saved) == given


def test_averages_are_saved_under_names_of_any_kind(tmp_path: Path) -> None:
    rules: dict[str, Rule] = {"": EMA(), "averaged_": SWA(), "a.b/c 平均": EMA(0.5)}
    model = small_model()
    optimizer = averaging_sgd(model, rules, buffers=[torch.ones(2)])
    train(model, optimizer, 3)
    torch.save(optimizer.state_dict(), tmp_path / "checkpoint.pt")
    other = averaging_sgd(small_model(), rules, buffers=[torch.ones(2)])
    other.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert_same_averages(other, optimizer)
    assert re.search("平均", repr(optimizer))


def test_an_interrupt_while_the_wrapped_optimizer_loads_changes_nothing() -> None:
    model, optimizer = plain()
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 1)
    before = frozen(optimizer.state_dict())

    def interrupt(_: Optimizer) -> None:
        raise KeyboardInterrupt

    optimizer.wrapped.register_load_state_dict_post_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        optimizer.load_state_dict(saved)
    assert frozen(optimizer.state_dict()) == before


def test_averages_that_change_places_in_their_own_state_dict_do_so_when_it_is_loaded() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, {"a": EMA(0.9), "b": SWA()})
    train(model, optimizer, 3)
    a, b = averages(optimizer, "a"), averages(optimizer, "b")
    saved = optimizer.state_dict()
    for entry in saved["state"].values():
        entry["averaged_a"], entry["averaged_b"] = entry["averaged_b"], entry["averaged_a"]
    optimizer.load_state_dict(saved)
    assert same(averages(optimizer, "a"), b)
    assert same(averages(optimizer, "b"), a)


def test_many_groups_are_matched_in_their_order() -> None:
    def build() -> tuple[list[nn.Parameter], AveragingOptimizer]:
        weights = [nn.Parameter(torch.full((1,), float(i))) for i in range(12)]
        groups: list[dict[str, Any]] = [{"params": [weight]} for weight in weights]
        return weights, AveragingOptimizer(SGD(groups, lr=0.1), EMA())

    _, optimizer = build()
    optimizer.update_averages()
    weights, other = build()
    other.load_state_dict(optimizer.state_dict())
    assert [other.state[weight]["averaged_ema"].item() for weight in weights] == list(range(12))


def test_what_a_state_holds_beside_entries_of_parameters_is_loaded_as_the_bare_optimizer_does() -> (
    None
):
    model, bare = small_model(), SGD(small_model().parameters(), lr=0.1, momentum=0.9)
    optimizer = averaging_sgd(model, EMA(0.9))
    train(model, optimizer, 1)
    saved = optimizer.state_dict()
    saved["state"]["note"] = "of the whole run"
    bare.load_state_dict(saved)
    optimizer.load_state_dict(saved)
    states: list[Any] = [optimizer.wrapped.state, bare.state]
    assert [state["note"] for state in states] == ["of the whole run"] * 2
