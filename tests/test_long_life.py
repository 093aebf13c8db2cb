"""How far averages are from exact arithmetic after a million updates.

An update in a dtype of unit roundoff u (half an ulp of 1) is off by u · (largest weight) and a few
parts in 1/share of that. What is left of these after n updates is
    EMA:  u / (1 − decay)    the share of each error falls by `decay` with every update
    SWA:  u · n / 2          the i-th error has the share i / n in the end
times the largest weight, if all had one sign. They do if an average stands still: where share ·
difference is below half an ulp of it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from training import averages

from averaging_optim import EMA, SWA, AveragingOptimizer, Rule

UPDATES = 10**6
DECAY = 0.99999
RULES: dict[str, Rule] = {"ema": EMA(DECAY), "swa": SWA()}
SHARED = {"ema": 1 / (1 - DECAY), "swa": UPDATES / 2}
COURSES = ["jump", "ramp", "settling", "noise", "little_noise", "walk"]
# The last holds what the first does: an average in double precision of such weights.
WEIGHTS = [torch.float32, torch.bfloat16, torch.float64]


def courses(dtype: torch.dtype) -> Tensor:
    """Return the value of each weight, a column, at each update, a row."""
    generator = torch.Generator().manual_seed(0)
    i = torch.arange(UPDATES, dtype=torch.float64)
    noise = torch.randn(UPDATES, generator=generator, dtype=torch.float64)
    columns = [
        (i > 0).double(),
        1 + i / UPDATES,
        1 + torch.exp(-10 * i / UPDATES),
        1 + 0.01 * noise,
        1 + 1e-4 * noise,
        1 + 1e-4 * noise.cumsum(0),
    ]
    return torch.stack(columns, 1).float().to(dtype)


def exact(values: Tensor) -> dict[str, list[float]]:
    """Return the averages of each column: sums without rounding, of products in float64."""
    columns = values.double().T.numpy()
    ages = np.arange(UPDATES - 1, -1, -1)
    ema = (1 - DECAY) * DECAY**ages
    ema[0] = DECAY ** (UPDATES - 1)
    return {
        "ema": [math.fsum(ema * column) for column in columns],
        "swa": [math.fsum(column) / UPDATES for column in columns],
    }


@pytest.fixture(scope="module")
def lives() -> dict[torch.dtype, dict[str, Any]]:
    """Return, for each dtype of weights, their values and averages after a million updates."""
    values = [courses(dtype) for dtype in WEIGHTS]
    weights = [nn.Parameter(each[0].clone()) for each in values]
    optimizer = AveragingOptimizer(SGD(weights, lr=0.1), RULES)
    for present in zip(*(each.unbind() for each in values), strict=True):
        for weight, value in zip(weights, present, strict=True):
            weight.data = value
        optimizer.update_averages()
    kept = {name: averages(optimizer, name) for name in RULES}
    return {
        dtype: {"values": values[i], **{name: kept[name][i] for name in RULES}}
        for i, dtype in enumerate(WEIGHTS)
    }


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", WEIGHTS, ids=str)
def test_a_million_updates_stay_within_the_documented_error(
    lives: dict[torch.dtype, dict[str, Any]], dtype: torch.dtype, name: str
) -> None:
    average, values = lives[dtype][name], lives[dtype]["values"].double()
    assert average.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    unit_roundoff = torch.finfo(average.dtype).eps / 2
    # A thousandth more for the parts in 1/share.
    bounds = 1.001 * unit_roundoff * SHARED[name] * values.abs().amax(0)
    errors = (average.double() - torch.tensor(exact(values)[name], dtype=torch.float64)).abs()
    assert dict(zip(COURSES, (errors <= bounds).tolist(), strict=True)) == dict.fromkeys(
        COURSES, True
    )


def test_an_average_stands_still_where_its_increment_is_below_half_an_ulp(
    lives: dict[torch.dtype, dict[str, Any]],
) -> None:
    """From 0 towards weights of 1: half an ulp of numbers below 1 is 2⁻²⁵ in float32."""
    rest = 1 - lives[torch.float32]["ema"][0].item()
    # One increment more or less, of a hundred-thousandth of the rest.
    assert rest == pytest.approx(2**-25 / (1 - DECAY), rel=2e-2)
    assert 1 - lives[torch.float64]["ema"][0].item() == pytest.approx(DECAY ** (UPDATES - 1))
