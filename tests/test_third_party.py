"""What holds for every optimizer that is wrapped, whoever wrote it.

Twenty of them by default; all that third_party.py finds with `--all-optimizers`. What the bare
optimizer cannot do is not asked: such a test is skipped, with the reason.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest
import torch
from tally import CASE, NOT_ASKED, NOT_RUNNABLE
from third_party import (
    STEPS,
    Case,
    Run,
    Trial,
    all_cases,
    begun,
    chosen_cases,
    in_one_line,
    trial_of,
    with_closure,
    with_outputs,
)
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, StepLR
from training import as_it_is, frozen, recurrence, same, through_a_file, through_any_file, values

from averaging_optim import EMA, SWA, AveragingOptimizer, Rule

pytestmark = [
    # The first layer is given data, which needs no gradient.
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
    # Second derivatives need a graph, which goes when the gradients are reset.
    pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True:UserWarning"),
    # The bare ones say so of some options, and take them.
    pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning"),
    pytest.mark.filterwarnings("ignore:Parameter .foreach. is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:You are using weight_decay up to:UserWarning"),
]

RULES: dict[str, Rule] = {"ema": EMA(0.9), "swa": SWA(start=1, every=2)}
HALF = STEPS // 2
Wrap = Callable[[Any], Any]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        every = metafunc.config.getoption("--all-optimizers")
        metafunc.parametrize("case", all_cases() if every else chosen_cases(), ids=str)


@pytest.fixture(autouse=True)
def _on_one_thread_and_uncompiled() -> Iterator[None]:
    """Take small steps fast: threads would wait for each other, and some compile each step."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.compiler.set_stance("force_eager"):
        yield
    torch.set_num_threads(threads)


@pytest.fixture
def trial(case: Case, record_property: Callable[[str, object], None]) -> Trial:
    """Return what the bare optimizer does, if it does anything here."""
    record_property(CASE, str(case))
    trial = trial_of(case)
    if trial.reason:
        pytest.skip(f"{NOT_RUNNABLE}: {trial.reason}")
    return trial


def averaging(optimizer: Any) -> AveragingOptimizer:
    # What trains in its backward pass does so past `step`, which `start` and `every` count.
    past_step = hasattr(optimizer, "fused_backward")
    return AveragingOptimizer(optimizer, {"ema": EMA(0.9, every=None)} if past_step else RULES)


def not_asked(reason: str) -> NoReturn:
    pytest.skip(f"{NOT_ASKED}: the bare optimizer {reason}")


def averages(run: Run) -> dict[str, list[Tensor]]:
    return {name: average(run, name) for name in run.optimizer.rules}


def average(run: Run, name: str) -> list[Tensor]:
    with run.optimizer.swap_to_averaged(name):
        return values(run.model.parameters())


def assert_averages_of(run: Run, weights: list[list[Tensor]]) -> None:
    for name, each in averages(run).items():
        assert same(each, recurrence(RULES[name], weights)), name


def all_same(first: list[list[Tensor]], second: list[list[Tensor]]) -> bool:
    return all(same(one, other) for one, other in zip(first, second, strict=True))


def test_there_are_twenty_that_run_here() -> None:
    reasons = {str(case): trial_of(case).reason for case in chosen_cases()}
    assert len(reasons) == 20
    assert {name: reason for name, reason in reasons.items() if reason} == {}


def test_the_weights_are_those_of_the_bare_optimizer(case: Case, trial: Trial) -> None:
    assert all_same(begun(case, trial.step, averaging).train(STEPS), trial.weights)


def test_the_averages_are_the_recurrence_over_the_weights(case: Case, trial: Trial) -> None:
    run = begun(case, trial.step, averaging)
    assert_averages_of(run, run.train(STEPS))


def test_a_swap_is_undone_and_training_continues_as_without_a_swap(
    case: Case, trial: Trial
) -> None:
    run = begun(case, trial.step, averaging)
    before = run.train(HALF)
    with run.optimizer.swap_to_averaged("ema"):
        assert same(run.model.parameters(), recurrence(RULES["ema"], before))
    assert same(run.model.parameters(), before[-1])
    assert all_same(run.train(STEPS - HALF, first=HALF), trial.weights[HALF:])


def resumed(case: Case, trial: Trial, wrap: Wrap, *, weights_only: bool) -> Run:
    """Train half of the steps, save, and return a new run with all that was saved loaded."""
    run = begun(case, trial.step, wrap)
    run.train(HALF)
    saved = run.model.state_dict(), run.optimizer.state_dict()
    model, optimizer = through_a_file(saved) if weights_only else through_any_file(saved)
    new = begun(case, trial.step, wrap)
    new.model.load_state_dict(model)
    new.optimizer.load_state_dict(optimizer)
    return new


def goes_on(run: Run, trial: Trial) -> bool:
    return all_same(run.train(STEPS - HALF, first=HALF), trial.weights[HALF:])


@pytest.mark.parametrize("weights_only", [False, True], ids=["any", "weights_only"])
def test_resuming_equals_never_stopping(case: Case, trial: Trial, weights_only: bool) -> None:
    try:
        if not goes_on(resumed(case, trial, as_it_is, weights_only=weights_only), trial):
            not_asked("resumes otherwise than it would have gone on")
    except Exception as error:
        not_asked(f"does not resume: {in_one_line(error)}")
    run = resumed(case, trial, averaging, weights_only=weights_only)
    assert goes_on(run, trial)
    assert_averages_of(run, trial.weights)


def copied(case: Case, trial: Trial, wrap: Wrap) -> Run:
    run = begun(case, trial.step, wrap)
    run.train(HALF)
    return Run(*copy.deepcopy((run.model, run.optimizer)), trial.step)


def test_a_copy_trains_alike(case: Case, trial: Trial) -> None:
    try:
        if not goes_on(copied(case, trial, as_it_is), trial):
            not_asked("goes on otherwise as a copy")
    except Exception as error:
        not_asked(f"cannot be copied: {in_one_line(error)}")
    run = copied(case, trial, averaging)
    assert goes_on(run, trial)
    assert_averages_of(run, trial.weights)


def scheduled(
    run: Run, schedule: Callable[[Any], LRScheduler]
) -> tuple[list[Any], list[list[Tensor]]]:
    """Return the learning rates and the weights of a run that a scheduler drives."""
    scheduler = schedule(run.optimizer)
    rates, weights = [], []
    for number in range(STEPS):
        weights += run.train(1, first=number)
        scheduler.step()
        rates.append([group.get("lr") for group in run.optimizer.param_groups])
    return rates, weights


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(lambda optimizer: LambdaLR(optimizer, lambda n: 1 / (n + 1)), id="LambdaLR"),
        pytest.param(lambda optimizer: StepLR(optimizer, 2), id="StepLR"),
    ],
)
def test_schedulers_drive_it_as_the_bare_optimizer(
    case: Case, trial: Trial, schedule: Callable[[Any], LRScheduler]
) -> None:
    try:
        expected = scheduled(begun(case, trial.step), schedule)
    except Exception as error:
        not_asked(f"takes no scheduler: {in_one_line(error)}")
    rates, weights = scheduled(begun(case, trial.step, averaging), schedule)
    assert frozen(rates) == frozen(expected[0])
    assert all_same(weights, expected[1])


def test_a_step_with_a_closure_returns_what_the_bare_one_returns(case: Case, trial: Trial) -> None:
    step = with_outputs if trial.step is with_outputs else with_closure
    bare, run = begun(case, step), begun(case, step, averaging)
    try:
        expected = [bare.step(bare, number) for number in range(HALF)]
    except Exception as error:
        not_asked(f"takes no closure: {in_one_line(error)}")
    assert frozen([run.step(run, number) for number in range(HALF)]) == frozen(expected)
    assert same(run.model.parameters(), bare.model.parameters())


@pytest.mark.parametrize("method", ["step", "zero_grad"])
def test_signatures_show_what_the_bare_one_takes(case: Case, trial: Trial, method: str) -> None:
    # GradScaler looks for `grad_scaler` in that of `step`, Accelerate for `set_to_none`.
    bare, optimizer = (begun(case, trial.step, wrap).optimizer for wrap in (as_it_is, averaging))
    assert parameters_of(getattr(optimizer, method)) >= parameters_of(getattr(bare, method))


def parameters_of(method: Any) -> set[str]:
    return set(inspect.signature(method).parameters)


@pytest.mark.parametrize("options", [{}, {"set_to_none": False}], ids=["default", "to_zero"])
def test_zero_grad_leaves_the_gradients_as_the_bare_one_does(
    case: Case, trial: Trial, options: dict[str, bool]
) -> None:
    bare = begun(case, trial.step)
    try:
        expected = zeroed(bare, options)
    except Exception as error:
        not_asked(f"takes other arguments: {in_one_line(error)}")
    assert frozen(zeroed(begun(case, trial.step, averaging), options)) == frozen(expected)


def zeroed(run: Run, options: dict[str, bool]) -> list[Tensor | None]:
    run.backward(0)
    run.optimizer.zero_grad(**options)
    return [weight.grad for weight in run.model.parameters()]


# What the wrapper has itself, as torch's optimizers do.
OF_ANY_OPTIMIZER = {"defaults", "param_groups", "state"}


def attributes_of(optimizer: Any) -> list[str]:
    """Return the names of the public attributes that hold values and can be written."""
    members = [item for cls in type(optimizer).__mro__ for item in vars(cls).items()]
    properties = {name for name, each in members if isinstance(each, property) and each.fset}
    return sorted(
        name
        for name in {*vars(optimizer), *properties} - OF_ANY_OPTIMIZER
        if not name.startswith("_") and not callable(getattr(optimizer, name))
    )


def test_attributes_are_read_from_the_wrapped_optimizer(case: Case, trial: Trial) -> None:
    optimizer = begun(case, trial.step, averaging).optimizer
    names = attributes_of(optimizer.wrapped)
    assert [n for n in names if getattr(optimizer, n) is not getattr(optimizer.wrapped, n)] == []


def test_attributes_are_written_to_the_wrapped_optimizer(case: Case, trial: Trial) -> None:
    optimizer = begun(case, trial.step, averaging).optimizer
    written = {name: object() for name in attributes_of(optimizer.wrapped)}
    for name, value in written.items():
        setattr(optimizer, name, value)
    assert {name: getattr(optimizer.wrapped, name) for name in written} == written
