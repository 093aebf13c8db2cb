"""Averages of 16 bits, rounded at random."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import in_processes
from sharding import trains_with_fsdp, whole, whole_averages
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from training import averages, frozen, same, small_model, train, update_with

from averaging_optim import EMA, LAWA, SWA, AveragingOptimizer, Rule

LOW = [torch.bfloat16, torch.float16]
RULES: dict[str, Rule] = {"ema": EMA(0.99), "swa": SWA(start=2), "last": LAWA(k=3)}


def averaging(weights: Any, rule: Rule | dict[str, Rule], dtype: torch.dtype) -> AveragingOptimizer:
    sgd = SGD(weights, lr=0.1, momentum=0.9)
    return AveragingOptimizer(sgd, rule, dtype=dtype, rounding="stochastic")


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_an_average_with_a_long_memory_moves_as_in_exact_arithmetic(dtype: torch.dtype) -> None:
    """Rounded to the nearest, it stands still at less than a tenth of the way."""
    decay, updates = 0.9999, 20_000
    weight = nn.Parameter(torch.zeros(400))
    optimizer = averaging([weight], EMA(decay), dtype)
    optimizer.update_averages()
    nn.init.ones_(weight)
    for _ in range(updates):
        optimizer.update_averages()
    average: Tensor = optimizer.state[weight]["averaged_ema"]
    assert average.dtype == dtype
    exact = 1 - decay**updates
    # The spread of one number is what rounding at random has left it with; 400 of them are there.
    spread = average.double().std().item()
    assert 0 < spread < 0.05
    assert average.double().mean().item() == pytest.approx(exact, abs=5 * spread / math.sqrt(400))


@pytest.mark.parametrize("k", [2, 64])
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_the_mean_of_the_last_weights_moves_as_in_exact_arithmetic(
    dtype: torch.dtype, k: int
) -> None:
    """Its snapshots have 16 bits too, and it is made of them again at each update."""
    step, updates = torch.finfo(dtype).eps / 10, 200
    weight = nn.Parameter(torch.ones(10_000))
    optimizer = averaging([weight], LAWA(k), dtype)
    for _ in range(updates):
        optimizer.update_averages()
        with torch.no_grad():
            weight.add_(step)
    average = optimizer.state[weight]["averaged_lawa"].double()
    exact = 1 + step * (updates - (k + 1) / 2)
    spread = average.std().item()
    assert 0 < spread < torch.finfo(dtype).eps
    assert average.mean().item() == pytest.approx(exact, abs=5 * spread / math.sqrt(10_000))


def test_complex_averages_have_32_bits_a_part_and_are_not_rounded() -> None:
    def averages_rounded(rounding: str) -> list[Tensor]:
        weight = nn.Parameter(torch.tensor([1 + 2j, 3 - 1j]))
        sgd = SGD([weight], lr=0.1)
        optimizer = AveragingOptimizer(sgd, RULES, dtype=torch.bfloat16, rounding=rounding)
        for number in range(6):
            with torch.no_grad():
                weight.mul_(1.1 + 0.1j * number)
            optimizer.step()
        return [optimizer.state[weight][f"averaged_{name}"] for name in RULES]

    assert same(averages_rounded("stochastic"), averages_rounded("nearest"))


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_constant_stays_exactly_itself(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    # + 0, since −0 becomes 0 in any sum.
    values = (torch.randn(1000) * torch.logspace(-9, 4, 1000)).to(dtype) + 0
    weight = nn.Parameter(values.float())
    optimizer = averaging([weight], RULES, dtype)
    for _ in range(20):
        optimizer.update_averages()
    for name in optimizer.rules:
        assert same([optimizer.state[weight][f"averaged_{name}"]], [values])


def averages_at(number: float, dtype: torch.dtype, size: int) -> Tensor:
    """Return averages that in exact arithmetic would all be this number."""
    weight = nn.Parameter(torch.zeros(size))
    optimizer = averaging([weight], EMA(0.75), dtype)
    update_with(optimizer, weight, 0.0, 4 * number)
    average: Tensor = optimizer.state[weight]["averaged_ema"]
    return average


NUMBERS = st.floats(-60000, 60000, width=32) | st.floats(-(2.0**-13), 2.0**-13, width=32)


@pytest.mark.parametrize("dtype", LOW, ids=str)
@given(number=NUMBERS)
def test_an_average_is_rounded_to_one_of_its_two_neighbours_and_in_the_mean_to_itself(
    dtype: torch.dtype, number: float
) -> None:
    rounded = averages_at(number, dtype, 20_000)
    nearest = torch.tensor([number]).to(dtype)
    beside = [nearest.nextafter(torch.tensor(sign * math.inf, dtype=dtype)) for sign in (-1, 1)]
    around = torch.cat([beside[0], nearest, beside[1]]).double()
    below, above = around[around <= number].max(), around[around >= number].min()
    assert set(rounded.double().unique().tolist()) <= {below.item(), above.item()}
    # Five standard errors of a mean of 20,000, of which each is at most half the distance off.
    error = 5 * (above - below).item() / 2 / math.sqrt(20_000)
    assert abs(rounded.double().mean().item() - number) <= error


# To this NaN of all bits rounding would add a one, and carry it into the sign of a 0.
FULL_NAN: float = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32).item()


@pytest.mark.parametrize(
    "number", [math.inf, -math.inf, math.nan, FULL_NAN], ids=["inf", "-inf", "nan", "full_nan"]
)
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_an_average_that_is_not_finite_stays_so(dtype: torch.dtype, number: float) -> None:
    rounded = averages_at(number, dtype, 100)
    assert torch.equal(rounded.isnan(), torch.full((100,), math.isnan(number)))
    assert math.isnan(number) or bool((rounded == number).all())


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_resumed_run_is_the_one_that_never_stopped(dtype: torch.dtype) -> None:
    model = small_model()
    optimizer = averaging(model.parameters(), RULES, dtype)
    train(model, optimizer, 5)
    weights, saved = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    train(model, optimizer, 5, first=5)
    resumed = small_model()
    other = averaging(resumed.parameters(), RULES, dtype)
    torch.manual_seed(7)  # has no part in it
    resumed.load_state_dict(weights)
    other.load_state_dict(saved)
    train(resumed, other, 5, first=5)
    assert frozen(other.state_dict()) == frozen(optimizer.state_dict())


def with_ddp() -> dict[str, list[Tensor]]:
    model = DistributedDataParallel(small_model())
    optimizer = averaging(model.parameters(), RULES, torch.bfloat16)
    train(model, optimizer, 6)
    return whole_averages(optimizer)


def test_two_ranks_round_exactly_as_one_process() -> None:
    model = small_model()
    optimizer = averaging(model.parameters(), RULES, torch.bfloat16)
    train(model, optimizer, 6)
    for found in in_processes(2, with_ddp):
        assert frozen(found) == frozen({name: averages(optimizer, name) for name in RULES})


def partly_sharded() -> tuple[nn.Module, AveragingOptimizer]:
    """Return a model of which three ranks have two, two and no rows, and all have the last part."""
    model = small_model()
    fully_shard(model[0])
    return model, averaging(model.parameters(), RULES, torch.bfloat16)


def checkpoint_of(model: nn.Module, optimizer: AveragingOptimizer) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model_state_dict": weights, "optim_state_dict": state}


def stopped_and_resumed(folder: Path) -> list[Any]:
    """Return weights and averages of a run that never stopped, and of one that did."""
    model, optimizer = partly_sharded()
    train(model, optimizer, 5)
    save_distributed(checkpoint_of(model, optimizer), checkpoint_id=folder)
    train(model, optimizer, 5, first=5)
    resumed, other = partly_sharded()
    saved = checkpoint_of(resumed, other)
    load_distributed(saved, checkpoint_id=folder)
    set_state_dict(resumed, other, **saved)
    train(resumed, other, 5, first=5)
    return [
        [whole(each.parameters()), whole_averages(its)]
        for each, its in ((model, optimizer), (resumed, other))
    ]


@trains_with_fsdp
def test_ranks_with_unlike_shards_round_alike_what_they_share_and_resume_bit_for_bit(
    tmp_path: Path,
) -> None:
    first, *others = in_processes(3, stopped_and_resumed, tmp_path)
    never_stopped, resumed = first
    assert frozen(resumed) == frozen(never_stopped)
    assert frozen(others) == frozen([first] * 2)


def test_rounding_takes_no_random_numbers_from_training() -> None:
    def state_after(rounding: str) -> Tensor:
        model = small_model()
        sgd = SGD(model.parameters(), lr=0.1)
        optimizer = AveragingOptimizer(sgd, EMA(0.9), dtype=torch.bfloat16, rounding=rounding)
        train(model, optimizer, 3)
        return torch.get_rng_state()

    assert torch.equal(state_after("stochastic"), state_after("nearest"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounding": "up"}, r"`rounding` must be 'nearest' or 'stochastic', got 'up'\."),
        ({"rounding": "stochastic"}, r"averages have 16 bits, got 'stochastic' with `dtype` None"),
        ({"rounding": "stochastic", "dtype": torch.float32}, r"`dtype` torch\.float32\. Pass"),
    ],
)
def test_rounding_at_random_is_for_averages_of_16_bits(
    options: dict[str, Any], message: str
) -> None:
    sgd = SGD(small_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=message):
        AveragingOptimizer(sgd, EMA(), **options)
