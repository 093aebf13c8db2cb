"""With `skip_nonfinite` averages outlive weights that have become NaN or infinite."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from processes import in_processes
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD, Optimizer
from training import (
    averages,
    averaging_sgd,
    frozen,
    same,
    small_model,
    through_pickle,
    train,
    update_with,
    values,
)

from averaging_optim import EMA, LAWA, SWA, AveragingOptimizer, Rule

BAD = [math.nan, math.inf, -math.inf]


def two_weights(
    of: torch.dtype = torch.float32, **options: Any
) -> tuple[list[nn.Parameter], AveragingOptimizer]:
    weights = [nn.Parameter(torch.ones(2, dtype=of)), nn.Parameter(torch.ones((), dtype=of))]
    rules: dict[str, Rule] = {"ema": EMA(0.5), "swa": SWA()}
    return weights, AveragingOptimizer(SGD(weights, lr=0.1), rules, **options)


def set_last(weight: Tensor, value: float) -> None:
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
    set_last(weights[0], 5.0)
    set_last(weights[1], bad)
    optimizer.step()
    optimizer.update_averages("swa")
    assert same(averages(optimizer, "ema") + averages(optimizer, "swa"), before)
    assert counters(optimizer) == {"n_averaged_ema": 1, "n_averaged_swa": 1, "n_skipped": 2}
    assert optimizer.param_groups[0]["averaging_steps"] == 1


def test_averaging_continues_when_the_weights_are_finite_again() -> None:
    weights, optimizer = two_weights(skip_nonfinite=True)
    for value in (1.0, math.nan, 4.0):
        set_last(weights[1], value)
        optimizer.update_averages()
    assert same(averages(optimizer, "swa"), [torch.ones(2), torch.tensor(2.5)])
    assert counters(optimizer) == {"n_averaged_ema": 2, "n_averaged_swa": 2, "n_skipped": 1}


def test_a_first_average_waits_for_finite_weights() -> None:
    weights, optimizer = two_weights(skip_nonfinite=True)
    set_last(weights[1], math.nan)
    optimizer.update_averages()
    set_last(weights[1], 3.0)
    optimizer.update_averages()
    assert same(averages(optimizer, "ema"), weights)
    assert counters(optimizer) == {"n_averaged_ema": 1, "n_averaged_swa": 1, "n_skipped": 1}


def test_by_default_a_bad_weight_enters_the_average() -> None:
    weights, optimizer = two_weights()
    optimizer.update_averages()
    set_last(weights[1], math.nan)
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
        set_last(weight, value.item())
        optimizer.update_averages()
        assert all(each.isfinite().all() for each in averages(optimizer, "ema"))
    assert counters(optimizer) == {"n_averaged_ema": 4, "n_averaged_swa": 4, "n_skipped": 2}


def test_the_count_of_skipped_updates_is_saved_and_is_0_for_checkpoints_without_it() -> None:
    weights, optimizer = two_weights(skip_nonfinite=True)
    optimizer.update_averages()
    set_last(weights[0], math.nan)
    optimizer.update_averages()
    saved = optimizer.state_dict()
    _, resumed = two_weights(skip_nonfinite=True)
    resumed.load_state_dict(saved)
    assert frozen(resumed.state_dict()) == frozen(saved)
    for group in saved["param_groups"]:
        del group["n_skipped"]
    resumed.load_state_dict(saved)
    assert counters(resumed) == {"n_averaged_ema": 1, "n_averaged_swa": 1, "n_skipped": 0}


def trained(*, skip_nonfinite: bool) -> AveragingOptimizer:
    model = small_model()
    sgd = SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = AveragingOptimizer(sgd, EMA(0.9), skip_nonfinite=skip_nonfinite)
    train(model, optimizer, 5)
    return optimizer


def test_a_run_that_stays_finite_is_the_same_whether_or_not_bad_weights_are_skipped() -> None:
    skipping, averaging = trained(skip_nonfinite=True), trained(skip_nonfinite=False)
    assert frozen(skipping.state_dict()) == frozen(averaging.state_dict())


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
        set_last(mine.to_local(), math.nan)
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
def test_skip_nonfinite_must_be_a_bool(value: Any) -> None:
    build: Callable[..., object] = AveragingOptimizer
    with pytest.raises(TypeError, match=rf"`skip_nonfinite` must be True or False, got {value!r}"):
        build(averaging_sgd(small_model(), EMA()).wrapped, EMA(), skip_nonfinite=value)


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_a_decay_of_1_keeps_the_first_weights_whatever_comes(value: float) -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), EMA(decay=1.0))
    update_with(optimizer, weight, 1.0, value)
    assert same([optimizer.state[weight]["averaged_ema"]], [torch.ones(2)])
    assert optimizer.param_groups[0]["n_averaged_ema"] == 2


# Parameters that come while they are not finite.


def add_group(optimizer: AveragingOptimizer, weight: nn.Parameter) -> None:
    optimizer.add_param_group({"params": [weight]})


def add_to_the_wrapped_optimizer(optimizer: AveragingOptimizer, weight: nn.Parameter) -> None:
    optimizer.wrapped.add_param_group({"params": [weight]})


def add_to_a_group(optimizer: AveragingOptimizer, weight: nn.Parameter) -> None:
    optimizer.param_groups[0]["params"].append(weight)


def unfreeze(optimizer: AveragingOptimizer, weight: nn.Parameter) -> None:
    weight.requires_grad_(False)
    add_group(optimizer, weight)
    optimizer.update_averages()
    weight.requires_grad_(True)


THREE_RULES: dict[str, Rule] = {"ema": EMA(0.5), "swa": SWA(), "last": LAWA(k=2)}
WAYS = [add_group, add_to_the_wrapped_optimizer, add_to_a_group, unfreeze]


def with_one_that_came_later(
    way: Callable[[AveragingOptimizer, nn.Parameter], None], bad: float
) -> tuple[list[nn.Parameter], AveragingOptimizer]:
    """Return a weight that has averages, and one that is not finite and came after these."""
    first, later = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    optimizer = AveragingOptimizer(SGD([first], lr=0.1), THREE_RULES, skip_nonfinite=True)
    optimizer.update_averages()
    set_last(later, bad)
    way(optimizer, later)
    optimizer.update_averages()
    return [first, later], optimizer


def expected_averages(former: int, present: list[float]) -> dict[str, float]:
    """Return the averages of a number that starts at its first value, after `former` updates."""
    swa = ema = present[0]
    for n, value in enumerate(present[1:], former + 1):
        swa, ema = swa + (value - swa) / (n + 1), ema + (value - ema) / 2
    return {"ema": ema, "swa": swa, "last": (present[-1] + present[-2]) / 2}


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("way", WAYS)
def test_a_weight_that_comes_while_it_is_not_finite_is_averaged_from_its_first_finite_values_on(
    way: Callable[[AveragingOptimizer, nn.Parameter], None], bad: float
) -> None:
    (first, later), optimizer = with_one_that_came_later(way, bad)
    former = optimizer.n_averaged("swa")
    assert optimizer.param_groups[0]["n_skipped"] == 1
    for value in (4.0, 8.0, 16.0):
        set_last(later, value)
        set_last(first, value)
        optimizer.update_averages()
    expected = expected_averages(former, [4.0, 8.0, 16.0])
    for name in THREE_RULES:
        kept = optimizer.state[later][f"averaged_{name}"]
        # SWA's third of a number is rounded otherwise in float64.
        torch.testing.assert_close(kept, torch.tensor([1.0, expected[name]]), rtol=1e-6, atol=0)
        assert optimizer.state[first][f"averaged_{name}"].isfinite().all()


def resume(weights: list[nn.Parameter], optimizer: AveragingOptimizer) -> Any:
    others = [nn.Parameter(weight.detach().clone()) for weight in weights]
    groups = [{"params": [other]} for other in others]
    other = AveragingOptimizer(SGD(groups, lr=0.1), THREE_RULES, skip_nonfinite=True)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return others, other


def deep_copy(weights: list[nn.Parameter], optimizer: AveragingOptimizer) -> Any:
    return copy.deepcopy((weights, optimizer))


def pickle_all(weights: list[nn.Parameter], optimizer: AveragingOptimizer) -> Any:
    return through_pickle((weights, optimizer))


@pytest.mark.parametrize("act", [resume, deep_copy, pickle_all])
def test_resuming_while_a_new_weight_is_not_finite_equals_never_stopping(
    act: Callable[[list[nn.Parameter], AveragingOptimizer], Any],
) -> None:
    weights, optimizer = with_one_that_came_later(add_group, math.nan)
    others, other = act(weights, optimizer)
    assert frozen(other.state_dict()) == frozen(optimizer.state_dict())
    for value in (math.inf, 4.0, 8.0):
        set_last(weights[1], value)
        set_last(others[1], value)
        optimizer.update_averages()
        other.update_averages()
    assert frozen(other.state_dict()) == frozen(optimizer.state_dict())
    saved = optimizer.state_dict()["state"]
    assert all(each.isfinite().all() for entry in saved.values() for each in entry.values())


def test_a_weight_that_was_never_finite_leaves_the_swap_of_others_finite() -> None:
    (first, later), optimizer = with_one_that_came_later(add_group, math.nan)
    set_last(later, 4.0)
    with optimizer.swap_to_averaged("swa"):
        assert same([first], [torch.ones(2)])
    assert same([later], [torch.tensor([1.0, 4.0])])


# Numbers of eight bits, over which torch finds infinities and takes norms in few cases.

EIGHT_BITS = [
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
]


def of_eight_bits(dtype: torch.dtype, **options: Any) -> tuple[Tensor, AveragingOptimizer]:
    weight = nn.Parameter(torch.ones(3).to(dtype))
    return weight, AveragingOptimizer(SGD([weight], lr=0.1), THREE_RULES, **options)


@pytest.mark.parametrize("skip", [False, True], ids=["kept", "skipped"])
@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_weights_of_eight_bits_have_float32_averages(dtype: torch.dtype, skip: bool) -> None:
    weight, optimizer = of_eight_bits(dtype, skip_nonfinite=skip)
    update_with(optimizer, weight, 2.0, 4.0, 8.0)
    saved = copy.deepcopy(optimizer.state_dict())
    expected = [torch.full((3,), value) for value in (5.5, 6.0)]
    assert same([averages(optimizer, "ema")[0], averages(optimizer, "last")[0]], expected)
    with optimizer.swap_to_averaged("last"):
        assert same([weight], [torch.full((3,), 6.0).to(dtype)])
    assert same([weight], [torch.full((3,), 8.0).to(dtype)])
    _, other = of_eight_bits(dtype)
    other.load_state_dict(saved)
    assert frozen(other.state_dict()) == frozen(saved)


@pytest.mark.parametrize("dtype", EIGHT_BITS, ids=str)
def test_a_weight_of_eight_bits_that_is_not_a_number_is_skipped(dtype: torch.dtype) -> None:
    weight, optimizer = of_eight_bits(dtype, skip_nonfinite=True)
    update_with(optimizer, weight, 1.0, math.nan)
    assert same(averages(optimizer, "ema"), [torch.ones(3)])
    assert optimizer.param_groups[0]["n_skipped"] == 1


class StepsByHand(Optimizer):
    """SGD for numbers that torch's kernels can't compute with."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    weight.copy_(weight.float() - group["lr"] * weight.grad.float())


def test_an_optimizer_that_steps_by_hand_trains_weights_of_eight_bits_and_others_are_frozen() -> (
    None
):
    dtype = torch.float8_e4m3fn
    weight = nn.Parameter(torch.full((2,), 8.0).to(dtype))
    fixed = nn.Parameter(torch.full((2,), 3.0).to(dtype), requires_grad=False)
    optimizer = AveragingOptimizer(StepsByHand([weight, fixed]), SWA(), skip_nonfinite=True)
    for _ in range(3):
        weight.grad = torch.full((2,), 2.0).to(dtype)
        optimizer.step()
    # The mean of 6, 4 and 2.
    assert same([optimizer.state[weight]["averaged_swa"]], [torch.full((2,), 4.0)])
    with optimizer.swap_to_averaged():
        assert same([weight, fixed], [torch.full((2,), value).to(dtype) for value in (4.0, 3.0)])
    assert "averaged_swa" not in optimizer.state_dict()["averaged_parameters"][1]


def test_buffers_of_eight_bits_are_averaged_and_masks_of_them_copied() -> None:
    # Of the kinds that torch has, this alone has an infinity.
    mask = torch.tensor([0.0, -math.inf]).to(torch.float8_e5m2)
    scale = torch.full((2,), 2.0).to(torch.float8_e4m3fn)
    _, optimizer = two_weights(buffers=[scale, mask])
    optimizer.update_averages()
    scale.copy_(torch.full((2,), 4.0))
    optimizer.update_averages()
    kept = optimizer.state_dict()["averaged_buffers"]["swa"]
    assert same(kept, [torch.full((2,), 3.0), mask.float()])


def test_averages_of_integers_are_copied_and_not_looked_at() -> None:
    """Such as 0.1.0 has saved of parameters that are quantized."""
    weight = nn.Parameter(torch.ones(2))
    codes = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    optimizer = AveragingOptimizer(SGD([weight, codes]), EMA(0.5), skip_nonfinite=True)
    optimizer.update_averages()
    optimizer.state[codes]["averaged_ema"] = torch.tensor([0, 0])
    optimizer.update_averages()
    assert optimizer.state[codes]["averaged_ema"].tolist() == [1, 2]
    assert optimizer.n_averaged() == 2
