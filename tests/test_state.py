"""`optimizer.state` is torch's `defaultdict(dict)` to whoever reaches into it."""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.optim import SGD, Adam, Optimizer
from torch.utils import _pytree as pytree
from training import averages, first_layer, frozen, same, small_model, train, values

from averaging_optim import EMA, LAWA, SWA, AveragingOptimizer, Rule

RULES: dict[str, Rule] = {"ema": EMA(0.9), "last": LAWA(k=3)}
AVERAGED = {"averaged_ema", "averaged_last", "averaged_last_1", "averaged_last_2"}


def pair() -> tuple[list[nn.Parameter], Any, list[nn.Parameter], Any]:
    """Return weights with an optimizer that averages, and the same with a bare one, trained."""
    runs: list[Any] = []
    for is_wrapped in (True, False):
        weights = [nn.Parameter(torch.full((2,), float(i))) for i in range(3)]
        adam = Adam(weights, lr=0.1)
        optimizer = AveragingOptimizer(adam, RULES) if is_wrapped else adam
        step(optimizer)
        runs += [weights, optimizer]
    weights, optimizer, twins, bare = runs
    return weights, optimizer, twins, bare


def step(optimizer: Optimizer, gradient: float = 1.0) -> None:
    for group in optimizer.param_groups:
        for i, weight in enumerate(group["params"]):
            weight.grad = torch.full_like(weight, gradient + i)
    optimizer.step()


# What programs do with a state: (state, parameter, another parameter, all parameters) → result.
Use = Callable[[Any, Tensor, Tensor, list[nn.Parameter]], Any]
USES: dict[str, Use] = {
    "read": lambda state, p, q, ps: state[p],
    "get": lambda state, p, q, ps: state.get(p),
    "get_or": lambda state, p, q, ps: state.get(p, 7),
    "contains": lambda state, p, q, ps: p in state,
    "length": lambda state, p, q, ps: len(state),
    "is_true": lambda state, p, q, ps: bool(state),
    "delete": lambda state, p, q, ps: state.__delitem__(p),
    "pop": lambda state, p, q, ps: state.pop(p),
    "pop_or": lambda state, p, q, ps: state.pop(p, None),
    "popitem": lambda state, p, q, ps: state.popitem()[1],
    "setdefault": lambda state, p, q, ps: state.setdefault(p, {"mine": 1}),
    "setdefault_none": lambda state, p, q, ps: state.setdefault("steps", 1),
    "assign": lambda state, p, q, ps: state.__setitem__(p, {"mine": 2}),
    "assign_empty": lambda state, p, q, ps: state.__setitem__(p, {}),
    "assign_other": lambda state, p, q, ps: state.__setitem__(p, state[q]),
    "assign_itself": lambda state, p, q, ps: state.__setitem__(p, state[p]),
    "assign_copy": lambda state, p, q, ps: state.__setitem__(p, dict(state[p])),
    "update": lambda state, p, q, ps: state.update({p: {"mine": 3}, q: {"mine": 4}}),
    "update_in_place": lambda state, p, q, ps: state.__ior__({p: {"mine": 3}}) is state,
    "clear": lambda state, p, q, ps: state.clear(),
    "write": lambda state, p, q, ps: state[p].__setitem__("mine", 5),
    "write_all": lambda state, p, q, ps: write_all(state),
    "entry_update": lambda state, p, q, ps: state[p].update(mine=6),
    "entry_pop": lambda state, p, q, ps: state[p].pop("mine", None),
    "entry_delete": lambda state, p, q, ps: state[p].__delitem__("mine"),
    "entry_get": lambda state, p, q, ps: state[p].get("mine"),
    "entry_clear": lambda state, p, q, ps: state[p].clear(),
    "entry_is_the_same": lambda state, p, q, ps: state[p] is state[p],
    "entry_is_a_dict": lambda state, p, q, ps: isinstance(state[p], dict),
    "unhashable": lambda state, p, q, ps: state.get([]),
    "no_parameter": lambda state, p, q, ps: state.__setitem__("steps", 3),
    "no_parameter_read": lambda state, p, q, ps: state["steps"],
    "default_factory": lambda state, p, q, ps: state.default_factory,
    "union": lambda state, p, q, ps: len(state | {"x": 1}),
    "reversed": lambda state, p, q, ps: [position(key, ps) for key in reversed(state)],
    "copy": lambda state, p, q, ps: type(state.copy()),
    "equal": lambda state, p, q, ps: state == state.copy(),
    "assign_no_dict": lambda state, p, q, ps: state.__setitem__(p, 7),
    "union_from_the_right": lambda state, p, q, ps: len({"x": 1} | state),
    "move": lambda state, p, q, ps: state.__setitem__(q, state.pop(p)),
}


def write_all(state: Any) -> None:
    """Replace each value by a copy, as programs do that move a state to another device."""
    for entry in state.values():
        if isinstance(entry, dict):
            for key, value in entry.items():
                entry[key] = copy.deepcopy(value)


def position(key: object, weights: list[nn.Parameter]) -> Any:
    return next((i for i, weight in enumerate(weights) if weight is key), key)


def plain(value: Any) -> Any:
    """Return what a use gave, without averages, by which alone it may differ."""
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items() if key not in AVERAGED}
    return frozen(value) if isinstance(value, Tensor) else value


def outcome(use: Use, optimizer: Any, weights: list[nn.Parameter], i: int, j: int) -> Any:
    try:
        result = use(optimizer.state, weights[i], weights[j], weights)
    except Exception as error:
        return type(error)
    return plain(result)


def shown(optimizer: Any, weights: list[nn.Parameter]) -> Any:
    return [(position(key, weights), plain(entry)) for key, entry in optimizer.state.items()]


@given(
    uses=st.lists(
        st.tuples(st.sampled_from([*USES, "step"]), st.integers(0, 2), st.integers(0, 2)),
        max_size=8,
    )
)
def test_whatever_is_done_to_a_state_comes_out_as_with_the_bare_optimizer(
    uses: list[tuple[str, int, int]],
) -> None:
    weights, optimizer, twins, bare = pair()
    for name, i, j in uses:
        if name == "step":
            results = [outcome_of_step(each) for each in (optimizer, bare)]
        else:
            runs = ((optimizer, weights), (bare, twins))
            results = [outcome(USES[name], each, of, i, j) for each, of in runs]
        assert results[0] == results[1], name
        assert shown(optimizer, weights) == shown(bare, twins), name
        kept = optimizer.wrapped.state
        assert all(AVERAGED.isdisjoint(each) for each in kept.values() if isinstance(each, dict))
    assert same(weights, twins)


def outcome_of_step(optimizer: Optimizer) -> Any:
    try:
        step(optimizer)
    except Exception as error:  # such as for an entry that lacks its moments
        return type(error)
    return None


def test_the_state_is_one_object_and_a_dict_until_another_is_assigned() -> None:
    weights, optimizer, _, _ = pair()
    state = optimizer.state
    assert state is optimizer.state
    assert isinstance(state, defaultdict)
    assert isinstance(state[weights[0]], dict)
    optimizer.state = defaultdict(dict)
    assert optimizer.state is not state


@pytest.mark.parametrize(
    "through",
    [
        copy.copy,
        copy.deepcopy,
        lambda state: pickle.loads(pickle.dumps(state)),
        dict,
        lambda state: state | {},
        lambda state: {**state},
    ],
    ids=["copy", "deepcopy", "pickle", "dict", "union", "unpacking"],
)
def test_copies_of_the_state_are_plain_dicts_and_hold_averages_too(
    through: Callable[[Any], Any],
) -> None:
    weights, optimizer, _, _ = pair()
    copied = through(optimizer.state)
    assert type(copied) in (dict, defaultdict)
    assert len(copied) == 3
    for entry, weight in zip(copied.values(), weights, strict=True):
        assert set(entry) == {"step", "exp_avg", "exp_avg_sq", *AVERAGED}
        assert same([entry["averaged_ema"]], [optimizer.state[weight]["averaged_ema"]])


class Splats:
    """Rows that are added and removed while they train, as in 3D Gaussian splatting."""

    def __init__(self, is_wrapped: bool) -> None:
        self.rows = nn.Parameter(torch.arange(12.0).view(4, 3))
        adam = Adam([{"params": [self.rows], "name": "xyz"}], lr=0.1)
        self.optimizer: Any = AveragingOptimizer(adam, RULES) if is_wrapped else adam

    def grow(self, averages_too: bool = True) -> None:
        more = torch.ones(2, 3)
        self.replace(
            torch.cat([self.rows.detach(), more]),
            lambda key, old: torch.cat([old, more if key in AVERAGED else torch.zeros_like(more)]),
            averages_too,
        )

    def prune(self) -> None:
        self.replace(self.rows.detach()[1:], lambda _, old: old[1:], averages_too=True)

    def replace(
        self, rows: Tensor, changed: Callable[[str, Tensor], Tensor], averages_too: bool
    ) -> None:
        (group,) = self.optimizer.param_groups
        stored = self.optimizer.state.get(group["params"][0], None)
        for key in list(stored):
            if key != "step" and (averages_too or key not in AVERAGED):
                stored[key] = changed(key, stored[key])
        del self.optimizer.state[group["params"][0]]
        group["params"][0] = self.rows = nn.Parameter(rows)
        self.optimizer.state[group["params"][0]] = stored


def test_rows_that_are_added_and_removed_train_as_with_the_bare_optimizer_and_are_averaged() -> (
    None
):
    splats, bare = Splats(is_wrapped=True), Splats(is_wrapped=False)
    before = Tensor()
    for run in (splats, bare):
        step(run.optimizer)
        step(run.optimizer)
        before = run.optimizer.state[run.rows].get("averaged_ema", before)
        run.grow()
        step(run.optimizer)
        run.prune()
        step(run.optimizer)
    assert same([splats.rows], [bare.rows])
    assert splats.optimizer.param_groups[0]["n_averaged_ema"] == 4
    assert list(splats.optimizer.state) == [splats.rows]
    kept = splats.optimizer.state[splats.rows]
    assert {kept[key].shape for key in AVERAGED} == {(5, 3)}
    # The last rows were there for two updates, and at 1 before.
    grown = torch.cat([before, torch.ones(2, 3)])
    assert (kept["averaged_ema"] - grown[1:]).abs().max() < 0.1


def test_rows_whose_average_was_not_resized_restart_it_and_warn_once() -> None:
    splats = Splats(is_wrapped=True)
    step(splats.optimizer)
    splats.grow(averages_too=False)
    message = r"changed their shapes to \(6, 3\): their averages 'ema', 'last' start"
    with pytest.warns(UserWarning, match=message) as caught:
        step(splats.optimizer)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    rows = splats.rows.detach().clone()
    assert same([splats.optimizer.state[splats.rows]["averaged_ema"]], [rows])
    step(splats.optimizer)


def test_an_entry_that_is_taken_out_stays_what_it_was_without_its_parameter() -> None:
    weights, optimizer, _, _ = pair()
    expected = values(optimizer.state[weights[0]].values())
    entry = optimizer.state.pop(weights[0])
    kept_alive = optimizer.state[weights[1]]
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(2))]
    step(optimizer)
    assert same(entry.values(), expected)
    assert kept_alive.keys() >= AVERAGED
    with pytest.raises(ValueError, match="must be a tensor, got 'x'"):
        entry["averaged_ema"] = "x"
    entry["averaged_ema"] = torch.zeros(2)
    assert same([entry["averaged_ema"]], [torch.zeros(2)])
    del entry["averaged_ema"]
    assert "averaged_ema" not in entry


def test_a_state_that_is_taken_away_and_put_back_is_what_it_was() -> None:
    weights, optimizer, _, _ = pair()
    saved, before = optimizer.state, frozen(optimizer.state_dict())
    tensors = [saved[weight]["averaged_ema"] for weight in weights]
    groups = [dict(group) for group in optimizer.param_groups]
    optimizer.state = defaultdict(dict)
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.zeros(3))]
    step(optimizer)
    for group, kept in zip(optimizer.param_groups, groups, strict=True):
        group.update(kept)
    optimizer.state = saved
    assert optimizer.state is saved
    assert frozen(optimizer.state_dict()) == before
    assert all(
        saved[weight]["averaged_ema"] is tensor
        for weight, tensor in zip(weights, tensors, strict=True)
    )


@pytest.mark.parametrize("is_fake", [True, False], ids=["fake", "real"])
def test_torchs_own_swap_of_parameters_and_state_leaves_averages_and_counts_alone(
    is_fake: bool,
) -> None:
    stateless = pytest.importorskip("torch.optim._stateless")
    model = small_model()
    optimizer = AveragingOptimizer(SGD(model.parameters(), lr=0.1, momentum=0.9), RULES)
    train(model, optimizer, 3)
    before, groups = frozen(optimizer.state_dict()["state"]), optimizer.state_dict()["param_groups"]
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    convert = mode.from_tensor if is_fake else lambda tensor: tensor.detach().clone()
    parameters = {name: convert(each) for name, each in model.named_parameters()}
    state_dict = pytree.tree_map_only(Tensor, convert, optimizer.state_dict())
    for each in parameters.values():
        each.grad = torch.ones_like(each)
    with stateless.swap_in_optimizer_params_and_state(optimizer, parameters, state_dict):
        optimizer.step()
    assert frozen(optimizer.state_dict()["state"]) == before
    assert optimizer.state_dict()["param_groups"] == groups
    if not is_fake:  # what was swapped in has been averaged in place
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        assert frozen(optimizer.state_dict()["state"]) == frozen(state_dict["state"])


def reset(optimizer: Any, how: str) -> None:
    weights = optimizer.param_groups[0]["params"]
    if how == "clear":
        optimizer.state.clear()
    elif how == "assign":
        optimizer.state = defaultdict(dict)
    elif how == "delete":
        for weight in weights:
            del optimizer.state[weight]
    elif how == "empty":
        for weight in weights:
            optimizer.state[weight] = {}
    elif how == "clear_entries":
        for weight in weights:
            optimizer.state[weight].clear()
    else:
        while optimizer.state:
            optimizer.state.popitem()


@pytest.mark.parametrize("how", ["clear", "assign", "delete", "empty", "clear_entries", "popitem"])
def test_resetting_a_state_resets_the_wrapped_optimizer_and_no_average(how: str) -> None:
    weights, optimizer, twins, bare = pair()
    tensors = [optimizer.state[weight]["averaged_ema"] for weight in weights]
    expected = values(tensors)
    reset(optimizer, how)
    reset(bare, how)
    assert len(optimizer.state) == len(bare.state)
    assert not any(optimizer.wrapped.state.values())
    assert same(averages(optimizer, "ema"), expected)
    step(optimizer)
    step(bare)
    assert same(weights, twins)
    assert optimizer.param_groups[0]["n_averaged_ema"] == 2
    for weight, tensor, value in zip(weights, tensors, expected, strict=True):
        assert optimizer.state[weight]["averaged_ema"] is tensor
        assert same([tensor], [value.lerp(weight.detach(), 0.1)])
        assert weight in optimizer.state


def test_averages_of_parameters_that_left_are_let_go() -> None:
    first, second = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizer = AveragingOptimizer(SGD([first, second], lr=0.1), RULES)
    step(optimizer)
    average = weakref.ref(optimizer.state[first]["averaged_ema"])
    left = weakref.ref(first)
    optimizer.param_groups[0]["params"] = [second]
    del first
    step(optimizer)
    gc.collect()
    assert average() is None
    assert left() is None
    assert list(optimizer.state) == [second]


def test_what_is_kept_under_no_parameter_stays_through_steps_and_the_last_item_is_popped_last() -> (
    None
):
    weights, optimizer, _, _ = pair()
    optimizer.state["steps"] = 3
    optimizer.param_groups[0]["params"] = weights[1:]
    step(optimizer)
    assert optimizer.wrapped.state["steps"] == 3
    assert optimizer.state.popitem() == ("steps", 3)
    optimizer.state.clear()
    with pytest.raises(KeyError):
        optimizer.state.popitem()


def test_averages_are_taken_over_of_an_optimizer_that_keeps_nothing_itself() -> None:
    def build() -> tuple[nn.Parameter, SGD]:
        weight = nn.Parameter(torch.ones(2))
        return weight, SGD([weight], lr=0.1)

    optimizer = AveragingOptimizer(build()[1], SWA())
    step(optimizer)
    weight, sgd = build()
    sgd.load_state_dict(optimizer.state_dict())
    resumed = AveragingOptimizer(sgd, SWA())
    assert frozen(resumed.state_dict()) == frozen(optimizer.state_dict())
    assert not sgd.state
    assert list(resumed.state) == [weight]


def test_an_optimizer_that_is_deleted_frees_its_averages_at_once() -> None:
    weights, optimizer, _, _ = pair()
    average = weakref.ref(optimizer.state[weights[0]]["averaged_ema"])
    with optimizer.swap_to_averaged("ema"):
        optimizer.state_dict()
    gc.collect()
    gc.disable()  # by counts of references alone
    try:
        del optimizer
        assert average() is None
    finally:
        gc.enable()


@pytest.mark.parametrize(
    "write",
    [
        lambda o, p, q: o.state[p].update(exp_avg=torch.ones(2), averaged_ema=1.0),
        lambda o, p, q: o.state.update({q: {"mine": 1}, p: {"averaged_last_1": None}}),
        lambda o, p, q: o.state.__setitem__(p, {"averaged_ema": torch.ones(2).int()}),
        lambda o, p, q: setattr(o, "state", {q: {}, p: {"averaged_ema": "x"}}),
    ],
    ids=["entry", "update", "assignment", "whole"],
)
def test_a_write_that_is_refused_changes_nothing(
    write: Callable[[Any, Tensor, Tensor], None],
) -> None:
    weights, optimizer, _, _ = pair()
    state, before = optimizer.state, frozen(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"`state\[\.\.\.\]\['averaged_"):
        write(optimizer, weights[0], weights[1])
    assert frozen(optimizer.state_dict()) == before
    assert optimizer.state is state


@pytest.mark.parametrize(
    "prepare",
    [
        lambda optimizer, model: optimizer.averaged_model(model),
        lambda optimizer, model: optimizer.update_averages(),
        lambda optimizer, model: optimizer.load_averaged_state_dict(model, model.state_dict()),
        lambda optimizer, model: optimizer.state[first_layer(model).weight],
    ],
    ids=["averaged_model", "update_averages", "load_averaged_state_dict", "a_look"],
)
def test_distributed_loading_fills_an_optimizer_that_has_averages_and_took_no_step(
    prepare: Callable[[Any, nn.Sequential], object], tmp_path: Path
) -> None:
    def build(model: nn.Module) -> AveragingOptimizer:
        return AveragingOptimizer(Adam(model.parameters(), lr=0.1), {"mean": SWA()})

    def parts(model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
        return dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))

    model = small_model()
    optimizer = build(model)
    train(model, optimizer, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that one process needs no process group
        save(parts(model, optimizer), checkpoint_id=tmp_path)
        fresh_model = small_model()
        fresh = build(fresh_model)
        fresh.update_averages()
        prepare(fresh, fresh_model)
        assert len(fresh.state) == 0
        loaded = parts(fresh_model, fresh)
        load(loaded, checkpoint_id=tmp_path)
    set_state_dict(
        fresh_model,
        fresh,
        model_state_dict=loaded["model"],
        optim_state_dict=loaded["optimizer"],
    )
    assert frozen(fresh.state_dict()["state"]) == frozen(optimizer.state_dict()["state"])
    assert fresh.param_groups[0]["n_averaged_mean"] == 3


class Averager(SGD):
    """An optimizer whose own state has keys like ours."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight].setdefault("averaged_grad", torch.zeros_like(weight))
                self.state[weight]["averaged_grad"].lerp_(weight.grad, 0.5)
        return super().step(closure)


def test_an_optimizer_whose_own_keys_are_like_ours_saves_and_loads() -> None:
    def build() -> tuple[nn.Parameter, AveragingOptimizer]:
        weight = nn.Parameter(torch.ones(2))
        return weight, AveragingOptimizer(Averager([weight], lr=0.1), RULES)

    weight, optimizer = build()
    step(optimizer)
    other, loaded = build()
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert frozen(loaded.state_dict()) == frozen(optimizer.state_dict())
    assert "averaged_grad" in loaded.wrapped.state[other]
    with torch.no_grad():
        other.copy_(weight)
    step(optimizer)
    step(loaded)
    assert frozen(loaded.state_dict()) == frozen(optimizer.state_dict())


def test_a_rule_whose_key_the_optimizer_has_itself_is_refused_at_the_first_step() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = AveragingOptimizer(Averager([weight], lr=0.1), {"grad": EMA()})
    with pytest.raises(ValueError, match="`rule` must not name an average 'grad': Averager"):
        step(optimizer)


@pytest.mark.parametrize("is_wrapped_first", [True, False], ids=["inner_load", "load_then_wrap"])
def test_averages_that_the_wrapped_optimizer_has_loaded_itself_are_taken_over(
    is_wrapped_first: bool,
) -> None:
    weights, optimizer, _, _ = pair()
    saved = copy.deepcopy(optimizer.state_dict())
    adam = Adam([nn.Parameter(weight.detach().clone()) for weight in weights], lr=0.1)
    if is_wrapped_first:
        resumed = AveragingOptimizer(adam, RULES)
        step(resumed)
        adam.load_state_dict(saved)
    else:
        adam.load_state_dict(saved)
        resumed = AveragingOptimizer(adam, RULES)
    with torch.no_grad():
        for own, weight in zip(adam.param_groups[0]["params"], weights, strict=True):
            own.copy_(weight)
    assert frozen(resumed.state_dict()) == frozen(optimizer.state_dict())
    step(resumed)
    step(optimizer)
    assert frozen(resumed.state_dict()) == frozen(optimizer.state_dict())
    assert all(AVERAGED.isdisjoint(entry) for entry in adam.state.values())
