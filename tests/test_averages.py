"""What the averages are, against closed forms, torch's own, and what linearity demands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from modules import cast_down, give_other_memory
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from training import (
    EVERY_RULE,
    assert_averages_of,
    averages,
    averaging_sgd,
    fill,
    first_layer,
    model_with_batch_norm,
    same,
    small_model,
    train,
    update_with,
    values,
)

from averaging_optim import EMA, SWA, T_ADEMA, AveragingOptimizer, Formula, Rule
from averaging_optim._averages import moving

STEPS = 12


def weighted_sum(snapshots: list[list[Tensor]], weights: list[float]) -> list[Tensor]:
    """Return the sum of the snapshots with these weights, parameter by parameter."""
    assert math.isclose(sum(weights), 1)
    return [
        sum((w * p for w, p in zip(weights, parameter, strict=True)), torch.zeros(()))
        for parameter in zip(*snapshots, strict=True)
    ]


def unrolled_ema(decay: float, n: int) -> list[float]:
    return [decay ** (n - 1)] + [(1 - decay) * decay ** (n - 1 - i) for i in range(1, n)]


def unrolled_t_adema(alpha: float, timescale: float, n: int) -> list[float]:
    decays = [alpha * math.tanh(i / timescale) for i in range(n)]
    return [(1 - decays[i]) * math.prod(decays[i + 1 :]) for i in range(n)]


CLOSED_FORMS = [
    pytest.param(EMA(0.9), unrolled_ema(0.9, STEPS), id="ema"),
    pytest.param(SWA(), [1 / STEPS] * STEPS, id="swa"),
    pytest.param(T_ADEMA(0.9), unrolled_t_adema(0.9, 1, STEPS), id="t_adema"),
    pytest.param(T_ADEMA(0.8, 5.0), unrolled_t_adema(0.8, 5, STEPS), id="t_adema_slow"),
]


@pytest.mark.parametrize(("rule", "weights"), CLOSED_FORMS)
def test_each_average_is_its_closed_form(rule: Rule, weights: list[float]) -> None:
    model = small_model(torch.float64)
    optimizer = averaging_sgd(model, {"one": rule})
    expected = weighted_sum(train(model, optimizer, STEPS), weights)
    for average, value in zip(averages(optimizer, "one"), expected, strict=True):
        # Twelve steps of float64 rounding on values near 1.
        torch.testing.assert_close(average, value, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("rule", "multi_avg_fn"),
    [
        pytest.param(EMA(0.9), get_ema_multi_avg_fn(0.9), id="ema"),
        pytest.param(EMA(0.999), get_ema_multi_avg_fn(0.999), id="slow_ema"),
        pytest.param(SWA(), get_swa_multi_avg_fn(), id="swa"),
    ],
)
def test_float32_averages_equal_those_of_torch_bit_for_bit(rule: Rule, multi_avg_fn: Any) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, {"one": rule})
    reference = AveragedModel(model, multi_avg_fn=multi_avg_fn)
    for step in range(50):
        train(model, optimizer, 1, first=step)
        reference.update_parameters(model)
    assert same(averages(optimizer, "one"), reference.module.parameters())


@pytest.mark.parametrize(
    ("rule", "snapshot"),
    [
        pytest.param(EMA(decay=0), -1, id="decay_0_is_the_present"),
        pytest.param(EMA(decay=1), 0, id="decay_1_is_the_first"),
        pytest.param(T_ADEMA(alpha=0), -1, id="alpha_0_is_the_present"),
        pytest.param(SWA(start=STEPS - 1), -1, id="one_update_is_the_present"),
    ],
)
def test_an_average_at_the_limit_of_its_rule_is_the_first_or_the_present_weights(
    rule: Rule, snapshot: int
) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, {"one": rule})
    snapshots = train(model, optimizer, STEPS)
    assert same(averages(optimizer, "one"), snapshots[snapshot])


THREE_RULES: dict[str, Rule] = {
    "fast": EMA(0.5),
    "slow": EMA(0.99),
    "mean": SWA(start=4, every=2),
}


@pytest.mark.parametrize("name", THREE_RULES)
def test_one_of_several_averages_is_what_it_is_alone(name: str) -> None:
    model, other = small_model(), small_model()
    together = averaging_sgd(model, THREE_RULES)
    alone = averaging_sgd(other, {name: THREE_RULES[name]})
    train(model, together, STEPS)
    train(other, alone, STEPS)
    assert same(averages(together, name), averages(alone, name))


def test_every_and_start_choose_the_snapshots() -> None:
    model = small_model(torch.float64)
    optimizer = averaging_sgd(model, SWA(start=3, every=4))
    snapshots = train(model, optimizer, STEPS)
    expected = weighted_sum([snapshots[6], snapshots[10]], [0.5, 0.5])
    torch.testing.assert_close(averages(optimizer, "swa"), expected, rtol=0, atol=1e-15)
    assert optimizer.param_groups[0]["n_averaged_swa"] == 2
    assert optimizer.param_groups[0]["averaging_steps"] == STEPS


def test_t_adema_counts_updates_and_not_tensors() -> None:
    many = [nn.Parameter(torch.zeros(1, dtype=torch.float64)) for _ in range(20)]
    optimizer = AveragingOptimizer(SGD(many, lr=1.0), T_ADEMA(alpha=0.9, timescale=10))
    optimizer.update_averages()
    for weight in many:
        fill(weight, 1.0)
    optimizer.update_averages()
    expected = torch.full((1,), 1 - 0.9 * math.tanh(1 / 10), dtype=torch.float64)
    assert same(averages(optimizer, "t_adema"), [expected] * 20)


def test_update_averages_is_the_only_update_when_every_is_none() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, {"end_of_epoch": SWA(every=None), "ema": EMA()})
    train(model, optimizer, 3)
    assert optimizer.param_groups[0]["n_averaged_end_of_epoch"] == 0
    optimizer.update_averages("end_of_epoch")
    assert optimizer.param_groups[0]["n_averaged_end_of_epoch"] == 1
    assert optimizer.param_groups[0]["n_averaged_ema"] == 3
    assert same(averages(optimizer, "end_of_epoch"), model.parameters())
    optimizer.update_averages()
    assert optimizer.param_groups[0]["n_averaged_end_of_epoch"] == 2
    assert optimizer.param_groups[0]["n_averaged_ema"] == 4
    assert optimizer.param_groups[0]["averaging_steps"] == 3


def test_a_group_with_average_false_is_left_out() -> None:
    model = small_model()
    groups: list[dict[str, Any]] = [
        {"params": model[0].parameters()},
        {"params": model[2].parameters(), "average": False},
    ]
    optimizer = AveragingOptimizer(SGD(groups, lr=0.1), EMA())
    train(model, optimizer, 3)
    entries = optimizer.state_dict()["state"]
    assert [index for index in entries if "averaged_ema" in entries[index]] == [0, 1]
    averaged, left_out = (
        [entries[i]["averaged_ema"].clone() for i in (0, 1)],
        values(model[2].parameters()),
    )
    with optimizer.swap_to_averaged():
        assert same(model.parameters(), averaged + left_out)


@pytest.mark.parametrize(
    ("weights", "dtype", "expected"),
    [
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.bfloat16, None, torch.float32),
        (torch.float16, None, torch.float32),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.bfloat16),
        (torch.complex64, None, torch.complex64),
        (torch.complex64, torch.float64, torch.complex128),
    ],
)
def test_averages_have_the_dtype_of_the_weights_or_float32_or_the_one_asked_for(
    weights: torch.dtype, dtype: torch.dtype | None, expected: torch.dtype
) -> None:
    weight = nn.Parameter(torch.ones(3, dtype=weights))
    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), EMA(0.5), dtype=dtype)
    optimizer.update_averages()
    with torch.no_grad():
        weight.mul_(3)
    optimizer.update_averages()
    assert same(averages(optimizer, "ema"), [torch.full((3,), 2, dtype=expected)])


def test_float32_averages_of_bfloat16_weights_do_not_stand_still() -> None:
    """One weight jumps from 0 to 1; after n updates its EMA is 1 − decayⁿ."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), EMA(decay=0.9999))
    optimizer.update_averages()
    fill(weight, 1.0)
    for _ in range(2000):
        optimizer.update_averages()
    # 2,000 float32 roundings of at most 2⁻²⁵ each; bfloat16 stands still far below.
    assert averages(optimizer, "ema")[0].item() == pytest.approx(1 - 0.9999**2000, abs=6e-5)


def test_float_buffers_are_averaged_and_integer_ones_carried_along() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, SWA(), buffers=model.buffers())
    kept = []
    for step in range(5000, 5004):
        train(model, optimizer, 1, first=step)
        kept.append(values(model.buffers()))
    mean, _, batches = optimizer.state_dict()["averaged_buffers"]["swa"]
    expected = torch.stack([snapshot[0] for snapshot in kept]).mean(0)
    # Four float32 roundings on running means below 1.
    torch.testing.assert_close(mean, expected, rtol=0, atol=5e-7)
    assert same([batches], [torch.tensor(4)])


def test_averages_live_on_the_device_asked_for() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), EMA(), device="meta")
    optimizer.update_averages()
    optimizer.update_averages()
    assert optimizer.state[weight]["averaged_ema"].device.type == "meta"


@pytest.mark.parametrize("rule", [EMA(0.9), SWA(), T_ADEMA(0.9, 100)], ids=repr)
def test_an_average_over_ten_thousand_updates_of_a_constant_is_the_constant(rule: Rule) -> None:
    weight = nn.Parameter(torch.tensor([0.1, 1 / 3, 1e30]))
    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), {"one": rule})
    for _ in range(10_000):
        optimizer.update_averages()
    assert same(averages(optimizer, "one"), [weight])


SNAPSHOTS = st.lists(st.floats(-1000, 1000), min_size=1, max_size=20)


def average_of(rule: Rule, snapshots: list[float]) -> float:
    """Return the average the optimizer keeps of one float64 weight with these values."""
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), {"one": rule})
    update_with(optimizer, weight, *snapshots)
    return averages(optimizer, "one")[0].item()


# Up to 20 updates, each with a few roundings of values up to 1,000 in float64.
ROUNDING = 1e-10


@given(rule=EVERY_RULE, value=st.floats(-1e30, 1e30), n=st.integers(1, 20))
def test_the_average_of_a_constant_is_that_constant(rule: Rule, value: float, n: int) -> None:
    assert average_of(rule, [value] * n) == value


@given(rule=EVERY_RULE, snapshots=SNAPSHOTS)
def test_an_average_lies_between_the_snapshots(rule: Rule, snapshots: list[float]) -> None:
    average = average_of(rule, snapshots)
    assert min(snapshots) - ROUNDING <= average <= max(snapshots) + ROUNDING


@given(rule=EVERY_RULE, snapshots=SNAPSHOTS, scale=st.floats(-2, 2), shift=st.floats(-100, 100))
def test_averaging_commutes_with_affine_maps(
    rule: Rule, snapshots: list[float], scale: float, shift: float
) -> None:
    mapped = average_of(rule, [scale * value + shift for value in snapshots])
    assert mapped == pytest.approx(scale * average_of(rule, snapshots) + shift, abs=ROUNDING)


@given(rule=EVERY_RULE, n=st.integers(1, 20))
def test_unrolled_weights_are_not_negative_and_sum_to_1(rule: Rule, n: int) -> None:
    units = [[float(i == j) for i in range(n)] for j in range(n)]
    weights = [average_of(rule, unit) for unit in units]
    assert min(weights) >= 0
    assert math.fsum(weights) == pytest.approx(1, abs=ROUNDING)


@given(snapshots=SNAPSHOTS)
def test_ema_with_decay_n_over_n_plus_1_is_swa(snapshots: list[float]) -> None:
    class Growing(Rule):
        def weight(self, n_averaged: int) -> float:
            return EMA(decay=n_averaged / (n_averaged + 1)).weight(n_averaged)

    expected = math.fsum(snapshots) / len(snapshots)
    assert average_of(Growing(), snapshots) == pytest.approx(expected, abs=ROUNDING)
    assert average_of(SWA(), snapshots) == pytest.approx(expected, abs=ROUNDING)


def test_a_function_of_the_number_of_updates_is_a_rule() -> None:
    weight = nn.Parameter(torch.zeros(1))

    def halved(n: int) -> float:
        return 2.0**-n

    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), halved)
    assert optimizer.rules == {"halved": Formula(halved)}
    update_with(optimizer, weight, 8.0, 0.0, 0.0)
    # Of 8, half is left by the second update and three quarters of that by the third.
    assert averages(optimizer, "halved")[0].item() == 3
    named = AveragingOptimizer(SGD([weight], lr=0.1), {"mine": halved, "ema": EMA()})
    assert named.rules == {"mine": Formula(halved), "ema": EMA()}


def test_a_first_average_copies_whatever_the_rule_says() -> None:
    class Quarter(Rule):
        def weight(self, n_averaged: int) -> float:
            return 0.25

    assert average_of(Quarter(), [8.0]) == 8
    assert average_of(Quarter(), [8.0, 0.0]) == 6


@pytest.mark.parametrize("zero", [0.0, torch.tensor(0.0)], ids=repr)
@pytest.mark.parametrize("gradients", ["ones", "zeros", "none"])
def test_a_step_at_lr_0_counts_unless_all_gradients_are_zero_too(
    zero: float | Tensor, gradients: str
) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.5))
    for weight in model.parameters():
        weight.grad = None if gradients == "none" else torch.zeros_like(weight)
    if gradients == "ones":
        first_layer(model).weight.grad = torch.eye(4, 3)
    optimizer.param_groups[0]["lr"] = zero
    optimizer.step()
    assert optimizer.param_groups[0]["averaging_steps"] == int(gradients == "ones")
    assert optimizer.param_groups[0]["n_averaged_ema"] == int(gradients == "ones")
    assert set(optimizer.state_dict()["state"][0]) >= {"averaged_ema"}
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    optimizer.step()
    assert optimizer.param_groups[0]["averaging_steps"] == 1 + int(gradients == "ones")


def test_parameters_added_later_have_the_average_of_their_present_values() -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((1,), 8.0))
    optimizer = AveragingOptimizer(SGD([first], lr=0.0), SWA())
    optimizer.update_averages()
    optimizer.add_param_group({"params": [second]})
    assert optimizer.param_groups[1]["n_averaged_swa"] == 1
    with torch.no_grad():
        second.zero_()
    optimizer.update_averages()
    assert same(averages(optimizer, "swa"), [torch.zeros(1), torch.full((1,), 4.0)])


def cast_one_layer_up(model: nn.Sequential) -> None:
    model[2].double()


def lay_out_otherwise(model: nn.Sequential) -> None:
    weight = first_layer(model).weight
    weight.data = weight.data.t().contiguous().t()


@pytest.mark.parametrize("rules", [{"ema": EMA(0.5)}, {"ema": EMA(0.5), "swa": SWA()}], ids=len)
@pytest.mark.parametrize(
    "change", [cast_down, cast_one_layer_up, give_other_memory, lay_out_otherwise]
)
def test_weights_that_change_between_updates_are_averaged_as_they_are_now(
    change: Callable[[nn.Sequential], None], rules: dict[str, Rule]
) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, rules)
    snapshots = []
    for act in (lambda _: None, lambda _: None, change, lambda _: None):
        act(model)
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(2)
        snapshots.append([weight.float() for weight in values(model.parameters())])
        optimizer.update_averages()
    assert_averages_of(optimizer, snapshots)


def test_groups_that_change_places_in_averaging_are_averaged_as_they_say_now() -> None:
    weights = [nn.Parameter(torch.zeros(1)) for _ in range(2)]
    groups: list[dict[str, Any]] = [{"params": [weight]} for weight in weights]
    optimizer = AveragingOptimizer(SGD(groups, lr=0.1), EMA(0.5))
    optimizer.update_averages()
    for averaged, value in enumerate((4.0, 8.0)):
        for i, group in enumerate(optimizer.param_groups):
            group["average"] = i == averaged
        update_with(optimizer, weights[averaged], value)
    assert same(averages(optimizer, "ema"), [torch.full((1,), 4.0)])
    assert optimizer.state[weights[0]]["averaged_ema"].item() == 2


def test_an_average_that_was_deleted_starts_again_at_the_present_weights() -> None:
    weight = nn.Parameter(torch.ones(1))
    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), EMA(0.5))
    optimizer.update_averages()
    optimizer.update_averages()
    del optimizer.state[weight]["averaged_ema"]
    update_with(optimizer, weight, 5.0, 9.0)
    assert optimizer.state[weight]["averaged_ema"].item() == 7


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_averages_of_tensors_of_all_sizes_and_layouts_are_the_same_in_pieces(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three averages are moved together, so that weights are cut up; one alone is not."""
    monkeypatch.setattr(moving, "_PIECES", {"cpu": 100})
    torch.manual_seed(0)
    shapes = [(), (0, 3), (7,), (1, 250), (40, 30), (3, 1, 90), (2, 3, 5, 7), (99,), (101,)]
    weights = [nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    weights.append(nn.Parameter(torch.randn(20, 30).to(dtype).t()))
    rules: dict[str, Rule] = {"ema": EMA(0.9), "swa": SWA(), "t_adema": T_ADEMA(0.9)}
    optimizer = AveragingOptimizer(SGD(weights, lr=0.1), rules)
    snapshots = []
    for _ in range(3):
        with torch.no_grad():
            for weight in weights:
                weight.add_(torch.randn_like(weight))
        snapshots.append([weight.detach().float() for weight in values(weights)])
        optimizer.update_averages()
    assert_averages_of(optimizer, snapshots)


@pytest.mark.parametrize("share", [1.2, -0.1, math.nan])
def test_a_rule_that_leaves_the_interval_is_refused_before_the_step(share: float) -> None:
    class Wrong(Rule):
        def weight(self, n_averaged: int) -> float:
            return share

    model = small_model()
    optimizer = averaging_sgd(model, {"mine": Wrong()})
    train(model, optimizer, 1)
    before = [*values(model.parameters()), *averages(optimizer, "mine")]
    with pytest.raises(ValueError, match=r"`rules\['mine'\]\.weight\(1\)` must be in \[0, 1\]"):
        optimizer.step()
    assert same([*model.parameters(), *averages(optimizer, "mine")], before)
    assert optimizer.param_groups[0]["averaging_steps"] == 1
