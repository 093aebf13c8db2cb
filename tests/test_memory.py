"""What a swap, a state dict and a step take of memory, as torch's profiler counts it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn
from torch.optim import SGD
from training import DTYPES, averaging_sgd, loss_of_batch, model_with_batch_norm, train

from averaging_optim import EMA, SWA, AveragingOptimizer

MIB = 2**20


class Memory:
    """Bytes of torch's CPU allocator: taken in all, and still held in the end."""

    taken = 0
    held = 0


@contextmanager
def measured() -> Iterator[Memory]:
    memory = Memory()
    with torch.profiler.profile(profile_memory=True) as profile:
        yield memory
    changes = [event.self_cpu_memory_usage for event in profile.events()]
    memory.taken = sum(change for change in changes if change > 0)
    memory.held = sum(changes)


def test_the_profiler_sees_what_is_taken_and_what_stays() -> None:
    with measured() as memory:
        kept = torch.ones(1000) + torch.ones(1000)
    assert kept.nbytes == 4000
    assert 12_000 <= memory.taken < 13_000
    assert 4000 <= memory.held < 5000


@pytest.mark.parametrize("in_place", [True, False], ids=["in_place", "backed_up"])
def test_a_swap_takes_a_backup_of_the_weights_or_in_place_at_most_16_mebibytes(
    in_place: bool,
) -> None:
    weights = [nn.Parameter(torch.ones(size)) for size in (60_000_000, 10, 39_999_990)]
    assert sum(weight.nbytes for weight in weights) == 400_000_000
    optimizer = AveragingOptimizer(SGD(weights, lr=0.1), SWA())
    optimizer.update_averages()
    with measured() as memory, optimizer.swap_to_averaged(in_place=in_place):
        pass
    if in_place:
        assert 0 < memory.taken <= 16 * MIB
    else:
        assert memory.taken == 400_000_000
    assert memory.held == 0


@pytest.mark.parametrize(("weights", "dtype"), DTYPES)
def test_a_state_dict_copies_nothing(weights: torch.dtype, dtype: torch.dtype | None) -> None:
    model = model_with_batch_norm().to(weights)
    optimizer = averaging_sgd(model, EMA(0.5), dtype=dtype, buffers=model.buffers())
    train(model, optimizer, 2)
    with measured() as memory:
        optimizer.state_dict()
    assert memory.taken == 0


@pytest.mark.parametrize("skip_nonfinite", [False, True])
@pytest.mark.parametrize(("weights", "dtype"), DTYPES)
def test_a_step_holds_nothing_once_it_is_over(
    weights: torch.dtype, dtype: torch.dtype | None, skip_nonfinite: bool
) -> None:
    model = model_with_batch_norm().to(weights)
    optimizer = AveragingOptimizer(
        SGD(model.parameters(), lr=0.1, momentum=0.9),
        {"ema": EMA(0.5), "swa": SWA()},
        buffers=model.buffers(),
        dtype=dtype,
        skip_nonfinite=skip_nonfinite,
    )
    train(model, optimizer, 2)
    loss_of_batch(model, 2).backward()
    with measured() as memory:
        optimizer.step()
    assert memory.held == 0
