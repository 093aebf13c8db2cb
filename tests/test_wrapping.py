"""The wrapper is an Optimizer: whatever drives, inspects or copies one can do it with this one."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam, Optimizer
from training import (
    TWO_RULES,
    averages,
    averaging_sgd,
    first_layer,
    gradients_of,
    loss_of_batch,
    same,
    small_model,
    through_any_file,
    through_pickle,
    train,
    values,
)

from averaging_optim import EMA, SWA, T_ADEMA, AveragingOptimizer, Rule


def test_zero_grad_reaches_the_weights() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA())
    loss_of_batch(model, 0).backward()
    optimizer.zero_grad(set_to_none=False)
    assert same(gradients_of(model), [torch.zeros_like(p) for p in model.parameters()])
    optimizer.zero_grad()
    assert gradients_of(model) == []


def test_hooks_run_around_step_and_averaging() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA())
    seen = []

    def count(optimizer: Optimizer, *_: Any) -> None:
        seen.append(optimizer.param_groups[0]["n_averaged_ema"])

    optimizer.register_step_pre_hook(count)
    optimizer.register_step_post_hook(count)
    train(model, optimizer, 2)
    assert seen == [0, 1, 1, 2]


def test_state_dict_hooks_of_wrapper_and_wrapped_run() -> None:
    optimizer = averaging_sgd(small_model(), EMA())
    calls: list[str] = []
    for name, hooked in (("wrapper", optimizer), ("wrapped", optimizer.wrapped)):

        def note(*_: Any, name: str = name) -> None:
            calls.append(name)

        hooked.register_state_dict_pre_hook(note)
        hooked.register_state_dict_post_hook(note)
        hooked.register_load_state_dict_pre_hook(note)
        hooked.register_load_state_dict_post_hook(note)
    optimizer.load_state_dict(optimizer.state_dict())
    assert calls == ["wrapper", "wrapped", "wrapped", "wrapper"] * 2


def test_hooks_may_replace_the_state_dict() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA())
    train(model, optimizer, 1)

    def pack(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        return {"packed": state_dict}

    def unpack(_: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any]:
        packed: dict[str, Any] = state_dict["packed"]
        return packed

    optimizer.register_state_dict_post_hook(pack)
    optimizer.register_load_state_dict_pre_hook(unpack)
    saved = optimizer.state_dict()
    assert set(saved) == {"packed"}
    train(model, optimizer, 1, first=1)
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["n_averaged_ema"] == 1


def test_groups_and_defaults_are_those_of_the_wrapped_optimizer() -> None:
    optimizer = averaging_sgd(small_model(), EMA())
    assert isinstance(optimizer, Optimizer)
    assert optimizer.param_groups is optimizer.wrapped.param_groups
    assert optimizer.defaults is optimizer.wrapped.defaults
    groups = optimizer.param_groups[:]
    optimizer.param_groups = groups
    assert optimizer.wrapped.param_groups is groups


def test_unknown_attributes_are_looked_up_on_the_wrapped_optimizer() -> None:
    class Counting(SGD):
        counted = 3

    inner = Counting(small_model().parameters(), lr=0.1)
    optimizer: Any = AveragingOptimizer(inner, EMA())
    assert optimizer.counted == 3
    optimizer.counted = 4
    assert inner.counted == 4
    del optimizer.counted
    assert inner.counted == 3
    optimizer.note = "mine"
    assert not hasattr(inner, "note")
    del optimizer.note
    assert not hasattr(optimizer, "note")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("swap_to_avraged", "Did you mean 'swap_to_averaged'"),
        ("paramgroups", "Did you mean 'param_groups'"),
        ("xyz", "'xyz'$"),
        ("optimizer", "'optimizer'$"),
    ],
)
def test_a_mistyped_attribute_is_an_error_that_suggests_the_right_one(name: str, hint: str) -> None:
    optimizer = averaging_sgd(small_model(), EMA())
    with pytest.raises(AttributeError, match=f"^'AveragingOptimizer' object has no .*{hint}"):
        getattr(optimizer, name)


@pytest.mark.parametrize(
    "part", ["AveragingOptimizer", "'slow': EMA(", "decay=0.9", "Adam", "lr: 0.25"]
)
def test_repr_shows_the_wrapper_the_rules_and_the_groups(part: str) -> None:
    optimizer = AveragingOptimizer(Adam(small_model().parameters(), lr=0.25), {"slow": EMA(0.9)})
    assert part in repr(optimizer)


@pytest.mark.parametrize(("rule", "name"), [(EMA(), "ema"), (SWA(), "swa"), (T_ADEMA(), "t_adema")])
def test_a_rule_alone_is_named_after_its_class_in_lower_case(rule: Rule, name: str) -> None:
    optimizer = averaging_sgd(small_model(), rule)
    assert optimizer.rules == {name: rule}
    assert f"n_averaged_{name}" in optimizer.param_groups[0]


@pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle, through_any_file])
def test_a_copy_has_averages_of_its_own(duplicate: Any) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, TWO_RULES, buffers=[torch.ones(2)])
    train(model, optimizer, 3)
    copied_model, copied = duplicate((model, optimizer))
    train(model, optimizer, 3, first=3)
    before = averages(optimizer, "ema")
    train(copied_model, copied, 3, first=3)
    assert same(averages(copied, "ema"), before)
    assert same(averages(copied, "swa"), averages(optimizer, "swa"))
    train(copied_model, copied, 1)
    assert same(averages(optimizer, "ema"), before)


class TestState:
    """`optimizer.state` shows, and takes, what the wrapped optimizer and the averages hold."""

    @pytest.fixture
    def model(self) -> nn.Sequential:
        return small_model()

    @pytest.fixture
    def optimizer(self, model: nn.Sequential) -> AveragingOptimizer:
        buffer = torch.ones(2)
        optimizer = averaging_sgd(model, TWO_RULES, buffers=[buffer])
        train(model, optimizer, 3)
        return optimizer

    def test_is_empty_before_the_first_step(self) -> None:
        optimizer = averaging_sgd(small_model(), EMA())
        assert not optimizer.state
        assert len(optimizer.state) == 0

    def test_reading_a_new_parameter_makes_an_empty_entry_as_torchs_does(
        self, optimizer: AveragingOptimizer
    ) -> None:
        stranger = nn.Parameter(torch.zeros(1))
        assert optimizer.state[stranger] == {}
        assert optimizer.wrapped.state[stranger] == {}
        with pytest.raises(KeyError):
            optimizer.state[stranger]["averaged_ema"]
        with pytest.raises(KeyError):
            del optimizer.state[stranger]["averaged_ema"]

    def test_shows_the_parameters_with_all_their_entries(
        self, model: nn.Sequential, optimizer: AveragingOptimizer
    ) -> None:
        assert [id(p) for p in optimizer.state] == [id(p) for p in model.parameters()]
        for entry in optimizer.state.values():
            assert set(entry) == {"momentum_buffer", "averaged_ema", "averaged_swa"}
        assert "averaged_swa" in repr(optimizer.state)
        assert "averaged_swa" in repr(optimizer.state[first_layer(model).weight])

    def test_shows_averages_that_the_wrapped_optimizer_has_no_entry_beside(self) -> None:
        weight = nn.Parameter(torch.ones(1))
        optimizer = AveragingOptimizer(SGD([weight], lr=0.1), EMA())
        optimizer.update_averages()
        assert list(optimizer.state[weight]) == ["averaged_ema"]
        assert not optimizer.wrapped.state

    def test_moving_every_tensor_as_trainers_do_lands_in_place(
        self, model: nn.Sequential, optimizer: AveragingOptimizer
    ) -> None:
        weight = first_layer(model).weight
        average = optimizer.state[weight]["averaged_ema"]
        before = optimizer.state_dict()["state"]
        for entry in optimizer.state.values():
            for key, value in entry.items():
                entry[key] = value.clone()
        after = optimizer.state_dict()["state"]
        assert optimizer.state[weight]["averaged_ema"] is average
        assert after[0]["momentum_buffer"] is not before[0]["momentum_buffer"]
        for index, entry in before.items():
            assert same(after[index].values(), entry.values())

    def test_a_whole_entry_can_be_replaced(
        self, model: nn.Sequential, optimizer: AveragingOptimizer
    ) -> None:
        weight = first_layer(model).weight
        average = optimizer.state[weight]["averaged_ema"]
        optimizer.state[weight] = {
            "momentum_buffer": torch.ones(4, 3),
            "averaged_ema": torch.full((4, 3), 2.0),
            "averaged_swa": torch.full((4, 3), 3.0),
        }
        assert optimizer.state[weight]["averaged_ema"] is average
        assert same([average], [torch.full((4, 3), 2.0)])
        assert set(optimizer.wrapped.state[weight]) == {"momentum_buffer"}

    def test_assigning_an_entry_to_itself_changes_nothing(
        self, optimizer: AveragingOptimizer
    ) -> None:
        before = copy.deepcopy(optimizer.state_dict()["state"])
        for parameter, entry in optimizer.state.items():
            optimizer.state[parameter] = entry
        optimizer.state = optimizer.state
        for index, entry in optimizer.state_dict()["state"].items():
            assert same(entry.values(), before[index].values())

    def test_new_entries_land_in_the_wrapped_optimizer(
        self, model: nn.Sequential, optimizer: AveragingOptimizer
    ) -> None:
        weight = first_layer(model).weight
        optimizer.state[weight]["mine"] = 1
        assert optimizer.wrapped.state[weight]["mine"] == 1
        del optimizer.state[weight]["mine"]
        assert "mine" not in optimizer.wrapped.state[weight]

    def test_an_average_that_was_deleted_starts_at_the_present_weights(
        self, model: nn.Sequential, optimizer: AveragingOptimizer
    ) -> None:
        del optimizer.state[first_layer(model).weight]["averaged_ema"]
        assert "averaged_ema" not in optimizer.state[first_layer(model).weight]
        optimizer.update_averages("ema")
        assert same(
            [optimizer.state[first_layer(model).weight]["averaged_ema"]],
            [first_layer(model).weight],
        )

    def test_shows_entries_of_the_wrapped_optimizer_that_are_of_no_parameter(
        self, optimizer: AveragingOptimizer
    ) -> None:
        state: Any = optimizer.state
        state["steps"] = 3
        wrapped: Any = optimizer.wrapped.state
        assert wrapped["steps"] == state["steps"] == 3
        assert "'steps': 3" in repr(state)
        optimizer.state = state
        assert state["steps"] == 3
        del state["steps"]
        assert "steps" not in state

    def test_can_be_reset_as_with_any_optimizer(
        self, model: nn.Sequential, optimizer: AveragingOptimizer
    ) -> None:
        optimizer.state = defaultdict(dict)
        assert not optimizer.state
        assert not optimizer.wrapped.state
        train(model, optimizer, 1)

    def test_an_average_kept_on_another_device_goes_back_there(self) -> None:
        weight = nn.Parameter(torch.ones(2))
        optimizer = AveragingOptimizer(SGD([weight], lr=0.1), EMA(), device="meta")
        optimizer.update_averages()
        optimizer.state[weight]["averaged_ema"] = torch.zeros(2)
        assert optimizer.state[weight]["averaged_ema"].device.type == "meta"

    def test_an_average_follows_its_weight_to_another_device(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # Between these devices `to` would make new parameters; on a GPU it never does.
        monkeypatch.setattr(torch.__future__, "_swap_module_params_on_conversion", True)
        module = nn.Linear(2, 2)
        optimizer = AveragingOptimizer(SGD(module.parameters(), lr=0.1), EMA())
        optimizer.update_averages()
        module.to("meta")
        entries = [optimizer.state[weight] for weight in module.parameters()]
        for entry in entries:
            for key, value in entry.items():
                entry[key] = value.to("meta")
        assert {entry["averaged_ema"].device.type for entry in entries} == {"meta"}

    @pytest.mark.parametrize(
        ("value", "message"),
        [
            (torch.zeros(4, 3, dtype=torch.int64), r"must be floating-point, got torch\.int64"),
            (1.0, r"must be a tensor, got 1\.0"),
        ],
    )
    def test_refuses_what_cannot_be_an_average(
        self, model: nn.Sequential, optimizer: AveragingOptimizer, value: object, message: str
    ) -> None:
        with pytest.raises(ValueError, match=r"`state\[\.\.\.\]\['averaged_ema'\]` " + message):
            optimizer.state[first_layer(model).weight]["averaged_ema"] = value


def test_averaging_leaves_the_gradients_alone() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA())
    loss_of_batch(model, 0).backward()
    gradients = values(gradients_of(model))
    optimizer.step()
    with optimizer.swap_to_averaged():
        pass
    assert same(gradients_of(model), gradients)
