"""TorchRL's Trainer drives, saves and resumes the wrapper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torchrl.checkpoint import Checkpoint
from torchrl.collectors import Collector
from torchrl.envs import GymEnv
from torchrl.modules import QValueActor
from torchrl.objectives import DQNLoss
from torchrl.trainers import Trainer

from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped


def trainer(wrap: Wrap, checkpoint: Path | None = None) -> Any:
    environment: Any = GymEnv("CartPole-v1")
    environment.set_seed(0)
    network = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    actor: Any = QValueActor(network, in_keys=["observation"], spec=environment.action_spec)
    loss = DQNLoss(actor, action_space=environment.action_spec, delay_value=False)
    loss.make_value_estimator()
    return Trainer(
        collector=Collector(environment, actor, frames_per_batch=16, total_frames=-1),
        total_frames=64,
        frame_skip=1,
        optim_steps_per_batch=2,
        loss_module=loss,
        optimizer=wrap(torch.optim.Adam(loss.parameters(), lr=0.01)),
        progress_bar=False,
        checkpoint=Checkpoint() if checkpoint else None,
        save_trainer_file=checkpoint,
    )


def trained(trainer: Any) -> Run:
    trainer.train()
    actor = trainer.loss_module.value_network
    observations = torch.linspace(-1, 1, 20).reshape(5, 4)

    def evaluate() -> Any:
        with trainer.loss_module.value_network_params.to_module(actor):
            _, values_of_actions, _ = actor(observation=observations)
            return values_of_actions.detach()

    return Run(trainer.loss_module, trainer.optimizer, evaluate)


def test_a_trainer_trains_as_without_the_wrapper() -> None:
    check_driven(lambda wrap: trained(trainer(wrap)), steps=8)


def test_a_trainer_takes_up_what_it_has_saved(tmp_path: Path) -> None:
    saving, loading = trainer(wrapped, tmp_path / "half"), trainer(wrapped)
    run = seeded(lambda: trained(saving))
    loading.load_from_file(tmp_path / "half")
    check_resumed(Run(loading.loss_module, loading.optimizer, run.evaluate), run)
