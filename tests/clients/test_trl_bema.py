"""A weighted sum of averages beside TRL's callback for the bias-corrected EMA, in one trainer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from training import values
from transformers import Trainer, TrainerCallback
from transformers_runs import DATA, arguments_for, language_model
from trl import BEMACallback

from averaging_optim import EMA, AveragingOptimizer, Formula, Rule

LAG, MULTIPLIER, EMA_POWER, BIAS_POWER = 10.0, 1.0, 0.5, 0.2


def bema_share(n_averaged: int) -> float:
    return math.pow(LAG + MULTIPLIER * n_averaged, -EMA_POWER)


class Beside(TrainerCallback):
    """Keeps after each step what TRL has, and what the sum is of ours."""

    def __init__(self, trl: BEMACallback, optimizer: AveragingOptimizer) -> None:
        self.trl = trl
        self.optimizer = optimizer
        self.pairs: list[tuple[list[Tensor], list[Tensor]]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        alpha = (LAG + MULTIPLIER * state.global_step) ** -BIAS_POWER
        weights = [each for group in self.optimizer.param_groups for each in group["params"]]
        with self.optimizer.swap_to_averaged({"ema": 1, "first": -alpha, "weights": alpha}):
            self.pairs.append((values(weights), values(self.trl.running_model.parameters())))


def test_the_sum_is_the_model_of_trls_callback_after_every_step(tmp_path: Path) -> None:
    model = language_model()
    rules: dict[str, Rule] = {"ema": Formula(bema_share), "first": EMA(decay=1)}
    optimizer = AveragingOptimizer(AdamW(model.parameters(), lr=0.01), rules)
    optimizer.update_averages()  # TRL's EMA begins at the initial weights too
    trl = BEMACallback(
        update_freq=1, lag=LAG, multiplier=MULTIPLIER, ema_power=EMA_POWER, bias_power=BIAS_POWER
    )
    beside = Beside(trl, optimizer)
    trainer = Trainer(
        model,
        arguments_for(tmp_path, max_steps=100),
        train_dataset=DATA,
        callbacks=[trl, beside],
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)),
    )
    trainer.train()
    assert len(beside.pairs) == 100
    ours, theirs = zip(*beside.pairs, strict=True)
    # Each rounds in its own way, some times an update.
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
