"""Several optimizers are one average: all of them, or none."""

from __future__ import annotations

import functools
import itertools
import signal
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from faults import AtCall, AtInstruction, run_out_of_memory
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import (
    TWO_RULES,
    everything,
    frozen,
    in_place,
    loss_of_batch,
    model_with_batch_norm,
    same,
    small_model,
    train,
    values,
)

from averaging_optim import EMA, AveragingOptimizer, Rule, together


def averaging(
    weights: Sequence[Tensor], buffers: Any = (), rule: Rule | dict[str, Rule] | None = None
) -> AveragingOptimizer:
    return AveragingOptimizer(SGD(weights, lr=0.1), rule or EMA(0.9), buffers=buffers)


# Ways to give the weights of one model to several optimizers.


def one(model: nn.Module) -> list[AveragingOptimizer]:
    return [averaging(list(model.parameters()), model)]


def by_dimension(model: nn.Module) -> list[AveragingOptimizer]:
    """As Muon and AdamW share the weights of a model, the second with the buffers."""
    matrices = [each for each in model.parameters() if each.ndim == 2]
    vectors = [each for each in model.parameters() if each.ndim < 2]
    return [averaging(matrices), averaging(vectors, model)]


def by_part(model: nn.Module) -> list[AveragingOptimizer]:
    """As a GAN's two networks have an optimizer each, both with all buffers."""
    first, *others = model.children()
    later = [weight for each in others for weight in each.parameters()]
    return [averaging(list(first.parameters()), model), averaging(later, model)]


def by_layer(model: nn.Module) -> list[AveragingOptimizer]:
    return [averaging(list(each.parameters()), each) for each in model.children()]


def in_backward(model: nn.Module) -> list[AveragingOptimizer]:
    """One for each weight, which steps as soon as that has its gradient."""
    first, *others = model.parameters()
    optimizers = [averaging([first], model), *(averaging([each]) for each in others)]

    def step(optimizer: AveragingOptimizer, weight: Tensor) -> None:
        optimizer.step()
        optimizer.zero_grad()

    for weight, optimizer in zip([first, *others], optimizers, strict=True):
        weight.register_post_accumulate_grad_hook(functools.partial(step, optimizer))
    return optimizers


def run(model: nn.Module, optimizers: Sequence[AveragingOptimizer], steps: int = 4) -> None:
    for number in range(steps):
        loss_of_batch(model, number).backward()
        for optimizer in optimizers:
            if any(weight.grad is not None for weight in optimizer.param_groups[0]["params"]):
                optimizer.step()
                optimizer.zero_grad()


def swap(averaged: Any, model: nn.Module) -> Any:
    with averaged.swap_to_averaged():
        return frozen([model.state_dict(), loss_of_batch(model.eval(), 7)])


def evaluate(averaged: Any, model: nn.Module) -> Any:
    return averaged.evaluate_averages(lambda: frozen(model.state_dict()))


def copy_model(averaged: Any, model: nn.Module) -> Any:
    copied = averaged.averaged_model(model)
    return frozen([copied.state_dict(), loss_of_batch(copied.eval(), 7)])


def export(averaged: Any, model: nn.Module) -> Any:
    return frozen(averaged.averaged_state_dict(model))


def load(averaged: Any, model: nn.Module) -> Any:
    halves = {key: each / 2 for key, each in averaged.averaged_state_dict(model).items()}
    halves["1.num_batches_tracked"] = torch.tensor(3)
    loaded = averaged.load_averaged_state_dict(model, halves, n_averaged=5)
    for optimizer in getattr(averaged, "optimizers", [averaged]):
        assert optimizer.n_averaged() == 5
        optimizer.update_averages()
    return loaded, frozen(averaged.averaged_state_dict(model))


WAYS = [by_dimension, by_part, by_layer, in_backward]
VERBS = [swap, evaluate, copy_model, export, load]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("way", WAYS)
def test_several_optimizers_together_do_what_one_over_all_weights_does(
    way: Callable[[nn.Module], list[AveragingOptimizer]], verb: Callable[[Any, nn.Module], Any]
) -> None:
    def result(way: Callable[[nn.Module], list[AveragingOptimizer]], join: Any) -> Any:
        model = model_with_batch_norm()
        optimizers = way(model)
        run(model, optimizers)
        before = frozen(model.state_dict())
        found = verb(join(*optimizers), model)
        assert frozen(model.state_dict()) == before
        return found

    assert result(way, together) == result(one, lambda optimizer: optimizer)


def muon_and_adam(model: nn.Module) -> tuple[AveragingOptimizer, AveragingOptimizer]:
    matrices = [each for each in model.parameters() if each.ndim == 2]
    vectors = [each for each in model.parameters() if each.ndim < 2]
    muon = AveragingOptimizer(Muon(matrices, lr=0.01), EMA(0.9))
    return muon, AveragingOptimizer(AdamW(vectors, lr=0.01), EMA(0.9), buffers=model)


def test_muon_and_adam_of_one_model_are_torchs_averaged_model() -> None:
    model = model_with_batch_norm()
    muon, adam = muon_and_adam(model)
    averaged = together(muon, adam)
    teacher = averaged.averaged_model(model)
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    for number in range(4):
        loss_of_batch(model, number).backward()
        muon.step()
        adam.step()
        model.zero_grad()
        expected.update_parameters(model)
    weights = values(model.parameters())
    with averaged.swap_to_averaged():
        assert same(model.parameters(), expected.module.parameters())
        loss = loss_of_batch(model.eval(), 7)
    assert same(model.parameters(), weights)
    assert same([loss, loss_of_batch(teacher.eval(), 7)], [loss_of_batch(expected.eval(), 7)] * 2)
    assert same(teacher.parameters(), expected.module.parameters())


def test_models_of_both_optimizers_follow_each_and_warn_once_when_cast() -> None:
    model = model_with_batch_norm()
    optimizers = by_part(model)
    teacher = together(*optimizers).averaged_model(model)
    run(model, optimizers[:1])
    first = frozen(teacher.state_dict())
    run(model, optimizers)
    assert frozen(teacher.state_dict()) != first
    teacher.double()
    with pytest.warns(UserWarning, match="was cast or moved") as warned:
        run(model, optimizers, 3)
    assert len(warned) == 1


def test_of_buffers_that_two_average_at_their_own_pace_each_verb_takes_the_last_ones() -> None:
    model = model_with_batch_norm()
    first, last = by_part(model)
    for number in range(6):
        loss_of_batch(model, number).backward()
        (first if number % 3 else last).step()
    averaged = together(first, last)
    expected = last.state_dict()["averaged_buffers"]["ema"]
    assert frozen(expected) != frozen(first.state_dict()["averaged_buffers"]["ema"])
    before = everything(model, first)
    exported = averaged.averaged_state_dict(model)
    assert frozen({key: exported[key] for key in expected}) == frozen(expected)
    assert same(averaged.averaged_model(model).buffers(), expected.values())
    with averaged.swap_to_averaged():
        assert same(model.buffers(), expected.values())
        model.train()
        loss_of_batch(model, 9)
    assert same(everything(model, first), before)


def test_keys_that_two_optimizers_share_are_reported_missing_once() -> None:
    model = model_with_batch_norm()
    missing, unexpected = together(*by_part(model)).load_averaged_state_dict(
        model, {}, strict=False
    )
    assert sorted(missing) == sorted(model.state_dict())
    assert unexpected == []


# All or nothing.


Pair = tuple[nn.Sequential, AveragingOptimizer, AveragingOptimizer]


def trained_pair(rule: dict[str, Rule] | None = None) -> Pair:
    """Return a model and its two optimizers, which both average its buffers."""
    model = model_with_batch_norm()
    head, *others = (list(each.parameters()) for each in model)
    weights = [weight for each in others for weight in each]
    pair = averaging(head, model, rule), averaging(weights, model, rule)
    run(model, pair)
    return model, *pair


def all_there_is(run: Pair) -> list[Tensor]:
    model, first, second = run
    return [*everything(model, first), *everything(model, second)]


def assert_is_as_before(run: Pair, before: list[Tensor]) -> None:
    """Look at everything, and whether steps and swaps are allowed again."""
    _, first, second = run
    assert same(all_there_is(run), before)
    with together(first, second).swap_to_averaged("ema"):
        assert not same(all_there_is(run), before)
    assert same(all_there_is(run), before)
    for optimizer in (first, second):
        optimizer.load_state_dict(optimizer.state_dict())


@pytest.mark.parametrize("busy", [0, 1], ids=["first", "second"])
def test_a_swap_that_one_of_two_refuses_leaves_the_other_as_it_was(busy: int) -> None:
    pair = trained_pair(TWO_RULES)
    model, *optimizers = pair
    before = all_there_is(pair)
    with optimizers[busy].swap_to_averaged("swa"):
        inside = values(model.state_dict().values())
        with pytest.raises(RuntimeError, match=r"not allowed inside `swap_to_averaged\('swa'\)`"):
            together(*optimizers).swap_to_averaged("ema").__enter__()
        assert same(model.state_dict().values(), inside)
    assert_is_as_before(pair, before)


@pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
@in_place
def test_running_out_of_memory_at_any_point_of_entering_restores_both(
    in_place: bool, written: bool
) -> None:
    pair = trained_pair()
    averaged, before = together(*pair[1:]), all_there_is(pair)
    failures = 0
    for number in itertools.count(1):
        try:
            with ExitStack() as stack, AtCall(number, run_out_of_memory, written):
                stack.enter_context(averaged.swap_to_averaged(in_place=in_place))
        except torch.OutOfMemoryError:
            failures += 1
        else:
            break
        assert same(all_there_is(pair), before), number
    assert failures >= 6
    assert_is_as_before(pair, before)


@in_place
def test_an_exception_in_the_block_restores_both(in_place: bool) -> None:
    pair = trained_pair()
    before = all_there_is(pair)
    swap = together(*pair[1:]).swap_to_averaged(in_place=in_place)
    with pytest.raises(ZeroDivisionError), swap:
        raise ZeroDivisionError
    assert_is_as_before(pair, before)


def fail() -> None:
    raise OSError("injected")


def calls_on_leaving() -> int:
    """Return how many calls of torch leaving a swap of two makes."""
    _, *optimizers = trained_pair()
    with ExitStack() as stack, AtCall(0, fail) as counting:
        stack.enter_context(together(*optimizers).swap_to_averaged())
        entering: int = next(counting.calls)
        stack.close()
    leaving: int = next(counting.calls) - entering - 1
    return leaving


@pytest.mark.parametrize("broken", ["first", "second"])
def test_a_failure_of_one_on_leaving_leaves_the_other_restored(broken: str) -> None:
    """The second is left first."""
    model, first, second = trained_pair()
    before = values(model.parameters())
    swap = together(first, second).swap_to_averaged()
    swap.__enter__()
    number = 1 if broken == "second" else calls_on_leaving() // 2 + 1
    with pytest.raises(OSError, match="injected"), AtCall(number, fail):
        swap.__exit__(None, None, None)
    present = list(model.parameters())
    of_first, of_second = slice(2), slice(2, None)
    kept, lost = (of_first, of_second) if broken == "second" else (of_second, of_first)
    assert same(present[kept], before[kept])
    assert not same(present[lost], before[lost])
    first.step()
    second.step()


def test_ctrl_c_at_any_instruction_of_a_swap_of_two_leaves_all_weights_in_place() -> None:
    weights = [nn.Parameter(torch.tensor([value])) for value in (1.0, 2.0)]
    first, second = averaging(weights[:1]), averaging(weights[1:])
    first.update_averages()
    second.update_averages()
    for weight in weights:
        weight.data.mul_(3)
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    interrupt = functools.partial(signal.raise_signal, signal.SIGINT)
    interrupted = 0
    try:
        for number in itertools.count(1):
            interrupting = AtInstruction(number, interrupt, "swap.py")
            swap = together(first, second).swap_to_averaged()
            try:
                with interrupting, swap:
                    pass
            except KeyboardInterrupt:
                interrupted += 1
            assert [weight.item() for weight in weights] == [3, 6], number
            assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
            with together(first, second).swap_to_averaged():
                assert [weight.item() for weight in weights] == [1, 2]
            if interrupting.left > 0:
                break
    finally:
        signal.signal(signal.SIGINT, former)
    assert interrupted == number - 1 > 300


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("key", ["0.weight", "2.weight"], ids=["first", "second"])
def test_an_entry_that_fits_neither_shape_nor_kind_changes_nothing_in_either(
    key: str, strict: bool
) -> None:
    pair = trained_pair()
    model, first, second = pair
    before = all_there_is(pair)
    broken = {**model.state_dict(), key: torch.ones(model.state_dict()[key].shape).int()}
    with pytest.raises(ValueError, match=rf"`state_dict\['{key}'\]` must be floating-point"):
        together(first, second).load_averaged_state_dict(model, broken, strict=strict)
    assert_is_as_before(pair, before)


def test_loading_is_refused_inside_a_swap_of_one_of_them() -> None:
    pair = trained_pair()
    model, first, second = pair
    before = all_there_is(pair)
    with (
        second.swap_to_averaged(),
        pytest.raises(RuntimeError, match="`load_averaged_state_dict` is not allowed inside"),
    ):
        together(first, second).load_averaged_state_dict(model, model.state_dict())
    assert_is_as_before(pair, before)


def test_an_export_of_one_of_two_models_is_loaded_without_touching_the_other() -> None:
    models = small_model(), small_model()
    optimizers = [averaging(list(model.parameters())) for model in models]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 3)
    before = frozen(optimizers[1].state_dict())
    ones = {key: torch.ones_like(each) for key, each in models[0].state_dict().items()}
    averaged = together(*optimizers)
    with pytest.raises(ValueError, match=r"`model` must have all parameters .* `strict=False`"):
        averaged.load_averaged_state_dict(models[0], ones)
    loaded = averaged.load_averaged_state_dict(models[0], ones, n_averaged=9, strict=False)
    assert loaded == ([], [])
    assert optimizers[0].n_averaged() == 9
    assert frozen(optimizers[0].averaged_state_dict(models[0])) == frozen(ones)
    assert frozen(optimizers[1].state_dict()) == before


# Swaps that overlap.


@pytest.mark.parametrize("alone", [0, 1], ids=["first", "second"])
@pytest.mark.parametrize("order", ["nested", "overlapping"])
@pytest.mark.parametrize("all_come_first", [True, False], ids=["all_first", "one_first"])
def test_swaps_of_all_and_of_one_may_overlap_in_any_order(
    all_come_first: bool, order: str, alone: int
) -> None:
    """Both average the buffers, so that the swap of either moves those."""
    pair = trained_pair()
    model, *optimizers = pair
    before, averaged = all_there_is(pair), together(*optimizers)
    inside = averaged.averaged_state_dict(model)
    swaps = [averaged.swap_to_averaged(), optimizers[alone].swap_to_averaged()]
    first, second = swaps if all_come_first else swaps[::-1]
    first.__enter__()
    second.__enter__()
    weights = [inside[name] for name, _ in model.named_parameters()]
    assert same(model.parameters(), weights)
    with pytest.raises(RuntimeError, match="not allowed inside"):
        optimizers[alone].step()
    for each in (second, first) if order == "nested" else (first, second):
        each.__exit__(None, None, None)
    assert_is_as_before(pair, before)


@pytest.mark.parametrize("order", ["nested", "overlapping"])
def test_swaps_of_two_optimizers_of_the_same_buffers_may_overlap_in_any_order(order: str) -> None:
    pair = trained_pair()
    _, *optimizers = pair
    before = all_there_is(pair)
    swaps = [optimizer.swap_to_averaged() for optimizer in optimizers]
    for each in swaps:
        each.__enter__()
    for each in swaps[::-1] if order == "nested" else swaps:
        each.__exit__(None, None, None)
    assert_is_as_before(pair, before)


# Names and errors.


def test_one_of_several_averages_is_chosen_by_name_in_each() -> None:
    model, first, second = trained_pair(TWO_RULES)
    averaged = together(first, second)
    with pytest.raises(ValueError, match=r"`name` must be one of 'ema', 'swa', got None\."):
        averaged.swap_to_averaged()
    chosen = {name: frozen(averaged.averaged_model(model, name).state_dict()) for name in TWO_RULES}
    assert chosen == {name: frozen(averaged.averaged_state_dict(model, name)) for name in TWO_RULES}
    evaluated = averaged.evaluate_averages(lambda: frozen(model.state_dict()))
    assert evaluated == {"weights": frozen(model.state_dict()), **chosen}
    assert len(set(evaluated.values())) == 3


def test_averages_of_the_same_names_in_another_order_are_evaluated() -> None:
    models = small_model(), small_model()
    swapped = dict(reversed(TWO_RULES.items()))
    first = averaging(list(models[0].parameters()), rule=TWO_RULES)
    second = averaging(list(models[1].parameters()), rule=swapped)
    assert list(together(first, second).evaluate_averages(int)) == ["weights", "ema", "swa"]


CALLS: dict[str, Callable[[Any, nn.Module], Any]] = {
    "swap": lambda averaged, model: averaged.swap_to_averaged("swa"),
    "model": lambda averaged, model: averaged.averaged_model(model, "swa"),
    "export": lambda averaged, model: averaged.averaged_state_dict(model, "swa"),
    "load": lambda averaged, model: averaged.load_averaged_state_dict(
        model, model.state_dict(), "swa"
    ),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_a_name_that_one_of_them_lacks_is_refused_and_nothing_changes(
    call: Callable[[Any, nn.Module], Any],
) -> None:
    model = small_model()
    head, *others = model.parameters()
    averaged = together(averaging([head], rule=TWO_RULES), averaging(others))
    before = frozen([model.state_dict(), *(each.state_dict() for each in averaged.optimizers)])
    with pytest.raises(ValueError, match=r"`name` must be one of 'ema', got 'swa'\."):
        call(averaged, model)
    with pytest.raises(
        ValueError, match=r"must have averages of the same names, .*'swa'\] and \['ema"
    ):
        averaged.evaluate_averages(int)
    after = frozen([model.state_dict(), *(each.state_dict() for each in averaged.optimizers)])
    assert after == before


@pytest.mark.parametrize("verb", VERBS)
def test_an_optimizer_that_was_wrapped_again_is_refused(
    verb: Callable[[Any, nn.Module], Any],
) -> None:
    model, first, second = trained_pair()
    averaged, before = together(first, second), frozen(model.state_dict())
    AveragingOptimizer(second.wrapped, EMA(0.9))
    with pytest.raises(RuntimeError, match="has been wrapped again"):
        verb(averaged, model)
    assert frozen(model.state_dict()) == before


def test_a_model_that_two_optimizers_train_needs_both() -> None:
    model, first, second = trained_pair()
    message = r"trained and not averaged, got '1\.weight', .*'2\.bias'\. .* use `together`"
    with pytest.raises(ValueError, match=message):
        first.averaged_state_dict(model)
    together(first, second).averaged_state_dict(model)


def twice(optimizer: AveragingOptimizer) -> list[Any]:
    return [optimizer, optimizer]


def with_another_of_a_weight(optimizer: AveragingOptimizer) -> list[Any]:
    shared = optimizer.param_groups[0]["params"][1]
    return [optimizer, averaging([shared, nn.Parameter(torch.ones(1))])]


@pytest.mark.parametrize("make", [twice, with_another_of_a_weight])
def test_a_parameter_that_two_train_is_refused(
    make: Callable[[AveragingOptimizer], list[Any]],
) -> None:
    optimizer = averaging(list(small_model().parameters()))
    with pytest.raises(ValueError, match="`optimizers` must train different parameters, got one"):
        together(*make(optimizer))


def test_no_optimizer_is_refused() -> None:
    with pytest.raises(ValueError, match="`optimizers` must contain at least one"):
        together()


def bare(optimizer: AveragingOptimizer) -> Any:
    return optimizer.wrapped


def listed(optimizer: AveragingOptimizer) -> Any:
    return [optimizer]


@pytest.mark.parametrize("make", [bare, listed, together])
def test_anything_but_an_averaging_optimizer_is_refused(
    make: Callable[[AveragingOptimizer], Any],
) -> None:
    optimizer = averaging(list(small_model().parameters()))
    with pytest.raises(TypeError, match="`optimizers` must be AveragingOptimizers, got"):
        together(make(optimizer))


def test_the_repr_shows_all_optimizers() -> None:
    optimizers = by_part(model_with_batch_norm())
    first, second = map(repr, optimizers)
    assert repr(together(*optimizers)) == f"together({first}, {second})"
