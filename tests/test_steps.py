"""What counts as a step, told by real libraries, and what is told of training past `step`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from opacus.optimizers import DPOptimizer
from optimi import AdamW as OptimiAdamW
from optimi import prepare_for_gradient_release
from pytorch_optimizer import LOMO, SAM, Lookahead
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from training import (
    assert_same_steps,
    averages,
    first_layer,
    loss_of_batch,
    recurrence,
    same,
    small_model,
    values,
)
from transformers.optimization import Adafactor, AdafactorSchedule

from averaging_optim import EMA, SWA, AveragingOptimizer

LACKS = "The average 'ema' misses training steps"


def counts(optimizer: Any) -> tuple[int, int]:
    group = optimizer.param_groups[0]
    return group["averaging_steps"], group["n_averaged_ema"]


def backward(model: nn.Module, number: int) -> None:
    loss_of_batch(model, number).backward()


def test_a_micro_batch_of_accelerates_optimizer_does_not_count() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=4)
    model: Any = small_model()
    model, inner = accelerator.prepare(model, SGD(model.parameters(), lr=0.1))
    optimizer = AveragingOptimizer(inner, EMA(0.5))
    snapshots = []
    for number in range(16):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of_batch(model, number))
            optimizer.step()
            optimizer.zero_grad()
        if number % 4 == 3:
            snapshots.append(values(model.parameters()))
    assert counts(optimizer) == (4, 4)
    assert same(averages(optimizer, "ema"), recurrence(EMA(0.5), snapshots))


def test_a_physical_batch_of_opacus_optimizer_does_not_count() -> None:
    model = small_model()
    inner = DPOptimizer(
        SGD(model.parameters(), lr=0.1),
        noise_multiplier=0.0,
        max_grad_norm=1.0,
        expected_batch_size=8,
    )
    optimizer: Any = AveragingOptimizer(inner, EMA(0.5))
    taken = []
    for number in range(6):
        weights: Any = model.parameters()
        for weight in weights:
            weight.grad_sample = torch.ones(8, *weight.shape)
        # As opacus' BatchMemoryManager does for all but the last part of a batch.
        optimizer.signal_skip_step(do_skip=number % 3 != 2)
        before = values(model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        taken.append(not same(model.parameters(), before))
    assert taken == [False, False, True] * 2
    assert counts(optimizer) == (2, 2)


@pytest.mark.parametrize("outside", [True, False], ids=["outside", "inside"])
def test_a_noise_scheduler_of_opacus_reaches_the_optimizer(outside: bool) -> None:
    model = small_model()
    options: dict[str, Any] = {"max_grad_norm": 1.0, "expected_batch_size": 8}
    sgd: Any = SGD(model.parameters(), lr=0.1)
    if outside:
        inner = DPOptimizer(AveragingOptimizer(sgd, EMA()), noise_multiplier=1.0, **options)
        optimizer: Any = inner
    else:
        inner = DPOptimizer(sgd, noise_multiplier=1.0, **options)
        optimizer = AveragingOptimizer(inner, EMA())
    optimizer.noise_multiplier *= 0.5
    assert inner.noise_multiplier == optimizer.noise_multiplier == 0.5


def test_gradients_that_optimi_accumulates_do_not_count() -> None:
    model = small_model()
    inner = OptimiAdamW(model.parameters(), lr=0.01, gradient_release=True)
    prepare_for_gradient_release(model, inner)
    optimizer: Any = AveragingOptimizer(inner, EMA(0.5))
    snapshots = []
    for number in range(8):
        optimizer.optimizer_accumulation = number % 4 != 3
        backward(model, number)
        optimizer.step()
        optimizer.zero_grad()
        if number % 4 == 3:
            snapshots.append(values(model.parameters()))
    assert not same(*snapshots)
    assert counts(optimizer) == (2, 2)
    assert same(averages(optimizer, "ema"), recurrence(EMA(0.5), snapshots))


class ScalesItself(SGD):
    """An optimizer that is given the scaler and unscales by itself, as TransformerEngine's do."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None, *, grad_scaler: Any = None) -> Any:
        if grad_scaler is not None:
            state = grad_scaler._per_optimizer_states[id(self)]
            if state["stage"].name == "READY":
                grad_scaler.unscale_(self)
            if any(found.item() for found in state["found_inf_per_device"].values()):
                return None
        return super().step(closure)


@pytest.mark.parametrize("unscales_before", [True, False], ids=["unscaled", "scaled"])
@pytest.mark.parametrize("scheduled", [True, False], ids=["scheduled", "alone"])
@pytest.mark.filterwarnings("ignore:GradScaler is going to stop:FutureWarning")
def test_an_optimizer_that_is_given_the_grad_scaler_trains_as_the_bare_one(
    unscales_before: bool, scheduled: bool
) -> None:
    def run(is_wrapped: bool) -> tuple[list[list[Tensor]], Any]:
        model = small_model()
        optimizer: Any = ScalesItself(model.parameters(), lr=0.1)
        if is_wrapped:
            optimizer = AveragingOptimizer(optimizer, EMA(0.5))
        if scheduled:  # torch's schedulers replace `step` by a function
            LambdaLR(optimizer, lambda step: 1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        history = []
        for number in range(5):
            optimizer.zero_grad()
            scaled: Any = scaler.scale(loss_of_batch(model, number))
            scaled.backward()
            if number in (0, 3):
                first_layer(model).weight.grad = torch.full((4, 3), torch.inf)
            if unscales_before:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            history.append(values(model.parameters()))
        return history, optimizer

    expected, _ = run(is_wrapped=False)
    history, optimizer = run(is_wrapped=True)
    assert counts(optimizer) == (3, 3)
    optimizer.step(grad_scaler=None)
    assert_same_steps(history, expected)
    assert same(history[3], history[2])
    assert counts(optimizer) == (4, 4)


def test_a_step_at_a_displayed_learning_rate_of_0_that_moves_weights_counts() -> None:
    model = small_model()
    inner = Adafactor(model.parameters(), lr=None)
    AdafactorSchedule(inner)
    optimizer = AveragingOptimizer(inner, EMA(0.5))
    assert optimizer.param_groups[0]["lr"] == 0.0
    before = values(model.parameters())
    backward(model, 0)
    optimizer.step()
    assert not same(model.parameters(), before)
    assert counts(optimizer) == (1, 1)


@pytest.mark.parametrize(
    ("lr", "counted"),
    [
        (0, 0),
        (0.0, 0),
        (torch.tensor(0.0), 0),
        (1e-300, 1),
        (torch.tensor(0.1), 1),
        (None, 1),
        (torch.zeros((), device="meta"), 1),
    ],
    ids=["0", "0.0", "tensor_of_0", "1e-300", "tensor", "none", "on_a_device"],
)
def test_a_step_without_gradients_counts_unless_its_learning_rate_is_0_without_asking_a_device(
    lr: float | Tensor | None, counted: int
) -> None:
    optimizer = AveragingOptimizer(SGD(small_model().parameters(), lr=0.1), EMA(0.5))
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    assert optimizer.n_averaged() == counted


def test_the_first_step_of_a_warm_up_from_0_counts() -> None:
    model = small_model()
    optimizer = AveragingOptimizer(SGD(model.parameters(), lr=0.1), EMA(0.5))
    scheduler = LambdaLR(optimizer, lambda step: step / 4)
    for number in range(3):
        optimizer.zero_grad()
        backward(model, number)
        optimizer.step()
        scheduler.step()
    assert counts(optimizer) == (3, 3)


def sharpness_aware(model: nn.Module, optimizer: Any) -> None:
    backward(model, 0)
    optimizer.first_step(zero_grad=True)
    backward(model, 0)
    optimizer.second_step(zero_grad=True)


def past_the_wrapper(model: nn.Module, optimizer: Any) -> None:
    backward(model, 0)
    optimizer.wrapped.step()


def fused(model: nn.Module, optimizer: Any) -> None:
    optimizer.fused_backward(loss_of_batch(model, 0), lr=0.1)


def a_step(model: nn.Module, optimizer: Any) -> None:
    backward(model, 0)
    optimizer.step()


def past_the_wrapper_without_its_step(model: nn.Module, optimizer: Any) -> None:
    sharpness_aware(model, optimizer.wrapped)


Train = Callable[[nn.Module, Any], None]
PAST: dict[str, tuple[Callable[[nn.Module], Any], EMA, Train, str]] = {
    "sam": (lambda m: SAM(m.parameters(), SGD, lr=0.1), EMA(), sharpness_aware, "`second_step`"),
    "lomo": (lambda m: LOMO(m, lr=0.1), EMA(), fused, "`fused_backward`"),
    "inner_sam": (
        lambda m: SAM(m.parameters(), SGD, lr=0.1),
        EMA(),
        past_the_wrapper_without_its_step,
        "was trained, and not by",
    ),
    "inner": (lambda m: SGD(m.parameters(), lr=0.1), EMA(), past_the_wrapper, "the `step` of the"),
    "inner_adam": (lambda m: Adam(m.parameters()), EMA(), past_the_wrapper, "the `step` of the"),
    "on_demand": (lambda m: SGD(m.parameters()), EMA(every=None), a_step, "`every=None`"),
}
USES: dict[str, Callable[[AveragingOptimizer, nn.Module], object]] = {
    "swap": lambda optimizer, model: optimizer.swap_to_averaged().__enter__(),
    "export": lambda optimizer, model: optimizer.averaged_state_dict(model),
    "evaluation": lambda optimizer, model: optimizer.evaluate_averages(lambda: None),
    "model": lambda optimizer, model: optimizer.averaged_model(model),
}


@pytest.mark.parametrize("use", USES.values(), ids=USES)
@pytest.mark.parametrize(("build", "rule", "trains", "reason"), PAST.values(), ids=PAST)
def test_training_past_step_warns_once_at_the_first_use_of_the_average(
    build: Callable[[nn.Module], Any],
    rule: EMA,
    trains: Train,
    reason: str,
    use: Callable[[AveragingOptimizer, nn.Module], object],
) -> None:
    model = small_model()
    optimizer = AveragingOptimizer(build(model), rule)
    with optimizer.swap_to_averaged():  # a first validation, before any training, is silent
        pass
    before = values(model.parameters())
    trains(model, optimizer)
    assert not same(model.parameters(), before)
    with pytest.warns(UserWarning, match=f"{LACKS}.*{reason}.*`update_averages") as caught:
        use(optimizer, model)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.averaged_state_dict(model)


@pytest.mark.parametrize(("build", "rule", "trains", "reason"), PAST.values(), ids=PAST)
def test_update_averages_after_steps_taken_past_the_wrapper_averages_without_a_warning(
    build: Callable[[nn.Module], Any], rule: EMA, trains: Train, reason: str
) -> None:
    model = small_model()
    optimizer = AveragingOptimizer(build(model), rule)
    trains(model, optimizer)
    optimizer.update_averages()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exported = optimizer.averaged_state_dict(model)
    assert exported.keys() == model.state_dict().keys()


def do_nothing(model: nn.Module, optimizer: Any) -> None:
    pass


def load_weights(model: nn.Module, optimizer: Any) -> None:
    model.load_state_dict({key: value + 1 for key, value in model.state_dict().items()})


def load_everything(model: nn.Module, optimizer: Any) -> None:
    other = small_model()
    saved = Adam(other.parameters())
    backward(other, 0)
    saved.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there are no averages in it
        optimizer.load_state_dict(saved.state_dict())


def load_into_the_wrapped(model: nn.Module, optimizer: Any) -> None:
    other = small_model()
    saved = Adam(other.parameters())
    backward(other, 0)
    saved.step()
    optimizer.wrapped.load_state_dict(saved.state_dict())


@pytest.mark.parametrize(
    "act",
    [do_nothing, load_weights, load_everything, load_into_the_wrapped, a_step],
)
def test_changes_that_are_not_training_past_step_do_not_warn(act: Train) -> None:
    model = small_model()
    optimizer: Any = AveragingOptimizer(Adam(model.parameters()), EMA(start=100))
    act(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.averaged_state_dict(model)
        optimizer.evaluate_averages(lambda: None)


def test_averages_over_a_wrapped_lookahead_are_of_the_weights_that_training_continues_with() -> (
    None
):
    def build() -> tuple[nn.Module, Any]:
        model = small_model()
        inner: Optimizer = Lookahead(SGD(model.parameters(), lr=0.1), k=2)
        return model, inner

    bare_model, bare = build()
    model, inner = build()
    optimizer = AveragingOptimizer(inner, SWA())
    snapshots = []
    for number in range(5):
        for trained, by in ((bare_model, bare), (model, optimizer)):
            by.zero_grad()
            backward(trained, number)
            by.step()
        snapshots.append(values(bare_model.parameters()))
    assert same(model.parameters(), bare_model.parameters())
    kept = [optimizer.state[weight]["averaged_swa"] for weight in model.parameters()]
    assert same(kept, recurrence(SWA(), snapshots))
