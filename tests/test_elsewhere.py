"""Models that something else trains: what `AveragingOptimizer.of` averages, and master weights."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim import SGD, Optimizer
from training import (
    averages,
    averaging_sgd,
    everything,
    first_layer,
    loss_of_batch,
    model_with_batch_norm,
    same,
    small_model,
    train,
    values,
)

from averaging_optim import EMA, SWA, T_ADEMA, AveragingOptimizer, Rule

RULES: dict[str, Rule] = {"ema": EMA(0.9), "swa": SWA(start=2, every=2), "ramp": T_ADEMA(0.9)}


def train_elsewhere(
    model: nn.Module, optimizer: Optimizer, averaged: AveragingOptimizer, steps: int, first: int = 0
) -> None:
    for step in range(first, first + steps):
        train(model, optimizer, 1, first=step)
        averaged.step()


class TestOf:
    @pytest.mark.parametrize("name", RULES)
    def test_averages_are_those_of_the_wrapped_optimizer(self, name: str) -> None:
        model, other = model_with_batch_norm(), model_with_batch_norm()
        wrapped = averaging_sgd(model, RULES, buffers=model)
        train(model, wrapped, 7)
        averaged = AveragingOptimizer.of(other, RULES)
        train_elsewhere(other, SGD(other.parameters(), lr=0.1, momentum=0.9), averaged, 7)
        found = averaged.averaged_state_dict(other, name)
        assert same(found.values(), wrapped.averaged_state_dict(model, name).values())

    def test_a_step_counts_without_gradients(self) -> None:
        averaged = AveragingOptimizer.of(small_model(), EMA(0.9))
        averaged.step()
        assert averaged.n_averaged() == 1

    def test_a_step_leaves_weights_and_gradients_as_they_are(self) -> None:
        model = small_model()
        loss_of_batch(model, 0).backward()
        held = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
        before = values(held)
        AveragingOptimizer.of(model, EMA(0.9)).step()
        assert same(held, before)

    def test_a_closure_is_called(self) -> None:
        assert AveragingOptimizer.of(small_model(), EMA(0.9)).step(lambda: 2.5) == 2.5

    def test_the_step_that_initialises_a_distributed_checkpoint_does_not_count(self) -> None:
        model = small_model()
        averaged = AveragingOptimizer.of(model, EMA(0.9))
        get_optimizer_state_dict(model, averaged)
        assert averaged.n_averaged() == 0

    def test_a_resumed_run_is_the_run_that_never_stopped(self) -> None:
        model = model_with_batch_norm()
        sgd = SGD(model.parameters(), lr=0.1)
        averaged = AveragingOptimizer.of(model, RULES)
        train_elsewhere(model, sgd, averaged, 4)
        saved = copy.deepcopy((model.state_dict(), averaged.state_dict()))
        train_elsewhere(model, sgd, averaged, 4, first=4)

        resumed = model_with_batch_norm()
        again = AveragingOptimizer.of(resumed, RULES)
        resumed.load_state_dict(saved[0])
        again.load_state_dict(saved[1])
        train_elsewhere(resumed, SGD(resumed.parameters(), lr=0.1), again, 4, first=4)
        assert same(everything(resumed, again), everything(model, averaged))

    def test_options_are_those_of_the_constructor(self) -> None:
        model = model_with_batch_norm()
        averaged = AveragingOptimizer.of(
            model,
            EMA(0.9),
            use_buffers=False,
            exclude=lambda weight: weight.ndim == 1,
            dtype=torch.bfloat16,
            device="cpu",
            rounding="stochastic",
            skip_nonfinite=True,
        )
        averaged.step()
        with torch.no_grad():
            first_layer(model).weight[0, 0] = float("nan")
        averaged.step()
        assert averaged.param_groups[0]["n_skipped"] == 1
        state = averaged.state_dict()
        kept = {**state["state"], **state.get("averaged_parameters", {})}
        found = [entry["averaged_ema"] for entry in kept.values() if "averaged_ema" in entry]
        assert [(each.ndim, each.dtype) for each in found] == [(2, torch.bfloat16)] * 2

    @pytest.mark.parametrize(
        ("model", "error", "message"),
        [
            (torch.ones(1), TypeError, "`model` must be a torch.nn.Module, got tensor"),
            (nn.ReLU(), ValueError, "parameters that are not empty, got a ReLU of 0 empty ones."),
            (nn.PReLU(0), ValueError, "got a PReLU of 1 empty ones. DeepSpeed's ZeRO-3"),
        ],
        ids=["no_model", "no_parameters", "empty_parameters"],
    )
    def test_what_cannot_be_averaged_is_refused(
        self, model: Any, error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            AveragingOptimizer.of(model, EMA(0.9))


def in_float32(optimizer: Optimizer) -> None:
    """Let the optimizer train a float32 copy of each parameter."""
    for group in optimizer.param_groups:
        group["params"] = [nn.Parameter(each.detach().float()) for each in group["params"]]


def in_one_flat(optimizer: Optimizer) -> None:
    """Let the optimizer train a flat copy of each group."""
    for group in optimizer.param_groups:
        flat = torch.cat([each.detach().reshape(-1) for each in group["params"]])
        group["params"] = [nn.Parameter(flat.float())]


def of_the_first(optimizer: Optimizer) -> None:
    """Let the optimizer train a copy of the first parameter."""
    parameters = optimizer.param_groups[0]["params"]
    parameters[0] = nn.Parameter(parameters[0].detach().clone())


def step_of_copies(model: nn.Module, copies: list[Tensor], optimizer: Optimizer) -> None:
    """Step as optimizers with master weights do, and write the copies into the model."""
    for copied in copies:
        copied.grad = torch.ones_like(copied)
    optimizer.step()
    vector_to_parameters(parameters_to_vector(copies), model.parameters())


class TestMasterWeights:
    @pytest.mark.parametrize("copied", [in_float32, in_one_flat, of_the_first])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_training_copies_warns_once(
        self, copied: Callable[[Optimizer], None], dtype: torch.dtype
    ) -> None:
        model = small_model(dtype)
        optimizer = averaging_sgd(model, EMA(0.9))
        copied(optimizer)
        optimizer.step()
        with (
            pytest.warns(UserWarning, match=r"took the place.*`AveragingOptimizer.of\(model"),
            optimizer.swap_to_averaged(),
        ):
            pass
        with optimizer.swap_to_averaged():
            pass

    def test_training_copies_warns_before_training_too(self) -> None:
        model = small_model()
        optimizer = averaging_sgd(model, EMA(0.9))
        in_one_flat(optimizer)
        with (
            pytest.warns(UserWarning, match="1 parameters took the place"),
            optimizer.swap_to_averaged(),
        ):
            pass

    def test_a_call_that_is_given_the_model_is_refused(self) -> None:
        model = small_model()
        optimizer = averaging_sgd(model, EMA(0.9))
        in_one_flat(optimizer)
        optimizer.step()
        with pytest.raises(ValueError, match="If the optimizer trains copies of the weights"):
            optimizer.averaged_state_dict(model)

    def test_wrapping_an_optimizer_of_copies_with_the_model_is_refused(self) -> None:
        model = small_model()
        sgd = SGD(model.parameters(), lr=0.1)
        in_one_flat(sgd)
        with pytest.raises(ValueError, match="`buffers` must be the model that the optimizer trai"):
            AveragingOptimizer(sgd, EMA(0.9), buffers=model)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_of_averages_the_model_however_its_weights_are_trained(
        self, dtype: torch.dtype
    ) -> None:
        model = small_model(dtype)
        sgd = SGD(model.parameters(), lr=0.125)
        in_one_flat(sgd)
        averaged, copies = AveragingOptimizer.of(model, SWA()), sgd.param_groups[0]["params"]
        snapshots = []
        for _ in range(4):
            step_of_copies(model, copies, sgd)
            averaged.step()
            snapshots.append(values(model.parameters()))
        expected = [torch.stack(each).float().mean(0) for each in zip(*snapshots, strict=True)]
        # Four terms of a mean are rounded once each.
        torch.testing.assert_close(averages(averaged, "swa"), expected, rtol=1e-6, atol=1e-7)


def resized(model: nn.Sequential, optimizer: Optimizer) -> Optimizer:
    """Replace the last layer by a wider one, as for a new task."""
    old = list(model[2].parameters())
    model[2] = nn.Linear(4, 5)
    kept = [p for p in optimizer.param_groups[0]["params"] if not any(p is each for each in old)]
    optimizer.param_groups[0]["params"] = [*kept, *model[2].parameters()]
    return optimizer


def cast(model: nn.Sequential, optimizer: Optimizer) -> Optimizer:
    """Cast the model such that its parameters are others, and give these to the optimizer."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
    optimizer.param_groups[0]["params"] = list(model.parameters())
    return optimizer


def extended(model: nn.Sequential, optimizer: Optimizer) -> Optimizer:
    model.append(nn.Linear(2, 2))
    optimizer.add_param_group({"params": iter(model[3].parameters())})
    return optimizer


def frozen_and_replaced(model: nn.Sequential, optimizer: Optimizer) -> Optimizer:
    """Freeze the first layer, and train another that is put after it."""
    model[0].requires_grad_(False)
    model.insert(1, nn.Linear(4, 4))
    trained = [each for each in model.parameters() if each.requires_grad]
    optimizer.param_groups[0]["params"] = trained
    return optimizer


class TestOtherParameters:
    @pytest.mark.parametrize(
        "changed",
        [
            resized,
            cast,
            extended,
            frozen_and_replaced,
            pytest.param(lambda _, optimizer: copy.deepcopy(optimizer), id="deepcopy"),
            pytest.param(lambda _, optimizer: pickle.loads(pickle.dumps(optimizer)), id="pickle"),
        ],
    )
    def test_other_parameters_that_are_not_copies_do_not_warn(
        self, changed: Callable[[nn.Sequential, Optimizer], AveragingOptimizer]
    ) -> None:
        model = small_model()
        optimizer = changed(model, averaging_sgd(model, EMA(0.9)))
        optimizer.step()
        with optimizer.swap_to_averaged():  # a warning is an error here
            pass

    def test_parameters_replaced_in_training_do_not_warn(self) -> None:
        model = small_model()
        optimizer = averaging_sgd(model, EMA(0.9))
        train(model, optimizer, 1)
        old = optimizer.param_groups[0]["params"]
        optimizer.param_groups[0]["params"] = [nn.Parameter(each.detach()[:1]) for each in old]
        with optimizer.swap_to_averaged():
            pass
