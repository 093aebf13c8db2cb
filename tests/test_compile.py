"""A compiled step computes what the eager one does, and is not compiled for ever."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import ExponentialLR
from training import averages, loss_of_batch, recurrence, same, small_model, values

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
    for name, rule in rules.items():
        assert same(averages(optimizer, name), recurrence(rule, snapshots))
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
    for name in RULES["all"]:
        assert same(averages(eager, name), averages(optimizer, name))
