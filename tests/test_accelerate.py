"""Accelerate prepares, drives, saves and resumes the wrapper."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate_state import forget_accelerators
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset
from training import averages, everything, same, small_model, values

from averaging_optim import EMA, SWA, AveragingOptimizer, Rule

RULES: dict[str, Rule] = {"ema": EMA(0.9), "swa": SWA(start=2)}
BATCHES = 6


@pytest.fixture(autouse=True)
def _accelerate_as_in_a_new_process() -> None:
    forget_accelerators()


@dataclass
class Run:
    """What `prepare` returned, and what the optimizer wraps."""

    accelerator: Any
    model: nn.Module
    optimizer: Any
    loader: Any
    scheduler: Any

    @property
    def averaging(self) -> AveragingOptimizer:
        assert isinstance(self.optimizer.optimizer, AveragingOptimizer)
        return self.optimizer.optimizer

    def everything(self) -> list[Tensor]:
        return everything(self.model, self.averaging)


def start(
    wrap: Callable[[Optimizer], Optimizer] = lambda adam: AveragingOptimizer(adam, RULES),
    **arguments: Any,
) -> Run:
    torch.manual_seed(0)
    inputs = torch.randn(BATCHES * 4, 3)
    data = TensorDataset(inputs, inputs[:, :2] + torch.randn(BATCHES * 4, 2))
    # Dropout and shuffling make the state of the random numbers count.
    model = nn.Sequential(small_model(), nn.Dropout(0.1))
    optimizer = wrap(AdamW(model.parameters(), lr=0.01))
    accelerator = Accelerator(cpu=True, **arguments)
    prepared = accelerator.prepare(
        model, optimizer, DataLoader(data, batch_size=4, shuffle=True), StepLR(optimizer, 4, 0.5)
    )
    return Run(accelerator, *prepared)


def train_an_epoch(run: Run) -> list[list[Tensor]]:
    """Return the weights after each batch."""
    snapshots = []
    for inputs, targets in run.loader:
        with run.accelerator.accumulate(run.model):
            loss = (run.model(inputs) - targets).square().mean()
            run.accelerator.backward(loss)
            run.accelerator.clip_grad_norm_(run.model.parameters(), 1.0)
            run.optimizer.step()
            run.scheduler.step()
            run.optimizer.zero_grad()
        snapshots.append(values(run.model.parameters()))
    return snapshots


ARGUMENTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"mixed_precision": "bf16"},
    "accumulating": {"gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_resuming_from_a_saved_state_equals_never_stopping(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    run = start(**arguments)
    train_an_epoch(run)
    run.accelerator.save_state(str(tmp_path))
    train_an_epoch(run)
    expected, rates = run.everything(), run.scheduler.get_last_lr()

    resumed = start(**arguments)
    resumed.accelerator.load_state(str(tmp_path))
    train_an_epoch(resumed)
    assert same(resumed.everything(), expected)
    assert resumed.averaging.param_groups[0]["n_averaged_ema"] > 0
    assert resumed.scheduler.get_last_lr() == rates


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
def test_the_weights_train_as_with_the_plain_optimizer(arguments: dict[str, Any]) -> None:
    wrapped = train_an_epoch(start(**arguments))
    plain = train_an_epoch(start(lambda adam: adam, **arguments))
    assert len(wrapped) == BATCHES
    assert same(chain.from_iterable(wrapped), chain.from_iterable(plain))


def test_only_real_steps_count_when_gradients_are_accumulated() -> None:
    run = start(lambda adam: AveragingOptimizer(adam, EMA(0.9)), gradient_accumulation_steps=3)
    snapshots = train_an_epoch(run)
    group = run.averaging.param_groups[0]
    assert (group["averaging_steps"], group["n_averaged_ema"]) == (2, 2)
    expected = [a.lerp(b, 1 - 0.9) for a, b in zip(snapshots[2], snapshots[5], strict=True)]
    assert same(averages(run.averaging, "ema"), expected)


@pytest.mark.parametrize("name", RULES)
def test_the_prepared_model_is_evaluated_under_the_average(name: str) -> None:
    run = start()
    train_an_epoch(run)
    before = run.everything()
    with run.optimizer.optimizer.swap_to_averaged(name):
        unwrapped = run.accelerator.unwrap_model(run.model)
        assert same(unwrapped.parameters(), averages(run.averaging, name))
    assert same(run.everything(), before)


def test_the_optimizer_given_to_prepare_is_the_one_that_is_driven() -> None:
    given: list[AveragingOptimizer] = []

    def wrap(adam: Optimizer) -> Optimizer:
        given.append(AveragingOptimizer(adam, EMA(0.9)))
        return given[0]

    run = start(wrap)
    train_an_epoch(run)
    with given[0].swap_to_averaged():
        assert same(run.model.parameters(), averages(given[0], "ema"))


def test_an_optimizer_that_is_wrapped_twice_is_driven_once() -> None:
    once = start()
    train_an_epoch(once)
    twice = start()
    averaging = twice.averaging
    twice.optimizer = AcceleratedOptimizer(twice.optimizer)
    train_an_epoch(twice)
    assert averaging.n_averaged("ema") == BATCHES
    assert same(everything(twice.model, averaging), once.everything())


def test_averages_beside_the_optimizer_that_trains_are_saved_if_they_are_registered(
    tmp_path: Path,
) -> None:
    def start_beside() -> tuple[Run, AveragingOptimizer]:
        run = start(lambda adam: adam)
        beside = AveragingOptimizer.of(run.accelerator.unwrap_model(run.model), EMA(0.9))
        run.accelerator.register_for_checkpointing(beside)
        return run, beside

    run, beside = start_beside()
    train_an_epoch(run)
    beside.step()
    train_an_epoch(run)
    beside.step()
    run.accelerator.save_state(str(tmp_path))
    resumed, loaded = start_beside()
    resumed.accelerator.load_state(str(tmp_path))
    assert same(everything(resumed.model, loaded), everything(run.model, beside))
    assert loaded.n_averaged() == 2
    with loaded.swap_to_averaged():
        assert same(resumed.model.parameters(), averages(beside, "ema"))


def test_the_averaged_state_dict_of_the_prepared_model_loads_into_the_plain_one() -> None:
    run = start(dynamo_backend="eager")
    run.averaging.update_averages()
    plain = nn.Sequential(small_model(), nn.Dropout(0.1))
    assert run.model.state_dict().keys() != plain.state_dict().keys()
    plain.load_state_dict(run.averaging.averaged_state_dict(run.model, "ema"))
    assert same(plain.parameters(), averages(run.averaging, "ema"))


def test_a_model_saved_inside_the_swap_holds_the_average(tmp_path: Path) -> None:
    run = start()
    train_an_epoch(run)
    with run.optimizer.optimizer.swap_to_averaged("ema"):
        run.accelerator.save_model(run.model, str(tmp_path))
    saved = load_file(tmp_path / "model.safetensors")
    keys = list(run.accelerator.unwrap_model(run.model).state_dict())
    assert same([saved[key] for key in keys], averages(run.averaging, "ema"))
