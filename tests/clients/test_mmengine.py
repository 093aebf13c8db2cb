"""MMEngine."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner, ValLoop
from torch import Tensor, nn
from training import same

from clients.data import INPUTS, TARGETS
from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped

# MMEngine wants a name of its own for each runner of a process.
NUMBERS = count()
LOADER = {
    "batch_size": 16,
    "dataset": list(zip(INPUTS, TARGETS, strict=True)),
    "sampler": {"type": "DefaultSampler", "shuffle": True},
    "collate_fn": {"type": "default_collate"},
}


class Loss(BaseMetric):
    def process(self, batch: Any, losses: Any) -> None:
        self.results += losses

    def compute_metrics(self, losses: Any) -> Any:
        return {"loss": float(sum(losses) / len(losses))}


class AveragedValLoop(ValLoop):
    def run(self) -> Any:
        with self.runner.optim_wrapper.optimizer.swap_to_averaged():
            return super().run()


class Classifier(BaseModel):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))

    def forward(self, images: Tensor, labels: Tensor, mode: str = "tensor") -> Any:
        logits = self.layers(images)
        if mode == "loss":
            return {"loss": nn.functional.cross_entropy(logits, labels)}
        if mode == "predict":
            return [nn.functional.cross_entropy(logits, labels)]
        return logits


def runner(wrap: Wrap, folder: Path, epochs: int = 2, **arguments: Any) -> Any:
    model = Classifier()
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=0.01))
    return Runner(
        model,
        str(folder),
        train_dataloader=LOADER,
        train_cfg={"by_epoch": True, "max_epochs": epochs},
        optim_wrapper=OptimWrapper(optimizer, clip_grad={"max_norm": 1.0}),
        randomness={"seed": 0},
        experiment_name=f"run{next(NUMBERS)}",
        log_level="ERROR",
        **arguments,
    )


def finished(runner: Any) -> Run:
    runner.train()
    return Run(
        runner.model, runner.optim_wrapper.optimizer, lambda: runner.model(INPUTS, TARGETS).detach()
    )


def test_a_runner_trains_as_without_the_wrapper(tmp_path: Path) -> None:
    folders = iter((tmp_path / "plain", tmp_path / "wrapped"))
    check_driven(lambda wrap: finished(runner(wrap, next(folders))), steps=8)


def test_a_runner_resumes_from_its_last_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # MMEngine 0.10 loads checkpoints as torch did before 2.6.
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")

    def halves() -> Run:
        finished(runner(wrapped, tmp_path / "halves", epochs=1))
        return finished(runner(wrapped, tmp_path / "halves", resume=True))

    whole = seeded(lambda: finished(runner(wrapped, tmp_path / "whole")))
    check_resumed(seeded(halves), whole)


def test_the_best_checkpoint_of_an_averaged_validation_has_the_average(tmp_path: Path) -> None:
    run = finished(
        runner(
            wrapped,
            tmp_path,
            val_dataloader=LOADER,
            val_cfg={"type": AveragedValLoop},
            val_evaluator=[Loss()],
            default_hooks={"checkpoint": {"type": "CheckpointHook", "save_best": "loss"}},
        )
    )
    best = torch.load(next(tmp_path.glob("best_*2.pth")), weights_only=False)
    with run.optimizer.swap_to_averaged():
        assert same(best["state_dict"].values(), run.model.state_dict().values())
