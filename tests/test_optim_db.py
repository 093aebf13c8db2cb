"""Every optimizer that torch tests, in every configuration it is tested in, wrapped and bare.

What there is comes from torch's own database, so that a later torch brings its own cases.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db
from training import (
    as_it_is,
    assert_averages_of,
    assert_same_averages,
    assert_same_steps,
    through_a_file,
    through_pickle,
    values,
)

from averaging_optim import EMA, SWA, T_ADEMA, AveragingOptimizer, Rule

RULES: dict[str, Rule] = {
    "ema": EMA(0.9),
    "swa": SWA(start=1, every=2),
    "t_adema": T_ADEMA(0.9, 5),
}
# torch 2.15 says that it checks the sparse momenta of SGD when it loads them.
pytestmark = pytest.mark.filterwarnings("ignore:Validating sparse tensor invariants:UserWarning")

# Adagrad makes sparse tensors; torch warns unless it was told what it then does by default.
torch.sparse.check_sparse_tensor_invariants.disable()

SHAPES = [(4, 3), (2, 4)]  # matrices alone, as Muon takes nothing else


@dataclass(frozen=True, eq=False)
class Case:
    """One optimizer, one configuration, and the weights and gradients it is to work on."""

    info: OptimizerInfo
    name: str
    options: Mapping[str, Any]
    complex_weights: bool
    sparse_gradients: bool

    def __str__(self) -> str:
        return f"{self.info.name}-{self.name}"


def all_cases() -> Iterator[Case]:
    for info in optim_db:
        sparse = info.only_supports_sparse_grads
        yield from cases_of(info, "", complex_weights=False, sparse_gradients=sparse)
        if info.supports_complex:
            yield from cases_of(info, "-complex", complex_weights=True, sparse_gradients=sparse)
        if info.supports_sparse:
            yield from cases_of(info, "-sparse", complex_weights=False, sparse_gradients=True)


def cases_of(info: OptimizerInfo, suffix: str, **kind: bool) -> Iterator[Case]:
    # For a GPU torch lists more: `capturable`. Whether the CPU takes it, the optimizer says.
    for configuration in info.optim_inputs_func(device="cuda", dtype=torch.float32):
        name = configuration.desc.replace(" ", "_")
        for flag in ("", *info.supported_impls):
            options = configuration.kwargs | ({flag: True} if flag else {})
            yield Case(info, f"{name}-{flag or 'plain'}{suffix}", options, **kind)


def averaging(optimizer: Optimizer) -> AveragingOptimizer:
    return AveragingOptimizer(optimizer, RULES)


def weights_for(case: Case) -> list[nn.Parameter]:
    """Return the same weights at each call."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.complex64 if case.complex_weights else torch.float32
    # A differentiable step is recorded, and autograd forbids that on leaves that it tracks.
    tracked = not case.options.get("differentiable", False)
    return [
        nn.Parameter(torch.randn(shape, dtype=dtype, generator=generator), requires_grad=tracked)
        for shape in SHAPES
    ]


def bare(case: Case, weights: list[nn.Parameter]) -> Optimizer:
    build: Any = case.info.optim_cls
    optimizer: Optimizer = build(weights, **copy.deepcopy(dict(case.options)))
    return optimizer


def wrapped(case: Case, weights: list[nn.Parameter]) -> AveragingOptimizer:
    return averaging(bare(case, weights))


def train(
    case: Case,
    weights: list[nn.Parameter],
    optimizer: Optimizer,
    steps: int,
    first: int = 0,
    *,
    with_closure: bool = False,
) -> list[list[Tensor]]:
    """Return the weights after each step, and the loss that the step began with."""
    history = []
    for step in range(first, first + steps):

        def closure(step: int = step) -> Any:
            return put_gradients(case, weights, step)

        if with_closure or case.info.step_requires_closure:
            loss: Any = optimizer.step(closure)
        else:
            loss = closure()
            optimizer.step()
        history.append(values([*weights, loss]))
    return history


def put_gradients(case: Case, weights: list[nn.Parameter], step: int) -> Tensor:
    """Give each weight its gradient at this step, and return the loss."""
    generator = torch.Generator().manual_seed(step)
    points = [weight.detach().requires_grad_() for weight in weights]
    loss = torch.zeros(())
    for point in points:
        target = torch.randn(point.shape, dtype=point.dtype, generator=generator)
        loss = loss + (point - target).abs().square().sum()
    for weight, gradient in zip(weights, torch.autograd.grad(loss, points), strict=True):
        weight.grad = one_row_of(gradient, step) if case.sparse_gradients else gradient
    return loss.detach()


def one_row_of(gradient: Tensor, step: int) -> Tensor:
    """Return a sparse tensor that holds a single row, as an embedding's gradient does."""
    row = step % len(gradient)
    return (
        torch.zeros_like(gradient)
        .index_copy(0, torch.tensor([row]), gradient[row : row + 1])
        .to_sparse(1)
    )


def refusal(case: Case, wrap: Callable[[Optimizer], Optimizer]) -> str | None:
    """Return the error with which the first step or the construction ends, if any."""
    weights = weights_for(case)
    try:
        train(case, weights, wrap(bare(case, weights)), 1)
    except (AssertionError, RuntimeError, ValueError) as error:
        return repr(error)
    return None


CASES = list(all_cases())
# What the CPU, the weights or the gradients do not allow is what the bare optimizer refuses.
REFUSALS = {case: refusal(case, as_it_is) for case in CASES}
TAKEN = [case for case in CASES if REFUSALS[case] is None]
REFUSED = [case for case in CASES if REFUSALS[case] is not None]

taken = pytest.mark.parametrize("case", TAKEN, ids=str)


def started(
    case: Case, wrap: Callable[[Optimizer], Optimizer]
) -> tuple[list[nn.Parameter], Optimizer]:
    weights = weights_for(case)
    optimizer = wrap(bare(case, weights))
    train(case, weights, optimizer, 3)
    return weights, optimizer


def assert_same_training(case: Case, *runs: tuple[list[nn.Parameter], Optimizer]) -> None:
    """Go on from step 3 with each run, and compare the weights and losses of every step."""
    first, *others = [train(case, weights, optimizer, 3, first=3) for weights, optimizer in runs]
    for other in others:
        assert_same_steps(other, first)


def test_every_optimizer_of_torch_is_there() -> None:
    exported: set[Any] = {
        each
        for each in vars(torch.optim).values()
        if isinstance(each, type) and issubclass(each, Optimizer) and each is not Optimizer
    }
    assert {case.info.optim_cls for case in TAKEN} == exported


@pytest.mark.parametrize("info", optim_db, ids=lambda info: info.optim_cls.__name__)
def test_no_implementation_is_refused_as_a_whole(info: OptimizerInfo) -> None:
    taken_flags = {flag for case in TAKEN if case.info is info for flag in case.options}
    assert taken_flags >= set(info.supported_impls)
    assert any(case.info is info for case in TAKEN)


@pytest.mark.parametrize("with_closure", [False, True], ids=["step", "closure"])
@taken
def test_weights_and_losses_are_those_of_the_bare_optimizer(case: Case, with_closure: bool) -> None:
    bare_weights, weights = weights_for(case), weights_for(case)
    expected = train(case, bare_weights, bare(case, bare_weights), 6, with_closure=with_closure)
    history = train(case, weights, wrapped(case, weights), 6, with_closure=with_closure)
    assert_same_steps(history, expected)


@taken
def test_averages_are_the_recurrence_over_the_weights(case: Case) -> None:
    weights = weights_for(case)
    optimizer = wrapped(case, weights)
    snapshots = [step[:-1] for step in train(case, weights, optimizer, 6)]
    assert_averages_of(optimizer, snapshots)


@taken
def test_resuming_equals_never_stopping(case: Case) -> None:
    weights, optimizer = started(case, averaging)
    saved = through_a_file({"weights": values(weights), "optimizer": optimizer.state_dict()})
    resumed = [
        nn.Parameter(each, requires_grad=w.requires_grad)
        for each, w in zip(saved["weights"], weights, strict=True)
    ]
    loaded = wrapped(case, resumed)
    loaded.load_state_dict(saved["optimizer"])
    assert_same_training(case, (weights, optimizer), (resumed, loaded))
    assert_same_averages(loaded, optimizer)


DUPLICATES = pytest.mark.parametrize("duplicate", [copy.deepcopy, through_pickle])


@DUPLICATES
@taken
def test_copies_keep_the_averages(case: Case, duplicate: Any) -> None:
    _, optimizer = started(case, averaging)
    assert_same_averages(duplicate(optimizer), optimizer)


def copies_go_on(case: Case) -> bool:
    """Return whether a copy of the bare optimizer can take a step, which LBFGS's cannot."""
    weights, optimizer = copy.deepcopy(started(case, as_it_is))
    try:
        train(case, weights, optimizer, 1)
    except AttributeError:
        return False
    return True


@DUPLICATES
@pytest.mark.parametrize("case", [case for case in TAKEN if copies_go_on(case)], ids=str)
def test_copies_train_alike(case: Case, duplicate: Any) -> None:
    weights, optimizer = started(case, averaging)
    copied_weights, copied = duplicate((weights, optimizer))
    assert_same_training(case, (weights, optimizer), (copied_weights, copied))
    assert_same_averages(copied, optimizer)


@taken
def test_a_checkpoint_of_the_bare_optimizer_loads_with_one_warning(case: Case) -> None:
    weights, optimizer = started(case, as_it_is)
    other = copy.deepcopy(weights)
    loaded = wrapped(case, other)
    with pytest.warns(UserWarning, match="no average for 'ema', 'swa', 't_adema'") as caught:
        loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert len(caught) == 1
    assert_same_training(case, (weights, optimizer), (other, loaded))


@taken
def test_a_checkpoint_of_the_wrapper_loads_into_the_bare_optimizer(case: Case) -> None:
    weights, optimizer = started(case, averaging)
    other = copy.deepcopy(weights)
    loaded = bare(case, other)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert_same_training(case, (weights, optimizer), (other, loaded))


@pytest.mark.parametrize("case", REFUSED, ids=str)
def test_what_the_bare_optimizer_refuses_is_refused_in_its_words(case: Case) -> None:
    assert refusal(case, averaging) == REFUSALS[case]
