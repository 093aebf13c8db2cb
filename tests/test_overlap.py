"""Swaps that overlap: nested or not, in threads, tasks and beside steps."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD
from training import (
    averaging_sgd,
    frozen,
    in_place,
    loss_of_batch,
    same,
    small_model,
    train,
    values,
)

from averaging_optim import EMA, SWA, AveragingOptimizer


def of_one_weight(**options: Any) -> tuple[nn.Parameter, AveragingOptimizer]:
    """Return a weight of 3 whose averages are 1."""
    weight = nn.Parameter(torch.ones(1000))
    sgd = SGD([weight], lr=0.1)
    optimizer = AveragingOptimizer(sgd, {"ema": EMA(0.5), "swa": SWA()}, **options)
    optimizer.update_averages()
    weight.data.fill_(3.0)
    return weight, optimizer


@in_place
def test_the_weights_come_back_when_the_last_of_overlapping_swaps_is_left(in_place: bool) -> None:
    weight, optimizer = of_one_weight()
    first, second = ExitStack(), ExitStack()
    first.enter_context(optimizer.swap_to_averaged("ema", in_place=in_place))
    second.enter_context(optimizer.swap_to_averaged("ema", in_place=in_place))
    first.close()
    assert weight[0].item() == 1
    with pytest.raises(RuntimeError, match=r"`step` is not allowed inside `swap_to_averaged\('ema"):
        optimizer.step()
    second.close()
    assert weight[0].item() == 3
    optimizer.step()


def test_evaluations_in_four_threads_all_see_the_average() -> None:
    weight, optimizer = of_one_weight()
    barrier = threading.Barrier(4)

    def evaluate(_: int) -> list[float]:
        barrier.wait()
        seen = []
        for _ in range(300):
            with optimizer.swap_to_averaged("ema"):
                seen += [weight.min().item(), weight.max().item()]
        return seen

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(evaluate, range(4)))
    assert {value for seen in results for value in seen} == {1.0}
    assert same([weight], [torch.full((1000,), 3.0)])


def test_evaluations_in_tasks_that_wait_for_each_other_all_see_the_average() -> None:
    weight, optimizer = of_one_weight()
    seen: list[float] = []

    async def evaluate(seconds: float) -> None:
        with optimizer.swap_to_averaged("swa"):
            await asyncio.sleep(seconds)
            seen.append(weight[0].item())

    async def main() -> None:
        await asyncio.gather(*(evaluate(seconds) for seconds in (0.02, 0.01, 0.03)))

    asyncio.run(main())
    assert seen == [1.0] * 3
    assert weight[0].item() == 3


def in_another_thread(act: Callable[[], object]) -> BaseException | None:
    """Do it in another thread, and return what it raises."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    return raised[0] if raised else None


CALLS: dict[str, Callable[[AveragingOptimizer], object]] = {
    "step": lambda optimizer: optimizer.step(),
    "update_averages": lambda optimizer: optimizer.update_averages(),
    "load_state_dict": lambda optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    "swap_to_averaged('swa')": lambda optimizer: optimizer.swap_to_averaged("swa").__enter__(),
}


@pytest.mark.parametrize("call", CALLS)
def test_calls_of_other_threads_are_refused_inside_a_swap(call: str) -> None:
    weight, optimizer = of_one_weight()
    before = frozen(optimizer.state_dict())
    with optimizer.swap_to_averaged("ema"):
        error = in_another_thread(lambda: CALLS[call](optimizer))
        assert isinstance(error, RuntimeError)
        assert str(error).startswith(f"`{call}` is not allowed inside `swap_to_averaged('ema')`.")
    assert weight[0].item() == 3
    assert frozen(optimizer.state_dict()) == before


@pytest.mark.parametrize("same_thread", [True, False], ids=["closure", "thread"])
def test_a_swap_during_a_step_is_refused_and_the_step_completes(same_thread: bool) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.5))
    train(model, optimizer, 2)
    seen: list[BaseException | None] = []

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of_batch(model, 3)
        loss.backward()
        enter = optimizer.swap_to_averaged().__enter__
        if same_thread:
            with pytest.raises(RuntimeError) as refusal:
                enter()
            seen.append(refusal.value)
        else:
            seen.append(in_another_thread(enter))
        return loss.item()

    before = values(model.parameters())
    optimizer.step(closure)
    assert str(seen[0]).startswith("`swap_to_averaged('ema')` is not allowed while `step` runs. ")
    assert not same(model.parameters(), before)
    assert optimizer.param_groups[0]["n_averaged_ema"] == 3
    with optimizer.swap_to_averaged():
        pass


def test_a_step_that_raises_leaves_swaps_allowed() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.5))
    train(model, optimizer, 2)
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    with optimizer.swap_to_averaged():
        pass
    assert optimizer.param_groups[0]["n_averaged_ema"] == 2


def test_what_another_thread_saves_during_swaps_are_the_averages() -> None:
    _, optimizer = of_one_weight()
    expected = frozen(optimizer.state_dict()["state"])
    is_over = threading.Event()
    saved: list[Any] = []

    def save() -> None:
        while not is_over.is_set():
            saved.append(frozen(optimizer.state_dict()["state"]))

    thread = threading.Thread(target=save)
    thread.start()
    for _ in range(200):
        with optimizer.swap_to_averaged("ema"):
            pass
    is_over.set()
    thread.join()
    assert len(saved) > 10
    assert all(each == expected for each in saved)
