"""Compiled steps and swaps compute what eager ones do, and are not compiled for ever."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from training import (
    MODES,
    assert_averages_of,
    assert_same_averages,
    assert_same_steps,
    averaging_sgd,
    everything,
    in_place,
    loss_of_batch,
    same,
    small_model,
    train,
    values,
)

from averaging_optim import EMA, SWA, T_ADEMA, AveragingOptimizer, Rule

STEPS = 30

RULES: dict[str, dict[str, Rule]] = {
    "ema": {"ema": EMA(0.9)},
    "swa": {"swa": SWA()},
    "t_adema": {"t_adema": T_ADEMA(0.9, 10)},
    "every_second": {"swa": SWA(every=2)},
    "all": {"ema": EMA(0.9), "swa": SWA(), "t_adema": T_ADEMA(0.9, 10)},
}


def sgd(model: nn.Module) -> Optimizer:
    # foreach: in some versions of torch compiling a plain step rounds otherwise than eager.
    return SGD(model.parameters(), lr=0.1, momentum=0.9, foreach=True)


def adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=torch.tensor(0.01))


class Compiled:
    """A compiled step, and the graphs that it took so far."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.graphs = 0
        self.step = torch.compile(optimizer.step, backend=self.count)

    def count(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Any:
        self.graphs += 1
        return graph.forward


@pytest.fixture(autouse=True)
def nothing_is_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def assert_compiled_alike(
    build: Callable[[nn.Module], Optimizer], rules: dict[str, Rule]
) -> list[int]:
    """Train with and without the wrapper, compiled, and return the graphs of each step.

    Some of torch's optimizers round otherwise when compiled, and so they do when wrapped.
    """
    bare_model, model = small_model(), small_model()
    bare, optimizer = build(bare_model), AveragingOptimizer(build(model), rules)
    # A learning rate that changes is a graph's input if it is a tensor.
    schedulers = [ExponentialLR(each, 0.99) for each in (bare, optimizer)] if build is adam else []
    compiled_bare, compiled = Compiled(bare), Compiled(optimizer)
    snapshots, graphs = [], []
    for number in range(STEPS):
        for trained, step in ((bare_model, compiled_bare.step), (model, compiled.step)):
            trained.zero_grad()
            loss_of_batch(trained, number).backward()
            step()
        for scheduler in schedulers:
            scheduler.step()
        assert same(model.parameters(), bare_model.parameters())
        snapshots.append(values(model.parameters()))
        graphs.append(compiled.graphs)
    assert_averages_of(optimizer, snapshots)
    return graphs


@pytest.mark.parametrize("build", [sgd, adam])
@pytest.mark.parametrize("rules", RULES.values(), ids=RULES)
def test_a_compiled_step_trains_and_averages_alike_and_takes_few_graphs(
    rules: dict[str, Rule], build: Callable[[nn.Module], Optimizer]
) -> None:
    graphs = assert_compiled_alike(build, rules)
    assert 1 <= graphs[4] == graphs[-1] <= 4


def test_a_rule_that_starts_late_takes_one_graph_more_when_it_does() -> None:
    graphs = assert_compiled_alike(sgd, {"ema": EMA(0.9), "swa": SWA(start=9)})
    assert graphs[9] + 1 == graphs[-1] <= 4


def test_a_compiled_step_equals_the_eager_one_bit_for_bit() -> None:
    models = small_model(), small_model()
    eager, optimizer = (AveragingOptimizer(sgd(model), RULES["all"]) for model in models)
    compiled = Compiled(optimizer)
    for number in range(STEPS):
        for model, step in zip(models, (eager.step, compiled.step), strict=True):
            model.zero_grad()
            loss_of_batch(model, number).backward()
            step()
    assert same(models[0].parameters(), models[1].parameters())
    assert_same_averages(eager, optimizer)


with_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))), reason="inductor needs a C++ compiler"
)
# On a CPU the last, which is for CUDA graphs, compiles as inductor does by default.
BACKENDS = [
    pytest.param({"backend": "eager"}, id="eager"),
    pytest.param({"backend": "aot_eager"}, id="aot_eager"),
    pytest.param({"backend": "inductor"}, id="inductor", marks=with_compiler),
    pytest.param({"mode": "reduce-overhead"}, id="reduce_overhead", marks=with_compiler),
]
backends = pytest.mark.parametrize("options", BACKENDS)


@backends
@in_place
def test_a_function_with_a_swap_in_it_compiles_to_what_it_does_uncompiled(
    options: dict[str, Any], in_place: bool
) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.5))
    train(model, optimizer, 3)
    teacher, before = optimizer.averaged_model(model), everything(model, optimizer)
    batch = torch.randn(8, 3)

    def evaluate() -> tuple[Tensor, Tensor, Tensor]:
        weight = next(model.parameters()).view(-1)
        with torch.no_grad():
            with optimizer.swap_to_averaged(in_place=in_place):
                inside, averaged = weight.clone(), model(batch)
            return inside, averaged, model(batch)

    def alike(thing: Callable[..., Any]) -> Any:
        # So that what is expected has been rounded by the same kernels.
        with torch.no_grad():
            return torch.compile(thing, **options)(batch)

    expected = [next(teacher.parameters()).view(-1).clone(), alike(teacher), alike(model)]
    compiled = torch.compile(evaluate, **options)
    for _ in range(2):
        assert same(compiled(), expected)
        assert same(everything(model, optimizer), before)


@backends
@in_place
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("first", ["outside", "inside"])
def test_a_compiled_model_is_the_average_inside_and_the_weights_outside(
    first: str, mode: Callable[[], Any], in_place: bool, options: dict[str, Any]
) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.5))
    train(model, optimizer, 3)
    batch = torch.randn(8, 3)
    with mode():
        averaged, trained = (
            values([torch.compile(each, **options)(batch)])
            for each in (optimizer.averaged_model(model), model)
        )
        torch._dynamo.reset()
        compiled = torch.compile(model, **options)
        if first == "outside":
            assert same([compiled(batch)], trained)
        for _ in range(2):
            with optimizer.swap_to_averaged(in_place=in_place):
                assert same([compiled(batch)], averaged)
            assert same([compiled(batch)], trained)
    assert not same(averaged, trained)


def whole_step(model: nn.Module, optimizer: Optimizer) -> Callable[[Tensor], Tensor]:
    def step(batch: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = (model(batch) - 1).square().mean()
        value: Tensor = loss.detach()
        loss.backward()
        optimizer.step()
        return value

    return step


def train_by(step: Callable[[Tensor], Tensor], model: nn.Module) -> list[list[Tensor]]:
    """Return the weights, and the loss that led there, of each step."""
    generator = torch.Generator().manual_seed(0)
    batches = torch.randn(STEPS, 8, 3, generator=generator)
    return [[step(batch), *values(model.parameters())] for batch in batches]


@backends
@pytest.mark.parametrize("build", [sgd, adam])
def test_a_train_step_that_is_compiled_whole_trains_as_without_the_wrapper_and_averages(
    build: Callable[[nn.Module], Optimizer], options: dict[str, Any]
) -> None:
    bare_model, model = small_model(), small_model()
    bare, optimizer = build(bare_model), AveragingOptimizer(build(model), RULES["all"])
    snapshots = train_by(torch.compile(whole_step(model, optimizer), **options), model)
    torch._dynamo.reset()
    expected = train_by(torch.compile(whole_step(bare_model, bare), **options), bare_model)
    assert_same_steps(snapshots, expected)
    assert_averages_of(optimizer, [s[1:] for s in snapshots])


@pytest.mark.parametrize("options", BACKENDS[:2])
def test_a_train_step_that_is_compiled_whole_equals_the_eager_one(options: dict[str, Any]) -> None:
    models = small_model(), small_model()
    eager, optimizer = (AveragingOptimizer(sgd(model), RULES["all"]) for model in models)
    expected = train_by(whole_step(models[0], eager), models[0])
    snapshots = train_by(torch.compile(whole_step(models[1], optimizer), **options), models[1])
    assert_same_steps(snapshots, expected)
    assert_same_averages(optimizer, eager)


@pytest.mark.parametrize("is_wrapped", [False, True], ids=["bare", "wrapped"])
@pytest.mark.parametrize("build", [sgd, adam])
def test_a_step_that_must_be_one_graph_is_refused_by_torch_with_and_without_the_wrapper(
    build: Callable[[nn.Module], Optimizer], is_wrapped: bool
) -> None:
    optimizer = build(model := small_model())
    step = AveragingOptimizer(optimizer, EMA(0.9)).step if is_wrapped else optimizer.step
    loss_of_batch(model, 0).backward()
    with pytest.raises(torch._dynamo.exc.Unsupported):
        torch.compile(step, backend="eager", fullgraph=True)()


def own_hooks(optimizer: AveragingOptimizer, hook: Callable[..., None]) -> None:
    optimizer.register_step_pre_hook(hook)
    optimizer.register_step_post_hook(hook)


def hooks_of_wrapped(optimizer: AveragingOptimizer, hook: Callable[..., None]) -> None:
    optimizer.wrapped.register_step_pre_hook(hook)
    optimizer.wrapped.register_step_post_hook(hook)


@pytest.mark.parametrize("register", [own_hooks, hooks_of_wrapped])
def test_hooks_of_a_compiled_step_run_once_a_step(
    register: Callable[[AveragingOptimizer, Callable[..., None]], None],
) -> None:
    optimizer = averaging_sgd(model := small_model(), EMA(0.9))
    calls = []
    register(optimizer, lambda *_: calls.append(optimizer.n_averaged()))
    compiled = Compiled(optimizer)
    for number in range(3):
        model.zero_grad()
        loss_of_batch(model, number).backward()
        compiled.step()
    assert calls == ([0, 1, 1, 2, 2, 3] if register is own_hooks else [0, 0, 1, 1, 2, 2])


@with_compiler
def test_a_model_compiled_with_freezing_keeps_the_weights_that_it_was_compiled_with() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9))
    train(model, optimizer, 3)
    batch = torch.ones(2, 3)
    compiled = torch.compile(model.eval())
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        expected = compiled(batch)
        with optimizer.swap_to_averaged():
            assert torch.equal(compiled(batch), expected)
        model.load_state_dict(small_model().state_dict())
        assert torch.equal(compiled(batch), expected)
