"""With `skip_nonfinite` averages outlive weights that have become NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import in_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD
from training import averages, averaging_sgd, frozen, same, small_model, train, values

from averaging_optim import EMA, SWA, AveragingOptimizer, Rule

BAD = [math.nan, math.inf, -math.inf]


def two_weights(
    of: torch.dtype = torch.float32, **options: Any
) -> tuple[list[nn.Parameter], AveragingOptimizer]:
    weights = [nn.Parameter(torch.ones(2, dtype=of)), nn.Parameter(torch.ones((), dtype=of))]
    rules: dict[str, Rule] = {"ema": EMA(0.5), "swa": SWA()}
    return weights, AveragingOptimizer(SGD(weights, lr=0.1), rules, **options)


def put(weight: Tensor, value: float) -> None:
    with torch.no_grad():
        weight.view(-1)[-1] = value


def counters(optimizer: AveragingOptimizer) -> dict[str, int]:
    return {key: value for key, value in optimizer.param_groups[0].items() if key.startswith("n_")}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
def test_an_update_with_a_bad_weight_is_skipped_for_the_whole_model(
    dtype: torch.dtype, bad: float
) -> None:
    weights, optimizer = two_weights(dtype, skip_nonfinite=True)
    optimizer.update_averages()
    before = averages(optimizer, "ema") + averages(optimizer, "swa")
    put(weights[0], 5.0)
    put(weights[1], bad)
    optimizer.step()
    optimizer.update_averages("swa")
    assert same(averages(optimizer, "ema") + averages(optimizer, "swa"), before)
    assert counters(optimizer) == {"n_averaged_ema": 1, "n_averaged_swa": 1, "n_skipped": 2}
    assert optimizer.param_groups[0]["averaging_steps"] == 1


def test_averaging_goes_on_when_the_weights_are_finite_again() -> None:
    weights, optimizer = two_weights(skip_nonfinite=True)
    for value in (1.0, math.nan, 4.0):
        put(weights[1], value)
        optimizer.update_averages()
    assert same(averages(optimizer, "swa"), [torch.ones(2), torch.tensor(2.5)])
    assert counters(optimizer) == {"n_averaged_ema": 2, "n_averaged_swa": 2, "n_skipped": 1}


def test_a_first_average_waits_for_finite_weights() -> None:
    weights, optimizer = two_weights(skip_nonfinite=True)
    put(weights[1], math.nan)
    optimizer.update_averages()
    put(weights[1], 3.0)
    optimizer.update_averages()
    assert same(averages(optimizer, "ema"), weights)
    assert counters(optimizer) == {"n_averaged_ema": 1, "n_averaged_swa": 1, "n_skipped": 1}


def test_it_is_off_by_default_and_then_a_bad_weight_enters_the_average() -> None:
    weights, optimizer = two_weights()
    optimizer.update_averages()
    put(weights[1], math.nan)
    optimizer.update_averages()
    assert averages(optimizer, "swa")[1].isnan()
    assert counters(optimizer) == {"n_averaged_ema": 2, "n_averaged_swa": 2, "n_skipped": 0}


def test_a_bad_buffer_counts_as_a_bad_weight_does() -> None:
    buffers = [torch.tensor([1.0]), torch.tensor(7)]
    _, optimizer = two_weights(skip_nonfinite=True, buffers=buffers)
    optimizer.update_averages()
    buffers[0].fill_(math.inf)
    optimizer.update_averages()
    assert optimizer.state_dict()["averaged_buffers"]["ema"][0].item() == 1
    assert optimizer.param_groups[0]["n_skipped"] == 1


def test_a_bad_weight_that_is_not_averaged_does_not_count() -> None:
    left_out, averaged = nn.Parameter(torch.tensor(math.nan)), nn.Parameter(torch.ones(0))
    groups: list[dict[str, Any]] = [
        {"params": [left_out], "average": False},
        {"params": [averaged]},
    ]
    optimizer = AveragingOptimizer(SGD(groups, lr=0.1), EMA(), skip_nonfinite=True)
    optimizer.update_averages()
    assert optimizer.param_groups[1]["n_averaged_ema"] == 1


@pytest.mark.parametrize(
    ("weights", "dtype"),
    [
        (torch.float32, None),
        (torch.float32, torch.float16),
        (torch.float64, torch.float32),
        (torch.bfloat16, None),
    ],
)
def test_no_finite_weight_overflows_an_average(
    weights: torch.dtype, dtype: torch.dtype | None
) -> None:
    """The largest numbers that are averaged, far apart in turn, and the next above them."""
    (weight, _), optimizer = two_weights(weights, dtype=dtype, skip_nonfinite=True)
    limit = torch.finfo(dtype or torch.float32).max / 4
    below = torch.tensor(limit, dtype=torch.float64).to(weights)
    below = below if below.double() <= limit else torch.nextafter(below, torch.zeros_like(below))
    above = torch.nextafter(below, torch.full_like(below, math.inf))
    for value in (below, -below, above, below, -above, -below):
        put(weight, value.item())
        optimizer.update_averages()
        assert all(each.isfinite().all() for each in averages(optimizer, "ema"))
    assert counters(optimizer) == {"n_averaged_ema": 4, "n_averaged_swa": 4, "n_skipped": 2}


def test_the_count_is_saved_and_loaded_and_absent_in_older_checkpoints() -> None:
    weights, optimizer = two_weights(skip_nonfinite=True)
    optimizer.update_averages()
    put(weights[0], math.nan)
    optimizer.update_averages()
    saved = optimizer.state_dict()
    _, resumed = two_weights(skip_nonfinite=True)
    resumed.load_state_dict(saved)
    assert frozen(resumed.state_dict()) == frozen(saved)
    for group in saved["param_groups"]:
        del group["n_skipped"]
    resumed.load_state_dict(saved)
    assert counters(resumed) == {"n_averaged_ema": 1, "n_averaged_swa": 1, "n_skipped": 0}


def test_a_run_that_stays_finite_is_the_same_with_and_without() -> None:
    runs = []
    for skip in (False, True):
        model = small_model()
        sgd = SGD(model.parameters(), lr=0.1, momentum=0.9)
        optimizer = AveragingOptimizer(sgd, EMA(0.9), skip_nonfinite=skip)
        train(model, optimizer, 5)
        runs.append(frozen(optimizer.state_dict()))
    assert runs[0] == runs[1]


def sharded_with_one_bad_element() -> tuple[list[Tensor], dict[str, int]]:
    """Average once, let one element be NaN, in the part of the first rank, and average again."""
    model = small_model()
    fully_shard(model)
    optimizer = AveragingOptimizer(SGD(model.parameters(), lr=0.1), SWA(), skip_nonfinite=True)
    optimizer.update_averages()
    kept: list[Any] = [optimizer.state[weight]["averaged_swa"] for weight in model.parameters()]
    before = [average.full_tensor() for average in kept]
    mine: Any = next(model.parameters())
    if mine.device_mesh.get_rank() == 0:
        put(mine.to_local(), math.nan)
    optimizer.update_averages()
    after = [average.full_tensor() for average in kept]
    assert same(after, before)
    return values(after), counters(optimizer)


# With three ranks one has no part of the last bias, which is of two elements.
@pytest.mark.parametrize("ranks", [2, 3])
def test_what_one_rank_has_to_skip_all_ranks_skip(ranks: int) -> None:
    for kept, count in in_processes(ranks, sharded_with_one_bad_element):
        assert all(average.isfinite().all() for average in kept)
        assert count == {"n_averaged_swa": 1, "n_skipped": 1}


@pytest.mark.usefixtures("process_group")
def test_sharded_weights_of_a_single_process_are_looked_at() -> None:
    _, count = sharded_with_one_bad_element()
    assert count == {"n_averaged_swa": 1, "n_skipped": 1}


@pytest.mark.parametrize("value", [1, None, "yes"])
def test_what_is_no_bool_is_refused(value: Any) -> None:
    build: Callable[..., object] = AveragingOptimizer
    with pytest.raises(TypeError, match=rf"`skip_nonfinite` must be True or False, got {value!r}"):
        build(averaging_sgd(small_model(), EMA()).wrapped, EMA(), skip_nonfinite=value)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_decay_of_1_keeps_the_first_weights_whatever_comes(value: float) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), EMA(decay=1.0))
    optimizer.update_averages()
    with torch.no_grad():
        weight.fill_(value)
    optimizer.update_averages()
    assert same([optimizer.state[weight]["averaged_ema"]], [torch.ones(2)])
    assert optimizer.param_groups[0]["n_averaged_ema"] == 2
