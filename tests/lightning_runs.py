"""Runs of Lightning's Trainer that several files of tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from training import (
    averages,
    averaging_sgd,
    everything,
    loss_of_batch,
    saved_averages,
    small_model,
    values,
)

from averaging_optim import EMA, AveragingOptimizer, Rule

BATCHES = 6


class Numbers:
    """Yields the numbers of an epoch's batches, and can go on within an epoch."""

    def __init__(self) -> None:
        self.following = 0

    def __len__(self) -> int:
        return BATCHES

    def __iter__(self) -> Iterator[int]:
        self.following %= BATCHES
        while self.following < BATCHES:
            self.following += 1
            yield self.following - 1

    def state_dict(self) -> dict[str, int]:
        return {"following": self.following}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.following = state_dict["following"]


class Module(LightningModule):
    """Trains on numbered batches, and keeps the weights that each evaluation step sees."""

    def __init__(
        self,
        rule: Rule | dict[str, Rule] | None = None,
        *,
        dtype: torch.dtype | None = None,
        crash_at: tuple[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.net = small_model()
        self.rule = rule or EMA(0.9)
        self.average_dtype = dtype
        self.crash_at = crash_at
        self.seen: list[list[Tensor]] = []

    def configure_optimizers(self) -> Any:
        optimizer = averaging_sgd(self.net, self.rule, dtype=self.average_dtype)
        scheduler = {"scheduler": StepLR(optimizer, 1, 0.9), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}

    def training_step(self, batch: int) -> Tensor:
        number = self.current_epoch * BATCHES + batch
        self.crash("train", number)
        return loss_of_batch(self.net, number)

    def validation_step(self, batch: int) -> None:
        self.seen.append(values(self.parameters()))
        self.crash("validate", len(self.seen))
        self.log("loss", loss_of_batch(self.net, 1000), batch_size=1)

    def test_step(self, batch: int) -> None:
        self.seen.append(values(self.parameters()))

    def predict_step(self, batch: int) -> Tensor:
        self.seen.append(values(self.parameters()))
        return loss_of_batch(self.net, 1000)

    def crash(self, stage: str, number: int) -> None:
        if self.crash_at == (stage, number):
            raise ArithmeticError("crashed on purpose")


class Adversaries(Module):
    """Trains two networks with an optimizer each, stepping by hand."""

    def __init__(self, *, crash_at: tuple[str, int] | None = None) -> None:
        super().__init__(crash_at=crash_at)
        self.automatic_optimization = False
        self.other = small_model()

    def configure_optimizers(self) -> Any:
        return [averaging_sgd(self.net, EMA(0.9)), averaging_sgd(self.other, EMA(0.5))]

    def training_step(self, batch: int) -> Tensor:
        loss = super().training_step(batch)
        losses = [loss, loss_of_batch(self.other, batch)]
        optimizers: Any = self.optimizers()
        for optimizer, each in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            self.manual_backward(each)
            optimizer.step()
        return loss


def trainer_with(*callbacks: Callback, **arguments: Any) -> Trainer:
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any(isinstance(each, Checkpoint) for each in callbacks),
        "num_sanity_val_steps": 0,
        "max_epochs": 2,
    }
    return Trainer(callbacks=list(callbacks), **{**quiet, **arguments})


def fit(trainer: Trainer, module: LightningModule, **arguments: Any) -> None:
    trainer.fit(module, Numbers(), range(2), **arguments)


def averaging_optimizers(trainer: Trainer) -> list[AveragingOptimizer]:
    return [each for each in trainer.optimizers if isinstance(each, AveragingOptimizer)]


def all_averages(trainer: Trainer, name: str = "ema") -> list[Tensor]:
    return [each for one in averaging_optimizers(trainer) for each in averages(one, name)]


def all_there_is(module: nn.Module, trainer: Trainer) -> list[Tensor]:
    """Return the weights and what the optimizers hold: averages, momenta, counters."""
    return [each for one in averaging_optimizers(trainer) for each in everything(module, one)]


def averages_in(path: str | Path, name: str = "ema") -> list[Tensor]:
    states = torch.load(path, weights_only=True)["optimizer_states"]
    return [each for state in states for each in saved_averages(state, name)]


def weights_in(path: str | Path) -> list[Tensor]:
    weights: dict[str, Tensor] = torch.load(path, weights_only=True)["state_dict"]
    return list(weights.values())


def each_step(directory: Path) -> ModelCheckpoint:
    return ModelCheckpoint(directory, "{step}", every_n_train_steps=1, save_top_k=-1)


def each_epoch(directory: Path, *, save_weights_only: bool = False) -> ModelCheckpoint:
    return ModelCheckpoint(directory, "{epoch}", save_top_k=-1, save_weights_only=save_weights_only)


def uninterrupted(module: Module, **arguments: Any) -> list[Tensor]:
    trainer = trainer_with(**arguments)
    fit(trainer, module)
    return all_there_is(module, trainer)
