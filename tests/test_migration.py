"""The recipes for coming from other libraries, run on what these have really saved."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ema_pytorch
import pytest
import torch
import torch_ema
from diffusers.training_utils import EMAModel
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from pages import PAGES, blocks
from peers import timm_model_ema
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import loss_of_batch, model_with_batch_norm, train, weights_of

from averaging_optim import EMA, AveragingOptimizer
from averaging_optim.integrations.lightning import EvaluateAveraged

BLOCKS = blocks(PAGES["docs/how-to/migration.md"])
UPDATES = 1000
BATCHES = 5


class Other:
    """A library's average, made as its own README makes it.

    Args:
        kept: what it saves.
        update: to be called after each step, with the number of steps so far.
        averages: the averaged parameters.
        before: steps before the checkpoint.
    """

    def __init__(
        self,
        kept: Any,
        update: Callable[[int], object],
        averages: Callable[[], Iterable[Tensor]],
        before: int = 5,
    ) -> None:
        self.kept, self.update, self.averages, self.before = kept, update, averages, before


def of_torch(model: nn.Module) -> Other:
    kept = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.999))
    return Other(kept, lambda _: kept.update_parameters(model), kept.module.parameters)


def of_timm(model: nn.Module) -> Other:
    kept = timm_model_ema().ModelEmaV3(model, decay=0.9999, use_warmup=True)
    return Other(kept, lambda steps: kept.update(model, steps), kept.module.parameters)


def of_ema_pytorch(model: nn.Module) -> Other:
    kept = ema_pytorch.EMA(model, beta=0.9999, update_after_step=100, update_every=10)
    return Other(kept, lambda _: kept.update(), kept.ema_model.parameters, before=121)


def of_torch_ema(model: nn.Module) -> Other:
    kept = torch_ema.ExponentialMovingAverage(model.parameters(), decay=0.995)
    return Other(kept, lambda _: kept.update(), lambda: kept.shadow_params)


def of_diffusers(model: nn.Module) -> Other:
    kept = EMAModel(model.parameters(), decay=0.9999)
    return Other(kept, lambda _: kept.step(model.parameters()), lambda: kept.shadow_params)


LIBRARIES = {
    "torch": of_torch,
    "timm": of_timm,
    "ema-pytorch": of_ema_pytorch,
    "torch-ema": of_torch_ema,
    "diffusers": of_diffusers,
}


def recipe(library: str) -> str:
    (found,) = [block for block in BLOCKS if block.startswith(f"# {library}\n")]
    return found


def assert_holds(optimizer: AveragingOptimizer, other: Other) -> None:
    kept = [optimizer.state[weight]["averaged_ema"] for weight in weights_of(optimizer)]
    # Each library rounds in its own way, a few times an update.
    torch.testing.assert_close(kept, list(other.averages()), rtol=1e-5, atol=1e-6)


def test_there_is_a_recipe_for_each_library() -> None:
    libraries = [block.splitlines()[0].removeprefix("# ") for block in BLOCKS[1:]]
    assert libraries == [*LIBRARIES, "lightning"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_average_of_another_library_continues_here(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_with_batch_norm()
    other = LIBRARIES[library](model)
    adam = Adam(model.parameters())
    for steps in range(1, other.before + 1):
        train(model, adam, 1, first=steps)
        other.update(steps)

    torch.save({"model": model.state_dict(), "ema": other.kept.state_dict()}, "run.pt")
    namespace: dict[str, Any] = {"model": model, "steps": other.before}
    for block in (BLOCKS[0], recipe(library)):
        exec(compile(block, "migration.md", "exec"), namespace)
    optimizer: AveragingOptimizer = namespace["optimizer"]
    assert_holds(optimizer, other)
    (rule,) = optimizer.rules.values()
    assert rule.every is not None
    for steps in range(other.before + 1, other.before + 1 + UPDATES * rule.every):
        train(model, optimizer, 1, first=steps)
        other.update(steps)
    assert_holds(optimizer, other)


class Module(LightningModule):
    """Trains on numbered batches, with averages or without."""

    def __init__(self, is_averaging: bool) -> None:
        super().__init__()
        self.net = model_with_batch_norm()
        self.is_averaging = is_averaging

    def training_step(self, batch: Tensor) -> Tensor:
        return loss_of_batch(self.net, int(batch))

    def configure_optimizers(self) -> Optimizer:
        adam = Adam(self.parameters(), lr=0.01)
        if not self.is_averaging:
            return adam
        return AveragingOptimizer(adam, EMA(0.99), buffers=self)


def fit(module: Module, *callbacks: Callback, ckpt_path: str | None = None) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(each, ModelCheckpoint) for each in callbacks),
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        max_epochs=2,
    )
    trainer.fit(module, torch.arange(BATCHES), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_an_average_of_lightning_continues_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = Module(is_averaging=False)
    each_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(other, EMAWeightAveraging(decay=0.99), each_epoch)  # leaves the average in the model

    (tmp_path / "epoch=0.ckpt").rename("run.ckpt")
    with pytest.warns(UserWarning, match="no average for 'ema'"):
        exec(recipe("lightning"), {"model": Module(is_averaging=True), "torch": torch})
    model = Module(is_averaging=True)
    (optimizer,) = fit(model, EvaluateAveraged(), ckpt_path="averaging.ckpt").optimizers
    assert isinstance(optimizer, AveragingOptimizer)
    assert optimizer.param_groups[0]["n_averaged_ema"] == 2 * BATCHES
    averaged, expected = optimizer.averaged_state_dict(model), other.state_dict()
    counter = "net.1.num_batches_tracked"  # theirs stays at 1: an EMA of integers, rounded down
    assert (averaged.pop(counter), expected.pop(counter)) == (2 * BATCHES, 1)
    torch.testing.assert_close(averaged, expected, rtol=1e-6, atol=1e-7)
