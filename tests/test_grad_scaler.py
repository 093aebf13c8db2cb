"""Under GradScaler a skipped step does not count; the others are the bare optimizer's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, Adam, Optimizer
from training import (
    assert_averages_of,
    assert_same_steps,
    gradients_of,
    loss_of_batch,
    same,
    small_model,
    values,
)

from averaging_optim import EMA, SWA, T_ADEMA, AveragingOptimizer, Rule

STEPS = 8
SKIPPED = {0, 3, 4}
RULES: dict[str, Rule] = {"ema": EMA(0.5), "swa": SWA(), "t_adema": T_ADEMA(0.9, 3)}


def train(
    build: Callable[..., Optimizer], unscale: bool, clip: bool
) -> tuple[Optimizer, list[list[Tensor]], list[float]]:
    """Return the optimizer, and the weights and the scale after each step."""
    model = small_model()
    optimizer = build(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
    history, scales = [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        scaled: Any = scaler.scale(loss_of_batch(model, step))
        scaled.backward()
        if step in SKIPPED:
            gradients_of(model)[0].fill_(torch.inf)
        if unscale:
            scaler.unscale_(optimizer)
        if clip:
            clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimizer)
        scaler.update()
        history.append(values(model.parameters()))
        scales.append(scaler.get_scale())
    return optimizer, history, scales


FLAGS = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}


@pytest.mark.parametrize(
    ("unscale", "clip"), [(False, False), (True, False), (True, True)], ids=["", "unscale", "clip"]
)
@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
@pytest.mark.parametrize("inner", [SGD, Adam])
def test_skipped_steps_do_not_count_and_the_others_are_those_of_the_bare_optimizer(
    inner: Callable[..., Optimizer], flags: dict[str, bool], unscale: bool, clip: bool
) -> None:
    def bare(parameters: Any) -> Optimizer:
        return inner(parameters, lr=0.01, **flags)

    def wrapped(parameters: Any) -> AveragingOptimizer:
        return AveragingOptimizer(bare(parameters), RULES)

    _, expected, expected_scales = train(bare, unscale, clip)
    optimizer, history, scales = train(wrapped, unscale, clip)
    assert_same_steps(history, expected)
    assert scales == expected_scales
    assert isinstance(optimizer, AveragingOptimizer)
    assert optimizer.param_groups[0]["averaging_steps"] == STEPS - len(SKIPPED)
    taken = [weights for step, weights in enumerate(history) if step not in SKIPPED]
    assert_averages_of(optimizer, taken)


def test_steps_are_skipped_and_weights_stay_finite() -> None:
    _, history, scales = train(lambda p: SGD(p, lr=0.01), unscale=False, clip=False)
    assert same(history[3], history[2])
    assert scales[3] < scales[2]
    assert all(weight.isfinite().all() for weight in history[-1])
