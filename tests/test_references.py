"""Rules beside their sources, at every update from the first one on.

A source that is no package, or none that can be installed here, is its formula in float64.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import ema_pytorch
import pytest
import pytorch_optimizer
import torch
import torch_ema
from diffusers.training_utils import EMAModel
from dog import PolynomialDecayAverager
from peers import timm_model_ema
from torch import Tensor, nn
from torch.optim import SGD, Adam
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn
from training import averages, averaging_sgd, small_model, train, values

from averaging_optim import (
    EMA,
    LAWA,
    SWA,
    T_ADEMA,
    ExponentialRamp,
    HalfLifeFraction,
    Lookahead,
    PolynomialAverage,
    PowerEMA,
    PowerRamp,
    Rule,
    SwitchEMA,
    TFRamp,
)

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


def ema_of_torch_ema(model: nn.Module, **options: Any) -> Reference:
    kept = torch_ema.ExponentialMovingAverage(model.parameters(), **options)
    return lambda _: kept.update(), lambda: kept.shadow_params


def karras_ema(model: nn.Module, **options: Any) -> Reference:
    """Return ema-pytorch's, its count set back by the one that it is further than EDM2's."""
    kept = ema_pytorch.KarrasEMA(model, update_every=1, **options)
    kept.step.fill_(-1)
    return lambda _: kept.update(), kept.ema_model.parameters


def polynomial_decay_averager(model: nn.Module, **options: Any) -> Reference:
    kept = PolynomialDecayAverager(model, **options)
    return lambda _: kept.step(), kept.averaged_model.parameters


def first_moment_of_adam(model: nn.Module, decay: float) -> Reference:
    """Return Adam's, corrected for its bias, where the gradients are the weights."""
    gradients = [nn.Parameter(torch.zeros_like(weight)) for weight in model.parameters()]
    adam = Adam(gradients, betas=(decay, 0.999))

    def update(_: int) -> None:
        for each, weight in zip(gradients, model.parameters(), strict=True):
            each.grad = weight.detach().clone()
        adam.step()

    def corrected() -> list[Tensor]:
        states = [adam.state[each] for each in gradients]
        return [state["exp_avg"] / (1 - decay ** state["step"].item()) for state in states]

    return update, corrected


def formula(model: nn.Module, decay: Callable[[int], float]) -> Reference:
    """Return the average that begins at the weights there are now, and then has these decays.

    Args:
        decay: after so many updates, this one included.
    """
    kept = [weight.detach().double() for weight in model.parameters()]

    def update(steps: int) -> None:
        old, pairs = decay(steps), enumerate(values(model.parameters()))
        kept[:] = [old * kept[i] + (1 - old) * weight.double() for i, weight in pairs]

    return update, lambda: [each.float() for each in kept]


def mean_of_the_last(model: nn.Module, k: int) -> Reference:
    last: deque[list[Tensor]] = deque(maxlen=k)
    return lambda _: last.append(values(model.parameters())), lambda: [
        torch.stack(each).double().mean(0).float() for each in zip(*last, strict=True)
    ]


def t_adema(updates: int, timescale: float = 1.0) -> float:
    """Of the code that is copied widely: the first update copies, and tanh counts the others."""
    return 0.9 * math.tanh((updates - 1) / timescale)


def edm2(updates: int, images: int = 128) -> float:
    """Equation 127 of EDM2 for the exponent that its text gives for a width of 0.1, 6.94."""
    return math.pow(1 - images / (updates * images), 6.94 + 1)


def torchtitan(updates: int) -> float:
    """The default of its configuration: 2^−20 of the initial weights stay at the first update."""
    return math.pow(2, -1 / (0.05 * updates))


def yolo(updates: int) -> float:
    return 0.99 * (1 - math.exp(-updates / 100))


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
    "adam": (EMA(0.99, debias=True), first_moment_of_adam, {"decay": 0.99}),
    "dog": (PolynomialAverage(eta=8), polynomial_decay_averager, {"gamma": 8}),
    "karras": (PowerEMA.from_width(0.1), karras_ema, {"sigma_rel": 0.1}),
    "edm2_formula": (PowerEMA(gamma=6.94), formula, {"decay": edm2}),
    "torchtitan_formula": (HalfLifeFraction(0.05), formula, {"decay": torchtitan}),
    "t_adema_formula": (T_ADEMA(alpha=0.9), formula, {"decay": t_adema}),
    "t_adema_slow_formula": (
        T_ADEMA(alpha=0.9, timescale=20),
        formula,
        {"decay": lambda updates: t_adema(updates, timescale=20)},
    ),
    "lawa_formula": (LAWA(k=5), mean_of_the_last, {"k": 5}),
}
# Which begin at the initial weights.
REFERENCES_FROM_THE_START = {
    "torch_ema": (EMA(0.99), ema_of_torch_ema, {"decay": 0.99, "use_num_updates": False}),
    "torch_ema_warmup": (EMA(0.99, warmup=TFRamp()), ema_of_torch_ema, {"decay": 0.99}),
    "yolo_formula": (ExponentialRamp(0.99, tau=100), formula, {"decay": yolo}),
}


CASES = [
    *(pytest.param(*each, False, id=name) for name, each in REFERENCES.items()),
    *(pytest.param(*each, True, id=name) for name, each in REFERENCES_FROM_THE_START.items()),
]


@pytest.mark.parametrize(("rule", "reference", "options", "from_the_start"), CASES)
def test_a_rule_is_its_reference_after_every_update(
    rule: Rule,
    reference: Callable[..., Reference],
    options: dict[str, Any],
    from_the_start: bool,
) -> None:
    model = small_model()
    update, kept = reference(model, **options)
    optimizer = averaging_sgd(model, {"one": rule})
    if from_the_start:
        optimizer.update_averages()
    for steps in range(1, UPDATES + 1):
        train(model, optimizer, 1, first=steps)
        update(steps)
        # Each library rounds in its own way, a few times an update.
        torch.testing.assert_close(averages(optimizer, "one"), list(kept()), rtol=1e-5, atol=1e-6)


# Rules by which training goes on from the average, each beside a run of its own. In float64, since
# two runs that round differently part a little more with each step.


def test_lookahead_trains_as_that_of_pytorch_optimizer() -> None:
    model, other = small_model(torch.float64), small_model(torch.float64)
    optimizer = averaging_sgd(model, Lookahead(alpha=0.8, every=6))
    sgd = SGD(other.parameters(), lr=0.1, momentum=0.9)
    reference = pytorch_optimizer.Lookahead(sgd, k=6, alpha=0.8)
    for step in range(UPDATES):
        train(model, optimizer, 1, first=step)
        train(other, reference, 1, first=step)
        slow = [reference.state[weight]["slow_params"] for weight in other.parameters()]
        expected = [*other.parameters(), *slow]
        # One interpolates from the average to the weights, the other the other way.
        torch.testing.assert_close(
            [*model.parameters(), *averages(optimizer, "lookahead")],
            expected,
            rtol=1e-9,
            atol=1e-12,
        )


def test_switch_ema_trains_as_its_paper_says_with_the_ema_of_torch() -> None:
    """It updates the EMA after each step, and copies it to the weights after each epoch."""
    model, other = small_model(torch.float64), small_model(torch.float64)
    optimizer = averaging_sgd(model, SwitchEMA(0.9, every=7))
    sgd = SGD(other.parameters(), lr=0.1, momentum=0.9)
    reference = AveragedModel(other, avg_fn=get_ema_avg_fn(0.9))
    reference.update_parameters(other)  # it begins at the initial weights
    for step in range(1, UPDATES + 1):
        train(model, optimizer, 1, first=step)
        train(other, sgd, 1, first=step)
        reference.update_parameters(other)
        if step % 7 == 0:
            other.load_state_dict(reference.module.state_dict())
        expected = [*other.parameters(), *reference.module.parameters()]
        # torch's formula rounds otherwise, a few times an update.
        torch.testing.assert_close(
            [*model.parameters(), *averages(optimizer, "switchema")],
            expected,
            rtol=1e-9,
            atol=1e-12,
        )
