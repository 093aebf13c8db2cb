"""In the block the model holds the average; after it everything is exactly as before."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import update_bn
from training import (
    DTYPES,
    TWO_RULES,
    averages,
    averaging_sgd,
    everything,
    first_layer,
    loss_of_batch,
    model_with_batch_norm,
    same,
    small_model,
    tensors_in,
    through_pickle,
    train,
    values,
)

from averaging_optim import EMA, LAWA, SWA, AveragingOptimizer, Lookahead, Rule


@pytest.mark.parametrize("name", TWO_RULES)
@pytest.mark.parametrize(("weights", "dtype"), DTYPES)
def test_the_model_holds_the_average_inside_and_its_weights_outside(
    weights: torch.dtype, dtype: torch.dtype | None, name: str
) -> None:
    model = small_model(weights)
    optimizer = averaging_sgd(model, TWO_RULES, dtype=dtype)
    train(model, optimizer, 5)
    before = everything(model, optimizer)
    addresses = [p.data_ptr() for p in model.parameters()]
    expected = [average.to(weights) for average in averages(optimizer, name)]
    with optimizer.swap_to_averaged(name):
        assert same(model.parameters(), expected)
        assert [p.data_ptr() for p in model.parameters()] == addresses
    assert same(everything(model, optimizer), before)


@pytest.mark.parametrize(("weights", "dtype"), DTYPES)
def test_an_exception_in_the_block_restores_everything(
    weights: torch.dtype, dtype: torch.dtype | None
) -> None:
    model = small_model(weights)
    optimizer = averaging_sgd(model, EMA(0.9), dtype=dtype)
    train(model, optimizer, 5)
    before = everything(model, optimizer)
    with pytest.raises(KeyboardInterrupt), optimizer.swap_to_averaged():
        raise KeyboardInterrupt
    assert same(everything(model, optimizer), before)
    train(model, optimizer, 1, first=5)


def test_values_that_no_arithmetic_brings_back_come_back() -> None:
    kept = torch.tensor([torch.nan, -torch.nan, torch.inf, -0.0, 1e-45, 3.4e38])
    weight = nn.Parameter(kept.clone())
    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), SWA())
    optimizer.update_averages()
    with torch.no_grad():
        weight.copy_(torch.arange(6.0))
    with optimizer.swap_to_averaged():
        assert same([weight], [kept])
    assert same([weight], [torch.arange(6.0)])
    assert same(averages(optimizer, "swa"), [kept])


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "scalar": lambda: torch.randn(()),
    "empty": lambda: torch.randn(0, 3),
    "contiguous": lambda: torch.randn(3_000_001),
    "one_long_row": lambda: torch.randn(1, 2_500_000),
    "transposed": lambda: torch.randn(1500, 1401).t(),
    "channels_last": lambda: torch.randn(40, 64, 30, 31).to(memory_format=torch.channels_last),
    "complex": lambda: torch.randn(1_200_000, dtype=torch.complex64),
}


@pytest.mark.parametrize("make", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_tensors_of_every_layout_and_size_are_exchanged(make: Callable[[], Tensor]) -> None:
    torch.manual_seed(0)
    first, second = make(), make()
    weight = nn.Parameter(first.clone(memory_format=torch.preserve_format))
    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), SWA())
    optimizer.update_averages()
    with torch.no_grad():
        weight.copy_(second)
    with optimizer.swap_to_averaged():
        assert same([weight], [first])
    assert same([weight], [second])
    assert same(averages(optimizer, "swa"), [first])


def test_the_same_swap_nests_and_the_outer_one_restores() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9))
    train(model, optimizer, 5)
    before = everything(model, optimizer)
    with optimizer.swap_to_averaged():
        inside = values(model.parameters())
        with optimizer.swap_to_averaged("ema"):
            assert same(model.parameters(), inside)
        assert same(model.parameters(), inside)
    assert same(everything(model, optimizer), before)


REFUSED: dict[str, Callable[[AveragingOptimizer], Any]] = {
    "step": lambda optimizer: optimizer.step(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "add_param_group": lambda optimizer: optimizer.add_param_group(
        {"params": [nn.Parameter(torch.ones(1))]}
    ),
    "update_averages": lambda optimizer: optimizer.update_averages(),
    "swap_to_averaged('swa')": lambda optimizer: optimizer.swap_to_averaged("swa").__enter__(),
    "evaluate_averages": lambda optimizer: optimizer.evaluate_averages(lambda: None),
    "load_averaged_state_dict": lambda optimizer: optimizer.load_averaged_state_dict(
        nn.Linear(1, 1), {}
    ),
    "copy or pickle": copy.deepcopy,
    "state[...]['averaged_ema'] = ...": lambda optimizer: optimizer.state[
        optimizer.param_groups[0]["params"][0]
    ].update(averaged_ema=torch.ones(4, 3)),
}


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "fresh"])
@pytest.mark.parametrize("call", REFUSED)
def test_calls_that_would_mix_weights_and_averages_are_refused_inside(
    call: str, trained: bool
) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, TWO_RULES)
    train(model, optimizer, 3)
    if not trained:
        model = small_model()
        optimizer = averaging_sgd(model, TWO_RULES)
        optimizer.averaged_model(model, "ema")
    before = everything(model, optimizer)
    with optimizer.swap_to_averaged("ema"), pytest.raises(RuntimeError) as refusal:
        REFUSED[call](optimizer)
    assert str(refusal.value) == (
        f"`{call}` is not allowed inside `swap_to_averaged('ema')`. Leave its block first."
    )
    assert same(everything(model, optimizer), before)


def test_every_average_is_evaluated_in_one_call_and_the_weights_first() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, TWO_RULES)
    train(model, optimizer, 5)
    before = everything(model, optimizer)
    results = optimizer.evaluate_averages(lambda: values(model.parameters()))
    assert list(results) == ["weights", "ema", "swa"]
    assert same(results["weights"], model.parameters())
    for name in TWO_RULES:
        assert same(results[name], averages(optimizer, name))
    assert same(everything(model, optimizer), before)


def test_a_failure_in_an_evaluation_of_all_averages_restores_the_weights() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, TWO_RULES)
    train(model, optimizer, 5)
    before = everything(model, optimizer)
    left = iter([1, 2])
    with pytest.raises(StopIteration):
        optimizer.evaluate_averages(lambda: next(left))
    assert same(everything(model, optimizer), before)


def test_a_rule_that_takes_the_key_of_the_weights_cannot_be_evaluated_with_them() -> None:
    optimizer = averaging_sgd(small_model(), {"weights": EMA()})
    with pytest.raises(ValueError, match="`rule` must not name an average 'weights'"):
        optimizer.evaluate_averages(lambda: 0)


@pytest.mark.parametrize(("weights", "dtype"), DTYPES)
def test_a_state_dict_made_inside_is_the_one_made_outside_and_stays_right(
    weights: torch.dtype, dtype: torch.dtype | None
) -> None:
    model = small_model(weights)
    optimizer = averaging_sgd(model, TWO_RULES, dtype=dtype, buffers=[torch.ones(3)])
    train(model, optimizer, 5)
    outside = copy.deepcopy(optimizer.state_dict())
    with optimizer.swap_to_averaged("ema"):
        inside = optimizer.state_dict()
        entries = [dict(entry) for entry in optimizer.state.values()]
        assert same(tensors_in(inside), tensors_in(outside))
        assert same(tensors_in(entries), tensors_in(outside["state"]))
    assert same(tensors_in(inside), tensors_in(outside))
    assert same(tensors_in(entries), tensors_in(outside["state"]))
    assert inside["param_groups"] == outside["param_groups"]


def test_weights_that_autocast_has_cast_are_cast_again_inside_and_outside() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.5))
    train(model, optimizer, 3)
    teacher = optimizer.averaged_model(model)
    batch = torch.randn(5, 3)
    with torch.autocast("cpu", torch.bfloat16):
        before = model(batch)
        with optimizer.swap_to_averaged():
            inside = model(batch)
        assert same([model(batch)], [before])
        assert same([inside], [teacher(batch)])


def test_before_the_first_average_a_swap_is_the_identity() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, SWA(start=100))
    train(model, optimizer, 3)
    before = values(model.parameters())
    with optimizer.swap_to_averaged():
        assert same(model.parameters(), before)
    assert same(model.parameters(), before)


def test_update_bn_inside_leaves_training_and_averaged_buffers_alone() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, EMA(0.5), buffers=model.buffers())
    train(model, optimizer, 5)
    before = everything(model, optimizer)
    with optimizer.swap_to_averaged():
        averaged = values(model.buffers())
        update_bn([torch.randn(8, 3)], model)
        assert not same(model.buffers(), averaged)
    assert same(everything(model, optimizer), before)


def test_update_bn_that_raises_inside_is_undone_too() -> None:
    def broken_loader() -> Any:
        yield torch.randn(8, 3)
        raise OSError("the disk went away")

    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, EMA(0.5), buffers=model.buffers())
    train(model, optimizer, 5)
    before = everything(model, optimizer)
    with pytest.raises(OSError, match="disk"), optimizer.swap_to_averaged():
        update_bn(broken_loader(), model)
    assert same(everything(model, optimizer), before)


@pytest.mark.parametrize("name", [None, "x"])
def test_several_averages_need_a_name(name: str | None) -> None:
    optimizer = averaging_sgd(small_model(), TWO_RULES)
    message = rf"`name` must be one of 'ema', 'swa', got {name!r}\."
    with pytest.raises(ValueError, match=message), optimizer.swap_to_averaged(name):
        raise AssertionError("not reached")


def test_an_update_of_an_unknown_average_is_refused() -> None:
    optimizer = averaging_sgd(small_model(), TWO_RULES)
    with pytest.raises(ValueError, match=r"`name` must be one of 'ema', 'swa', got 'x'\."):
        optimizer.update_averages("x")


def test_an_averaged_model_gives_what_the_swapped_model_gives() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, TWO_RULES, buffers=model.buffers())
    train(model, optimizer, 3)
    batch = torch.randn(5, 3)
    model.eval()
    with torch.no_grad(), optimizer.swap_to_averaged("swa"):
        expected = model(batch)
    assert same([optimizer.averaged_model(model, "swa")(batch)], [expected])


class TestExport:
    """`averaged_state_dict` and its inverse."""

    @pytest.mark.parametrize(("weights", "dtype"), DTYPES)
    def test_is_the_state_dict_under_the_average_in_tensors_of_its_own(
        self, weights: torch.dtype, dtype: torch.dtype | None
    ) -> None:
        model = small_model(weights)
        optimizer = averaging_sgd(model, EMA(0.9), dtype=dtype)
        train(model, optimizer, 3)
        exported = optimizer.averaged_state_dict(model)
        with optimizer.swap_to_averaged():
            expected = copy.deepcopy(model.state_dict())
            assert same(optimizer.averaged_state_dict(model).values(), expected.values())
        assert list(exported) == list(expected)
        train(model, optimizer, 1)
        assert same(exported.values(), expected.values())

    def test_can_be_saved_with_safetensors(self, tmp_path: Any) -> None:
        model = nn.Conv2d(3, 4, 3)
        model.weight.data = model.weight.data.to(memory_format=torch.channels_last)
        optimizer = AveragingOptimizer(SGD(model.parameters(), lr=0.1), EMA())
        optimizer.update_averages()
        exported = optimizer.averaged_state_dict(model)
        save_file(exported, tmp_path / "averaged.safetensors")
        loaded = load_file(tmp_path / "averaged.safetensors")
        assert same([loaded[key] for key in exported], exported.values())

    def test_extra_state_of_modules_is_exported_too(self) -> None:
        class Counted(nn.Linear):
            def get_extra_state(self) -> Any:
                return {"calls": 3}

        model = Counted(1, 1)
        optimizer = AveragingOptimizer(SGD(model.parameters(), lr=0.1), EMA())
        exported = optimizer.averaged_state_dict(model)
        assert exported["_extra_state"] == {"calls": 3}
        optimizer.load_averaged_state_dict(model, exported)

    def test_loading_is_the_inverse_and_the_next_update_continues_from_there(self) -> None:
        model = model_with_batch_norm()
        optimizer = averaging_sgd(model, SWA(), buffers=model.buffers())
        train(model, optimizer, 3)
        exported = optimizer.averaged_state_dict(model)
        train(model, optimizer, 2)
        fresh = averaging_sgd(model, SWA(), buffers=model.buffers())
        fresh.load_averaged_state_dict(model, exported, n_averaged=3)
        assert same(fresh.averaged_state_dict(model).values(), exported.values())
        fresh.update_averages()
        assert fresh.param_groups[0]["n_averaged_swa"] == 4
        weight = first_layer(model).weight
        expected = torch.lerp(exported["0.weight"], weight.detach(), 1 / 4)
        assert same([fresh.state[weight]["averaged_swa"]], [expected])

    def test_entries_that_are_not_averaged_are_passed_over(self) -> None:
        model = model_with_batch_norm()
        optimizer = AveragingOptimizer(SGD(first_layer(model).parameters(), lr=0.1), EMA())
        before = values(model.parameters())
        ones = {key: torch.ones_like(value) for key, value in model.state_dict().items()}
        optimizer.load_averaged_state_dict(model, ones)
        assert same(averages(optimizer, "ema"), [torch.ones(4, 3), torch.ones(4)])
        assert same(model.parameters(), before)

    @pytest.mark.parametrize("key", ["a.weight", "b.weight"])
    def test_a_tied_weight_is_found_under_any_of_its_keys(self, key: str) -> None:
        model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
        model["b"].weight = model["a"].weight
        optimizer = AveragingOptimizer(SGD(model.parameters(), lr=0.1), EMA())
        value = torch.randn(2, 2)
        optimizer.load_averaged_state_dict(model, {key: value})
        assert same(averages(optimizer, "ema"), [value])

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"0.weight": torch.ones(3, 4)}, r"`state_dict\['0\.weight'\]` must have the shape"),
            ({"0.weight": None}, r"`state_dict\['0\.weight'\]` must be a tensor, got None"),
            ({"9.weight": torch.ones(1)}, r"must contain keys of the model only, got '9\.weight'"),
        ],
    )
    def test_what_does_not_fit_is_refused_and_nothing_changes(
        self, change: dict[str, Any], message: str
    ) -> None:
        model = small_model()
        optimizer = averaging_sgd(model, EMA())
        train(model, optimizer, 2)
        before = everything(model, optimizer)
        with pytest.raises(ValueError, match=message):
            optimizer.load_averaged_state_dict(model, {**model.state_dict(), **change})
        assert same(everything(model, optimizer), before)

    @pytest.mark.parametrize(
        ("n_averaged", "error", "message"),
        [
            (0, ValueError, r"`n_averaged` must be at least 1, got 0\."),
            (2**63, ValueError, r"`n_averaged` must be less than 2\*\*63, got 9223372036854775808"),
            (1.5, TypeError, r"`n_averaged` must be an integer, got 1\.5\."),
        ],
    )
    def test_the_average_must_stand_for_some_updates(
        self, n_averaged: Any, error: type[Exception], message: str
    ) -> None:
        model = small_model()
        optimizer = averaging_sgd(model, EMA())
        with pytest.raises(error, match=message):
            optimizer.load_averaged_state_dict(model, model.state_dict(), n_averaged=n_averaged)

    def test_a_model_that_lacks_averaged_parameters_is_refused(self) -> None:
        model = small_model()
        optimizer = averaging_sgd(model, EMA())
        part = first_layer(model)
        with pytest.raises(ValueError, match=r"`model` must have all parameters .* \(2, 4\)\."):
            optimizer.load_averaged_state_dict(part, part.state_dict())

    @pytest.mark.parametrize("call", ["averaged_model", "averaged_state_dict"])
    def test_a_model_of_other_parameters_is_refused(self, call: str) -> None:
        optimizer = averaging_sgd(small_model(), EMA())
        message = "`model` must have parameters that this optimizer averages, got a Sequential"
        with pytest.raises(ValueError, match=message):
            getattr(optimizer, call)(small_model())

    def test_anything_but_a_module_is_refused(self) -> None:
        optimizer = averaging_sgd(small_model(), EMA())
        no_module: Any = {"weight": torch.ones(1)}
        with pytest.raises(TypeError, match=r"`model` must be a torch\.nn\.Module, got \{"):
            optimizer.averaged_state_dict(no_module)


def test_the_loss_inside_is_the_loss_of_the_average() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.5))
    train(model, optimizer, 3)
    teacher = optimizer.averaged_model(model)
    with optimizer.swap_to_averaged():
        inside = loss_of_batch(model, 0)
    assert same([inside], [loss_of_batch(teacher, 0)])


class Attention(nn.Module):
    """A weight, a mask with infinities and a statistic."""

    mask: Tensor
    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
        self.register_buffer("mean", torch.zeros(2))


def test_buffers_of_8_bits_are_averaged_in_float32() -> None:
    model = nn.Linear(1, 1)
    model.register_buffer("scale", torch.ones(2).to(torch.float8_e4m3fn))
    sgd = SGD(model.parameters(), lr=0.1)
    optimizer = AveragingOptimizer(sgd, EMA(0.5), buffers=model.buffers())
    for value in (1.0, 2.0):
        next(model.buffers()).copy_(torch.full((2,), value))
        optimizer.update_averages()
    assert same(optimizer.state_dict()["averaged_buffers"]["ema"], [torch.full((2,), 1.5)])


@pytest.mark.parametrize("rule", [EMA(0.5), SWA(), LAWA(k=2), Lookahead(0.5)], ids=repr)
@pytest.mark.parametrize("skip_nonfinite", [False, True])
def test_a_mask_with_infinities_is_copied_along(rule: Rule, skip_nonfinite: bool) -> None:
    """The difference of two infinities is NaN, and an average would be."""
    model = Attention()
    optimizer = AveragingOptimizer(
        SGD(model.parameters(), lr=0.1),
        {"one": rule},
        buffers=model.buffers(),
        skip_nonfinite=skip_nonfinite,
    )
    for step in range(4):
        model.mean.fill_(step)
        optimizer.update_averages()
    model.mask.mul_(2)[0, 0] = 1
    optimizer.update_averages()
    mask = model.mask.clone()
    with optimizer.swap_to_averaged():
        assert same([model.mask], [mask])
        assert 0 < model.mean[0] < 4
    group = optimizer.param_groups[0]
    assert (group["n_averaged_one"], group["n_skipped"]) == (5, 0)
    copied = through_pickle((model, optimizer))
    assert same(everything(*copied), everything(model, optimizer))
    copied[1].update_averages()
    assert same([copied[1].state_dict()["averaged_buffers"]["one"][0]], [mask])
