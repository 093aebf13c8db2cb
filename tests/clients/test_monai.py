"""MONAI."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from monai.data import DataLoader, Dataset
from monai.engines import SupervisedTrainer
from monai.handlers import CheckpointLoader, CheckpointSaver
from monai.inferers import SimpleInferer
from monai.networks.nets import DenseNet
from torch import nn

from clients.data import INPUTS, TARGETS
from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped

IMAGES = INPUTS.reshape(-1, 1, 8, 8)
DATA = [{"image": image, "label": label} for image, label in zip(IMAGES, TARGETS, strict=True)]


def trainer(wrap: Wrap, epochs: int = 2) -> Any:
    network = DenseNet(2, 1, 10, init_features=4, growth_rate=2, block_config=(1,), bn_size=1)
    return SupervisedTrainer(
        device=torch.device("cpu"),
        max_epochs=epochs,
        train_data_loader=DataLoader(Dataset(DATA[:16]), batch_size=8),
        network=network,
        optimizer=wrap(torch.optim.Adam(network.parameters(), lr=0.01)),
        loss_function=nn.CrossEntropyLoss(),
    )


def finished(trainer: Any) -> Run:
    trainer.run()
    network = trainer.network.eval()
    return Run(network, trainer.optimizer, lambda: SimpleInferer()(IMAGES, network).detach())


def test_a_supervised_trainer_trains_as_without_the_wrapper() -> None:
    check_driven(lambda wrap: finished(trainer(wrap)), steps=4)


def test_a_supervised_trainer_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    def parts(trainer: Any) -> dict[str, Any]:
        return {"trainer": trainer, "network": trainer.network, "optimizer": trainer.optimizer}

    def halves() -> Run:
        first, second = trainer(wrapped, epochs=1), trainer(wrapped)
        saver = CheckpointSaver(
            str(tmp_path), parts(first), save_final=True, final_filename="half.pt"
        )
        saver.attach(first)
        first.run()
        CheckpointLoader(str(tmp_path / "half.pt"), parts(second)).attach(second)
        second.state.max_epochs = 2
        return finished(second)

    check_resumed(seeded(halves), seeded(lambda: finished(trainer(wrapped))))
