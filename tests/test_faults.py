"""Whatever fails, interrupts or moves the weights during a swap: nothing is lost or mixed."""

from __future__ import annotations

import contextlib
import copy
import functools
import itertools
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import pytest
import torch
from faults import AtCall, AtInstruction, run_out_of_memory
from modules import cast_down, give_other_memory
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from training import (
    DTYPES,
    Run,
    averages,
    averaging_sgd,
    everything,
    frozen,
    in_place,
    model_with_batch_norm,
    same,
    small_model,
    train,
    values,
)

from averaging_optim import EMA, AveragingOptimizer
from averaging_optim._averages import moving


@pytest.fixture(autouse=True)
def weights_are_exchanged_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moving, "SCRATCH_BYTES", 16)


@pytest.fixture(autouse=True)
def ctrl_c_interrupts() -> Iterator[None]:
    """Shells start what runs in the background with SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def trained(weights: torch.dtype, dtype: torch.dtype | None) -> Run:
    model = model_with_batch_norm().to(weights)
    optimizer = averaging_sgd(model, EMA(0.5), dtype=dtype, buffers=model.buffers())
    train(model, optimizer, 3)
    return model, optimizer


def held(model: nn.Module) -> list[Tensor]:
    return values([*model.parameters(), *model.buffers()])


def held_inside(model: nn.Module, optimizer: AveragingOptimizer) -> list[Tensor]:
    with optimizer.swap_to_averaged():
        return held(model)


Swap = Callable[[], AbstractContextManager[None]]


def enter(model: nn.Sequential, optimizer: AveragingOptimizer, swap: Swap, fault: AtCall) -> None:
    with contextlib.ExitStack() as stack, fault:
        stack.enter_context(swap())


def evaluate(
    model: nn.Sequential, optimizer: AveragingOptimizer, swap: Swap, fault: AtCall
) -> None:
    weight = next(model.parameters())
    with swap(), fault:
        update_bn([torch.randn(4, 3, dtype=weight.dtype)], model)
        optimizer.state_dict()


def leave(model: nn.Sequential, optimizer: AveragingOptimizer, swap: Swap, fault: AtCall) -> None:
    stack = contextlib.ExitStack()
    stack.enter_context(swap())
    with fault:
        stack.close()


def leave_by_exception(
    model: nn.Sequential, optimizer: AveragingOptimizer, swap: Swap, fault: AtCall
) -> None:
    stack = contextlib.ExitStack()
    stack.enter_context(swap())
    with contextlib.suppress(ZeroDivisionError), fault, stack:
        raise ZeroDivisionError


Part = Callable[[nn.Sequential, AveragingOptimizer, Swap, AtCall], None]


def assert_restored_after_each(
    part: Part,
    run: Run,
    in_place: bool,
    act: Callable[[], object],
    written: bool,
    error: type[BaseException],
) -> None:
    """Let every call of this part of a swap fail once, and look at everything after each."""
    model, optimizer = run
    before, inside = everything(model, optimizer), held_inside(model, optimizer)
    swap = functools.partial(optimizer.swap_to_averaged, in_place=in_place)
    failures = 0
    for number in itertools.count(1):
        try:
            part(model, optimizer, swap, AtCall(number, act, written))
        except error:
            failures += 1
        else:
            break
        assert same(everything(model, optimizer), before)
        assert same(held_inside(model, optimizer), inside)
    assert failures >= 2
    assert same(everything(model, optimizer), before)


written = pytest.mark.parametrize("written", [False, True], ids=["before", "after"])
dtypes = pytest.mark.parametrize(("weights", "dtype"), DTYPES)


@written
@dtypes
@in_place
@pytest.mark.parametrize("part", [enter, evaluate])
def test_a_failure_at_any_point_restores_everything_and_the_next_swap_works(
    part: Part, in_place: bool, weights: torch.dtype, dtype: torch.dtype | None, written: bool
) -> None:
    run = trained(weights, dtype)
    error = torch.OutOfMemoryError
    assert_restored_after_each(part, run, in_place, run_out_of_memory, written, error)


@written
@dtypes
@in_place
@pytest.mark.parametrize("part", [enter, evaluate, leave, leave_by_exception])
def test_ctrl_c_at_any_point_is_raised_when_everything_is_restored(
    part: Part, in_place: bool, weights: torch.dtype, dtype: torch.dtype | None, written: bool
) -> None:
    run = trained(weights, dtype)
    assert_restored_after_each(
        part, run, in_place, lambda: signal.raise_signal(signal.SIGINT), written, KeyboardInterrupt
    )


@dtypes
@in_place
def test_leaving_allocates_nothing_so_that_it_cannot_run_out_of_memory(
    in_place: bool, weights: torch.dtype, dtype: torch.dtype | None
) -> None:
    _, optimizer = trained(weights, dtype)
    swap = contextlib.ExitStack()
    swap.enter_context(optimizer.swap_to_averaged(in_place=in_place))
    with torch.profiler.profile(profile_memory=True) as profile:
        swap.close()
    assert [event.name for event in profile.events() if event.self_cpu_memory_usage > 0] == []
    assert any("copy_" in event.name for event in profile.events())


@pytest.fixture
def handle_usr1() -> Iterator[Callable[[Callable[[], object]], None]]:
    """Let a signal call a function, as those do that tell a job to save and to end."""
    previous = signal.getsignal(signal.SIGUSR1)

    def install(act: Callable[[], object]) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            act()

        signal.signal(signal.SIGUSR1, handle)

    yield install
    signal.signal(signal.SIGUSR1, previous)


@dtypes
@pytest.mark.parametrize("part", [enter, leave])
def test_a_signal_handler_that_saves_never_sees_half_a_swap(
    part: Part,
    weights: torch.dtype,
    dtype: torch.dtype | None,
    handle_usr1: Callable[[Callable[[], object]], None],
) -> None:
    model, optimizer = trained(weights, dtype)
    before, inside = frozen(held(model)), frozen(held_inside(model, optimizer))
    state_dict, seen = frozen(optimizer.state_dict()), []
    handle_usr1(lambda: seen.append((frozen(held(model)), frozen(optimizer.state_dict()))))
    for number in (1, 2):
        fault = AtCall(number, lambda: signal.raise_signal(signal.SIGUSR1))
        part(model, optimizer, optimizer.swap_to_averaged, fault)
    assert len(seen) == 2
    for model_held, saved in seen:
        assert model_held in (before, inside)
        assert saved == state_dict


def test_a_swap_without_room_for_a_backup_says_what_to_do_and_changes_nothing() -> None:
    model, optimizer = trained(torch.float32, None)
    before = everything(model, optimizer)
    message = r"no room for a backup .* nothing has changed.*\(in_place=True\)`.*cpu"
    with pytest.raises(torch.OutOfMemoryError, match=message):
        enter(model, optimizer, optimizer.swap_to_averaged, AtCall(1, run_out_of_memory))
    assert same(everything(model, optimizer), before)


def send_all(numbers: Sequence[signal.Signals]) -> None:
    if numbers:
        try:
            signal.raise_signal(numbers[0])
        finally:
            send_all(numbers[1:])


@pytest.mark.parametrize(
    "numbers",
    [[signal.SIGINT], [signal.SIGINT] * 2, [signal.SIGINT, signal.SIGUSR1]],
    ids=["once", "twice", "and_another"],
)
def test_signals_at_any_instruction_of_a_swap_find_or_leave_the_weights_as_they_were(
    numbers: list[signal.Signals], handle_usr1: Callable[[Callable[[], object]], None]
) -> None:
    weight = nn.Parameter(torch.tensor([1.0]))
    optimizer = AveragingOptimizer(torch.optim.SGD([weight], lr=0.1), EMA(0.5))
    optimizer.update_averages()
    weight.data.fill_(3.0)
    called: list[float] = []

    def give_up() -> None:
        called.append(weight.item())
        raise SystemExit

    handle_usr1(give_up)
    handlers = [signal.getsignal(number) for number in numbers]
    interrupted = 0
    for number in itertools.count(1):
        called.clear()
        instruction = AtInstruction(number, lambda: send_all(numbers))
        try:
            with instruction, optimizer.swap_to_averaged():
                pass
        except (KeyboardInterrupt, SystemExit):
            interrupted += 1
        assert weight.item() == 3.0, number
        assert [signal.getsignal(number) for number in numbers] == handlers, number
        with optimizer.swap_to_averaged():
            assert weight.item() == 1.0
        if instruction.left > 0:
            break
        # The other handler too has been called, and has seen the one weight or the other.
        assert called in ([[1.0], [3.0]] if signal.SIGUSR1 in numbers else [[]]), number
    assert interrupted == number - 1 > 300


def test_a_handler_that_is_set_inside_a_swap_stays(
    handle_usr1: Callable[[Callable[[], object]], None],
) -> None:
    _, optimizer = trained(torch.float32, None)
    former = signal.getsignal(signal.SIGUSR1)
    seen: list[int] = []
    with optimizer.swap_to_averaged():
        handle_usr1(lambda: seen.append(1))
        chosen = signal.getsignal(signal.SIGUSR1)
        signal.raise_signal(signal.SIGUSR1)
    assert chosen is not former
    assert signal.getsignal(signal.SIGUSR1) is chosen
    assert seen == [1]


def test_a_handler_that_is_put_back_around_a_nested_swap_is_the_former_one(
    handle_usr1: Callable[[Callable[[], object]], None],
) -> None:
    _, optimizer = trained(torch.float32, None)
    seen: list[str] = []
    handle_usr1(lambda: seen.append("former"))
    former = signal.getsignal(signal.SIGUSR1)
    with optimizer.swap_to_averaged():
        inside = signal.getsignal(signal.SIGUSR1)
        handle_usr1(lambda: seen.append("nested"))
        with optimizer.swap_to_averaged():
            signal.raise_signal(signal.SIGUSR1)
        signal.signal(signal.SIGUSR1, inside)
        signal.raise_signal(signal.SIGUSR1)
    assert signal.getsignal(signal.SIGUSR1) is former
    assert seen == ["nested", "former"]


class Interrupting:
    """A handler that raises when it is looked at, as one that is called then may."""

    times = 0

    def __call__(self, number: int, frame: FrameType | None) -> None: ...

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            self.times += 1
            if self.times == 1:
                raise SystemExit
        return object.__getattribute__(self, name)


def test_what_is_raised_while_handlers_are_put_back_leaves_none_replaced(
    handle_usr1: Callable[[Callable[[], object]], None],
) -> None:
    model, optimizer = trained(torch.float32, None)
    handle_usr1(lambda: None)
    before, former = everything(model, optimizer), signal.getsignal(signal.SIGINT)
    handler = Interrupting()
    with pytest.raises(SystemExit), optimizer.swap_to_averaged():
        signal.signal(signal.SIGUSR1, handler)
    assert signal.getsignal(signal.SIGINT) is former
    assert signal.getsignal(signal.SIGUSR1) is handler
    assert same(everything(model, optimizer), before)


def test_a_swap_in_another_thread_leaves_signals_to_the_main_one() -> None:
    model, optimizer = trained(torch.float32, None)
    inside: list[list[Tensor]] = []
    before = everything(model, optimizer)
    thread = threading.Thread(target=lambda: inside.append(held_inside(model, optimizer)))
    thread.start()
    thread.join()
    assert same(inside[0], held_inside(model, optimizer))
    assert same(everything(model, optimizer), before)


def test_handlers_are_back_once_the_main_thread_has_left_whoever_is_still_inside() -> None:
    model, optimizer = trained(torch.float32, None)
    before, former = everything(model, optimizer), signal.getsignal(signal.SIGINT)
    elsewhere = contextlib.ExitStack()
    with optimizer.swap_to_averaged(), ThreadPoolExecutor(1) as thread:
        thread.submit(elsewhere.enter_context, optimizer.swap_to_averaged()).result()
    assert signal.getsignal(signal.SIGINT) is former
    assert not same(model.parameters(), before[:6])
    with ThreadPoolExecutor(1) as thread:
        thread.submit(elsewhere.close).result()
    assert signal.getsignal(signal.SIGINT) is former
    assert same(everything(model, optimizer), before)


@dtypes
@in_place
@pytest.mark.parametrize("move", [cast_down, give_other_memory])
def test_weights_that_get_other_memory_inside_are_the_training_weights_there_outside(
    move: Callable[[nn.Module], None],
    in_place: bool,
    weights: torch.dtype,
    dtype: torch.dtype | None,
) -> None:
    model = small_model(weights)
    optimizer = averaging_sgd(model, EMA(0.5), dtype=dtype)
    train(model, optimizer, 3)
    state_dict = frozen(optimizer.state_dict())
    expected = copy.deepcopy(model)
    move(expected)
    with optimizer.swap_to_averaged(in_place=in_place):
        move(model)
        assert frozen(optimizer.state_dict()) == state_dict
    assert same(model.parameters(), expected.parameters())
    assert frozen(optimizer.state_dict()) == state_dict


def test_a_copy_that_fails_half_way_restores_what_was_swapped() -> None:
    """An average on the meta device has no values, so that copying it fails by nature."""
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.5), device="meta")
    train(model, optimizer, 2)
    before = values(model.parameters())
    with pytest.raises(NotImplementedError), optimizer.swap_to_averaged():
        raise AssertionError("not reached")
    assert same(model.parameters(), before)
    train(model, optimizer, 1, first=2)


def read_only(tensor: Tensor) -> None:
    """Let every copy into the tensor raise, by expanding one element over all of it."""
    with torch.no_grad():
        tensor.data = tensor.data.reshape(-1)[:1].expand(tensor.numel()).view(tensor.shape)


@pytest.mark.parametrize("broken", ["weight", "average"])
def test_an_exchange_that_fails_half_way_restores_what_was_swapped(broken: str) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.5))
    train(model, optimizer, 3)
    last = list(model.parameters())[-1]
    read_only(last if broken == "weight" else optimizer.state[last]["averaged_ema"])
    before = everything(model, optimizer)
    swap = optimizer.swap_to_averaged(in_place=True)
    with pytest.raises(RuntimeError, match="more than one element"), swap:
        raise AssertionError("not reached")
    assert same(everything(model, optimizer), before)
    assert len(averages(optimizer, "ema")) == 4
