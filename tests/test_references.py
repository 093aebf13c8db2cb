"""Rules beside the libraries they are taken from, at every update from the first one on."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import ema_pytorch
import pytest
import torch
import torch_ema
from diffusers.training_utils import EMAModel
from peers import timm_model_ema
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from training import averages, averaging_sgd, small_model, train

from averaging_optim import EMA, SWA, PowerRamp, Rule, TFRamp

UPDATES = 300

# How to update it after so many steps, and what it keeps.
Reference = tuple[Callable[[int], object], Callable[[], Iterable[Tensor]]]


def averaged_model(model: nn.Module, **options: Any) -> Reference:
    kept = AveragedModel(model, **options)
    return lambda _: kept.update_parameters(model), kept.module.parameters


def model_ema_v3(model: nn.Module, **options: Any) -> Reference:
    kept = timm_model_ema().ModelEmaV3(model, **options)
    return lambda steps: kept.update(model, steps), kept.module.parameters


def ema_of_ema_pytorch(model: nn.Module, **options: Any) -> Reference:
    kept = ema_pytorch.EMA(model, update_after_step=0, update_every=1, **options)
    return lambda _: kept.update(), kept.ema_model.parameters


def ema_of_diffusers(model: nn.Module, **options: Any) -> Reference:
    kept = EMAModel(model.parameters(), **options)
    return lambda _: kept.step(model.parameters()), lambda: kept.shadow_params


RAMP = EMA(0.99, warmup=PowerRamp(gamma=2.0, power=0.75))
REFERENCES = {
    "torch_swa_avg_fn": (SWA(), averaged_model, {}),
    "torch_ema_avg_fn": (EMA(0.99), averaged_model, {"avg_fn": get_ema_avg_fn(0.99)}),
    "timm": (EMA(0.99), model_ema_v3, {"decay": 0.99}),
    "timm_warmup": (
        RAMP,
        model_ema_v3,
        {"decay": 0.99, "use_warmup": True, "warmup_gamma": 2.0, "warmup_power": 0.75},
    ),
    "diffusers": (EMA(0.99, warmup=TFRamp()), ema_of_diffusers, {"decay": 0.99}),
    "diffusers_warmup": (
        RAMP,
        ema_of_diffusers,
        {"decay": 0.99, "use_ema_warmup": True, "inv_gamma": 2.0, "power": 0.75},
    ),
    "ema_pytorch": (RAMP, ema_of_ema_pytorch, {"beta": 0.99, "inv_gamma": 2.0, "power": 0.75}),
}


@pytest.mark.parametrize(("rule", "reference", "options"), REFERENCES.values(), ids=REFERENCES)
def test_a_rule_is_its_reference_after_every_update(
    rule: Rule, reference: Callable[..., Reference], options: dict[str, Any]
) -> None:
    model = small_model()
    update, kept = reference(model, **options)
    optimizer = averaging_sgd(model, {"one": rule})
    for steps in range(1, UPDATES + 1):
        train(model, optimizer, 1, first=steps)
        update(steps)
        # Each library rounds in its own way, a few times an update.
        torch.testing.assert_close(averages(optimizer, "one"), list(kept()), rtol=1e-5, atol=1e-6)


def test_the_ramp_of_torch_ema_is_that_of_an_average_begun_at_the_same_weights() -> None:
    model = small_model()
    reference = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.99)
    optimizer = averaging_sgd(model, EMA(0.99, warmup=TFRamp()))
    optimizer.update_averages()
    for steps in range(1, UPDATES + 1):
        train(model, optimizer, 1, first=steps)
        reference.update()
        # Each library rounds in its own way, a few times an update.
        torch.testing.assert_close(
            averages(optimizer, "ema"), reference.shadow_params, rtol=1e-5, atol=1e-6
        )
