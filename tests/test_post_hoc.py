"""Averages made after training, beside those that were really kept."""

from __future__ import annotations

import copy
import pickle
import re
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam
from training import averages, model_with_batch_norm, same, small_model, train, values

from averaging_optim import EMA, SWA, AveragingOptimizer, Formula, PowerEMA, Rule, describe
from averaging_optim.post_hoc import fit, reconstruct, window

STEPS = 512
TWO: dict[str, Rule] = {"narrow": PowerEMA.from_width(0.05), "wide": PowerEMA.from_width(0.1)}
WIDTHS = [0.03, 0.075, 0.15, 0.25]

Saved = list[dict[str, Any]]


def two_averages(model: nn.Module) -> AveragingOptimizer:
    return AveragingOptimizer(Adam(model.parameters(), lr=0.01), TWO)


def checkpoints_of(model: nn.Module, optimizer: AveragingOptimizer, number: int) -> Saved:
    """Train for `STEPS` steps in all, and return checkpoints taken at equal intervals."""
    saved = []
    for i in range(number):
        train(model, optimizer, STEPS // number, first=i * STEPS // number)
        saved.append(copy.deepcopy(optimizer.state_dict()))
    return saved


class Kept:
    """One run of which averages of all widths were kept, and 64 checkpoints of two of them."""

    def __init__(self) -> None:
        # A rule that is no PowerEMA is not made use of.
        kept = {str(width): Formula(PowerEMA.from_width(width).weight) for width in WIDTHS}
        self.model = small_model(torch.float64)
        adam = Adam(self.model.parameters(), lr=0.01)
        self.optimizer = AveragingOptimizer(adam, {**TWO, **kept})
        self.saved = checkpoints_of(self.model, self.optimizer, 64)

    def error(self, width: float, number: int) -> float:
        """Return how far the average is off, in parts of how far it is from the weights."""
        every_so_many = self.saved[64 // number - 1 :: 64 // number]
        found = reconstruct(every_so_many, self.model, width, self.optimizer)
        kept = averages(self.optimizer, str(width))
        return distance(found.values(), kept) / distance(self.model.parameters(), kept)


def distance(first: Iterable[Tensor], second: Iterable[Tensor]) -> float:
    differences = [
        (a - b).detach().double().reshape(-1) for a, b in zip(first, second, strict=True)
    ]
    return float(torch.cat(differences).norm())


@pytest.fixture(scope="module")
def kept() -> Kept:
    return Kept()


@pytest.mark.parametrize("width", WIDTHS)
def test_the_error_falls_as_checkpoints_grow_denser(kept: Kept, width: float) -> None:
    errors = [kept.error(width, number) for number in (4, 8, 16, 32, 64)]
    print(f"width {width}: " + ", ".join(f"{error:.1e}" for error in errors))
    for sparse, dense in pairwise(errors):
        assert dense < sparse
    assert errors[-1] < {0.03: 1e-3, 0.075: 1e-5, 0.15: 1e-4, 0.25: 5e-2}[width]


@pytest.mark.parametrize("width", WIDTHS)
def test_the_residual_is_the_distance_of_the_shares_of_all_steps(kept: Kept, width: float) -> None:
    saved = kept.saved[3::4]
    found = fit(saved, width, kept.optimizer)
    shares = torch.zeros(STEPS, dtype=torch.float64)
    for name, factors in found.coefficients.items():
        for factor, state_dict in zip(factors, saved, strict=True):
            n = state_dict["param_groups"][0][f"n_averaged_{name}"]
            shares[:n] += factor * torch.tensor(describe(kept.optimizer.rules[name], n).shares)
    wanted = torch.tensor(describe(PowerEMA.from_width(width), STEPS).shares)
    expected = float((shares - wanted).norm() / wanted.norm())
    assert found.residual == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("width", WIDTHS)
def test_half_the_interval_leaves_less_than_half_the_residual(kept: Kept, width: float) -> None:
    residuals = [fit(kept.saved[64 // k - 1 :: 64 // k], width, kept.optimizer) for k in (32, 64)]
    assert residuals[1].residual < residuals[0].residual / 2


@pytest.mark.parametrize(("name", "width"), [("narrow", 0.05), ("wide", 0.1)])
def test_a_width_that_was_kept_is_found_as_it_was(kept: Kept, name: str, width: float) -> None:
    found = fit(kept.saved[7::8], width, kept.optimizer)
    assert found.residual < 1e-6
    expected = {each: [float(each == name and i == 7) for i in range(8)] for each in TWO}
    for each, factors in found.coefficients.items():
        assert factors == pytest.approx(expected[each], abs=1e-9)
    result = reconstruct(kept.saved[7::8], kept.model, width, kept.optimizer)
    torch.testing.assert_close([*result.values()], averages(kept.optimizer, name))


def test_the_interval_between_updates_makes_no_difference() -> None:
    rules = {name: PowerEMA(rule.gamma, start=12, every=4) for name, rule in powers().items()}
    model = small_model()
    optimizer = AveragingOptimizer(Adam(model.parameters(), lr=0.01), rules)
    every_4th = fit(checkpoints_of(model, optimizer, 4), 0.15, optimizer)
    model = small_model()
    every = two_averages(model)
    saved = checkpoints_of(model, every, 4)
    for state_dict, n in zip(saved, (29, 61, 93, 125), strict=True):
        for group in state_dict["param_groups"]:
            group["n_averaged_narrow"] = group["n_averaged_wide"] = n
    assert every_4th == fit(saved, 0.15, every)


def powers() -> dict[str, PowerEMA]:
    return {name: rule for name, rule in TWO.items() if isinstance(rule, PowerEMA)}


@pytest.mark.parametrize("whole", [False, True], ids=["optimizer", "with_model"])
def test_files_are_checkpoints_too(whole: bool, tmp_path: Path) -> None:
    model = small_model()
    optimizer = two_averages(model)
    saved = checkpoints_of(model, optimizer, 4)
    paths: list[str | Path] = []
    for i, state_dict in enumerate(saved):
        path = tmp_path / f"{i}.pt"
        torch.save({"model": {}, "optimizer": state_dict} if whole else state_dict, path)
        paths.append(str(path) if i % 2 else path)
    expected = reconstruct(saved, model, 0.15, optimizer)
    found = reconstruct(paths, model, 0.15, optimizer)
    assert list(found) == list(expected)
    assert same(found.values(), expected.values())


class Executed:
    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return pytest.fail, ("a checkpoint ran code",)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    model = small_model()
    optimizer = two_averages(model)
    path = tmp_path / "evil.pt"
    torch.save({**optimizer.state_dict(), "more": Executed()}, path)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        reconstruct([path], model, 0.15, optimizer)


class OneAtATime(Sequence[Any]):
    """State dicts that are made when asked for, and how many there are at once."""

    def __init__(self, saved: Saved) -> None:
        self.saved = saved
        self.alive: weakref.WeakSet[Any] = weakref.WeakSet()
        self.most = 0

    def __len__(self) -> int:
        return len(self.saved)

    def __getitem__(self, index: Any) -> Any:
        made = copy.deepcopy(self.saved[index])
        self.alive.add(made["state"][0]["averaged_wide"])
        self.most = max(self.most, len(self.alive))
        return made


def test_no_more_than_two_checkpoints_are_in_memory_at_once() -> None:
    """The one that is looked at, and the one before until the next has been loaded."""
    model = small_model()
    optimizer = two_averages(model)
    saved = OneAtATime(checkpoints_of(model, optimizer, 8))
    reconstruct(saved, model, 0.15, optimizer)
    assert saved.most <= 2


def test_a_new_optimizer_over_a_new_model_is_as_good_as_that_of_the_run() -> None:
    model = small_model()
    optimizer = two_averages(model)
    saved = checkpoints_of(model, optimizer, 8)
    expected = reconstruct(saved, model, 0.15, optimizer)
    fresh = small_model(torch.bfloat16)
    untouched = two_averages(fresh)
    before, state_dict = values(fresh.parameters()), untouched.state_dict()
    found = reconstruct(saved, fresh, 0.15, untouched)
    assert same(found.values(), [value.bfloat16() for value in expected.values()])
    assert same(fresh.parameters(), before)
    assert untouched.state_dict() == state_dict
    fresh.load_state_dict(found)


def test_groups_in_another_order_than_the_models_are_told_apart() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    groups: list[dict[str, Any]] = [
        {"params": model[1].parameters()},
        {"params": model[2].parameters(), "average": False},
        {"params": model[0].parameters()},
    ]
    optimizer = AveragingOptimizer(SGD(groups, lr=0.01), TWO)
    saved = checkpoints_of(model, optimizer, 8)
    found = reconstruct(saved, model, 0.1, optimizer)
    expected = optimizer.averaged_state_dict(model, "wide")
    torch.testing.assert_close(found, expected)
    assert torch.equal(found["2.weight"], model.state_dict()["2.weight"])


def test_frozen_weights_and_buffers_are_what_they_are() -> None:
    model = model_with_batch_norm()
    model[0].requires_grad_(False)
    frozen = values(model[0].parameters())
    adam = Adam(model.parameters(), lr=0.01)
    optimizer = AveragingOptimizer(adam, TWO, buffers=model.buffers())
    assert optimizer.buffers == tuple(model.buffers())
    found = reconstruct(checkpoints_of(model, optimizer, 8), model, 0.1, optimizer)
    assert same([found["0.weight"], found["0.bias"]], frozen)
    assert found["1.num_batches_tracked"] == STEPS
    expected = optimizer.averaged_state_dict(model, "wide")
    torch.testing.assert_close(found["1.running_mean"], expected["1.running_mean"])


def test_a_mask_with_infinities_stays_one() -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("mask", torch.full((2, 2), -torch.inf).triu(1))
    adam = Adam(model.parameters(), lr=0.01)
    optimizer = AveragingOptimizer(adam, TWO, buffers=model.buffers())
    found = reconstruct(checkpoints_of(model, optimizer, 4), model, 0.03, optimizer)
    assert torch.equal(found["mask"], torch.full((2, 2), -torch.inf).triu(1))


def test_a_variance_that_falls_stays_one() -> None:
    """Narrower than the averages that were kept, so that the factors of some are below 0."""
    model = nn.Linear(3, 2)
    model.register_buffer("variance", torch.ones(3))
    adam = Adam(model.parameters(), lr=0.01)
    optimizer = AveragingOptimizer(adam, TWO, buffers=model)
    saved = []
    for step in range(64):
        model.variance = torch.full((3,), 1e-9 if step >= 56 else 1.0)
        optimizer.update_averages()
        if step % 16 == 15:
            saved.append(copy.deepcopy(optimizer.state_dict()))
    factors = fit(saved, 0.02, optimizer).coefficients
    assert min(min(each) for each in factors.values()) < 0
    found: Tensor = reconstruct(saved, model, 0.02, optimizer)["variance"]
    assert bool((found > 0).all())


def test_complex_weights_are_summed_too() -> None:
    model = nn.ParameterList([nn.Parameter(torch.zeros(2, dtype=torch.complex64))])
    optimizer = AveragingOptimizer(SGD(model.parameters(), lr=0.1), TWO)
    saved = []
    for step in range(64):
        with torch.no_grad():
            model[0].fill_(complex(step, -step))
        optimizer.update_averages()
        if step % 8 == 7:
            saved.append(copy.deepcopy(optimizer.state_dict()))
    found: Tensor = reconstruct(saved, model, 0.08, optimizer)["0"]
    number = 63 - describe(PowerEMA.from_width(0.08), 64).mean_age
    expected = torch.full_like(found, complex(number, -number))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)


def of_another_model(saved: Saved) -> Saved:
    saved[1]["state"][0]["averaged_narrow"] = torch.ones(5, 7)
    return saved


def out_of_order(saved: Saved) -> Saved:
    return [saved[1], saved[0]]


def with_one_twice(saved: Saved) -> Saved:
    return [saved[0], saved[0]]


def without_the_second_average(saved: Saved) -> Saved:
    for entry in saved[0]["state"].values():
        del entry["averaged_wide"]
    return saved


def of_a_plain_optimizer(saved: Saved) -> Saved:
    return [SGD(small_model().parameters(), lr=0.1).state_dict()]


def from_before_the_first_average(saved: Saved) -> Saved:
    return [two_averages(small_model()).state_dict(), *saved]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            of_another_model,
            "`checkpoints[1]` must match `optimizer`. `state[0]['averaged_narrow']` ",
        ),
        (
            out_of_order,
            "`checkpoints[1]` must be later than the one before it, got 256 ",
        ),
        (with_one_twice, "`checkpoints[1]` must be later than the one before it, got 256 "),
        (without_the_second_average, "`checkpoints[0]` must have updates of 'wide', got 0."),
        (of_a_plain_optimizer, "`checkpoints[0]` must have updates of 'narrow', got 0."),
        (from_before_the_first_average, "`checkpoints[0]` must have updates of 'narrow', got 0"),
        (lambda saved: [], "`checkpoints` must contain at least one, got none."),
        (lambda saved: [7], "`checkpoints[0]` must match `optimizer`. `state_dict` must be a dict"),
    ],
)
def test_checkpoints_of_other_rules_or_shapes_are_refused(
    spoil: Callable[[Saved], Any], message: str
) -> None:
    model = small_model()
    optimizer = two_averages(model)
    saved = spoil(checkpoints_of(model, optimizer, 2))
    with pytest.raises(ValueError, match=re.escape(message)):
        reconstruct(saved, model, 0.15, optimizer)


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"narrow": PowerEMA(17), "ema": EMA()}, "`optimizer` must keep two or more `PowerEMA`"),
        ({"a": PowerEMA(17), "b": PowerEMA(17)}, "`optimizer` must keep two or more `PowerEMA`"),
        ({"a": PowerEMA(17), "b": PowerEMA(7, every=2)}, "`optimizer` must have the same `start` "),
        ({"a": PowerEMA(17), "b": PowerEMA(7, start=2)}, "`optimizer` must have the same `start` "),
    ],
    ids=["one", "twice", "every", "start"],
)
def test_rules_that_allow_no_fit_are_refused(rules: dict[str, Rule], message: str) -> None:
    model = small_model()
    optimizer = AveragingOptimizer(Adam(model.parameters()), rules)
    train(model, optimizer, 8)
    with pytest.raises(ValueError, match=re.escape(message)):
        reconstruct([optimizer.state_dict()], model, 0.15, optimizer)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sigma_rel": 0}, ValueError, r"`sigma_rel` must be in \(0, 0\.2886\], got 0"),
        ({"sigma_rel": "1"}, TypeError, r"`sigma_rel` must be a number in \(0, 0\.2886\], got '1'"),
        ({"checkpoints": "run.pt"}, TypeError, r"`checkpoints` must be a sequence of state dicts "),
        ({"checkpoints": {"state": {}}}, TypeError, r"`checkpoints` must be a sequence of state "),
        ({"checkpoints": ["missing.pt"]}, FileNotFoundError, r"missing\.pt"),
        ({"model": 7}, TypeError, r"`model` must be a torch\.nn\.Module, got 7"),
        ({"model": nn.Linear(2, 2)}, ValueError, r"`model` must have parameters that this optim"),
        ({"optimizer": 7}, TypeError, r"`optimizer` must be an AveragingOptimizer, got 7"),
    ],
)
def test_wrong_arguments_are_refused(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = small_model()
    optimizer = two_averages(model)
    train(model, optimizer, 3)
    right: dict[str, Any] = {
        "checkpoints": [optimizer.state_dict()],
        "model": model,
        "sigma_rel": 0.15,
        "optimizer": optimizer,
    }
    with pytest.raises(error, match=message):
        reconstruct(**{**right, **arguments})


def with_a_mean(model: nn.Module, dtype: torch.dtype | None = None) -> AveragingOptimizer:
    sgd = SGD(model.parameters(), lr=0.1)
    return AveragingOptimizer(sgd, {"mean": SWA(), "ema": EMA(0.9)}, dtype=dtype)


def test_a_window_is_the_mean_of_the_weights_between_two_checkpoints() -> None:
    model = small_model()
    optimizer = with_a_mean(model, torch.float64)
    train(model, optimizer, 30)
    early = copy.deepcopy(optimizer.state_dict())
    snapshots = train(model, optimizer, 20, first=30)
    found = window([early, optimizer.state_dict()], model, optimizer, "mean")
    expected = [torch.stack(each).double().mean(0).float() for each in zip(*snapshots, strict=True)]
    # The average has been rounded 50 times in float64, and multiplied by 50 / 20.
    torch.testing.assert_close(list(found.values()), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("number", "name", "message"),
    [
        (2, "ema", r"`name` must be an average whose rule is SWA, got EMA"),
        (2, None, r"`name` must be one of 'mean', 'ema', got None"),
        (1, "mean", r"`checkpoints` must contain two, got 1\."),
        (3, "mean", r"`checkpoints` must contain two, got 3\."),
    ],
)
def test_a_window_of_anything_else_is_refused(number: int, name: str | None, message: str) -> None:
    model = small_model()
    optimizer = with_a_mean(model)
    saved = []
    for i in range(number):
        train(model, optimizer, 2, first=2 * i)
        saved.append(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ValueError, match=message):
        window(saved, model, optimizer, name)


def test_a_window_needs_an_averaging_optimizer() -> None:
    model = small_model()
    bare: Any = SGD(model.parameters())
    with pytest.raises(TypeError, match="`optimizer` must be an AveragingOptimizer, got SGD"):
        window([{}, {}], model, bare)
