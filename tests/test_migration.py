"""The recipes for coming from other libraries, run on what these have really saved."""

from __future__ import annotations

import re
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
from peers import timm_model_ema
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import loss_of_batch, model_with_batch_norm

from averaging_optim import EMA, AveragingOptimizer, PowerRamp, TFRamp
from averaging_optim.integrations.lightning import EvaluateAveraged

PAGE = (Path(__file__).parent.parent / "docs" / "how-to" / "migration.md").read_text()
BLOCKS: list[str] = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
DECAY = 0.99
UPDATES = 5


class Other:
    """A library's average: how to update it, what it saves, and its averaged parameters."""

    def __init__(
        self, kept: Any, update: Callable[[], object], averages: Callable[[], Iterable[Tensor]]
    ) -> None:
        self.kept, self.update, self.averages = kept, update, averages


def of_torch(model: nn.Module) -> Other:
    kept = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return Other(kept, lambda: kept.update_parameters(model), kept.module.parameters)


def of_timm(model: nn.Module) -> Other:
    kept = timm_model_ema().ModelEmaV3(model, decay=DECAY)
    return Other(kept, lambda: kept.update(model), kept.module.parameters)


def of_ema_pytorch(model: nn.Module) -> Other:
    kept = ema_pytorch.EMA(model, beta=DECAY, min_value=DECAY, update_after_step=0, update_every=1)
    return Other(kept, kept.update, kept.ema_model.parameters)


def of_torch_ema(model: nn.Module, use_num_updates: bool = False) -> Other:
    kept = torch_ema.ExponentialMovingAverage(model.parameters(), DECAY, use_num_updates)
    return Other(kept, kept.update, lambda: kept.shadow_params)


def of_diffusers(model: nn.Module) -> Other:
    kept = EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY)
    return Other(kept, lambda: kept.step(model.parameters()), lambda: kept.shadow_params)


LIBRARIES = {
    "torch": of_torch,
    "timm": of_timm,
    "ema-pytorch": of_ema_pytorch,
    "torch-ema": of_torch_ema,
    "diffusers": of_diffusers,
}


def step(model: nn.Module, number: int, update: Callable[[], object]) -> None:
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    sgd.zero_grad()
    loss_of_batch(model, number).backward()
    sgd.step()
    update()


def load_by_recipe(library: str, model: nn.Module, other: Other) -> AveragingOptimizer:
    """Save as the page says, run its first block and the library's, and return the optimizer."""
    torch.save({"model": model.state_dict(), "ema": other.kept.state_dict()}, "run.pt")
    namespace: dict[str, Any] = {"model": model}
    for block in (BLOCKS[0], recipe(library)):
        exec(compile(block, "migration.md", "exec"), namespace)
    optimizer: AveragingOptimizer = namespace["optimizer"]
    return optimizer


def recipe(library: str) -> str:
    (found,) = [block for block in BLOCKS if block.startswith(f"# {library}\n")]
    return found


def assert_holds(optimizer: AveragingOptimizer, other: Other) -> None:
    entries = optimizer.state_dict()["state"].values()
    kept = [entry["averaged_ema"] for entry in entries]
    # Each library rounds in its own way, a few times an update.
    torch.testing.assert_close(kept, list(other.averages()), rtol=1e-6, atol=1e-7)


def test_there_is_a_recipe_for_each_library() -> None:
    libraries = [block.splitlines()[0].removeprefix("# ") for block in BLOCKS[1:]]
    assert libraries == [*LIBRARIES, "lightning"]


@pytest.mark.parametrize("library", LIBRARIES)
def test_an_average_of_another_library_goes_on_here(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_with_batch_norm()
    other = LIBRARIES[library](model)
    for number in range(UPDATES):
        step(model, number, other.update)
    optimizer = load_by_recipe(library, model, other)
    counted = 1 if library in ("timm", "torch-ema") else UPDATES
    assert optimizer.param_groups[0]["n_averaged_ema"] == counted
    assert_holds(optimizer, other)
    for number in range(UPDATES):
        step(model, UPDATES + number, other.update)
        optimizer.update_averages()
        assert_holds(optimizer, other)


def test_the_default_of_torch_ema_goes_on_with_the_ramp_of_tensorflow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = model_with_batch_norm()
    other = of_torch_ema(model, use_num_updates=True)
    for number in range(UPDATES):
        step(model, number, other.update)
    average = load_by_recipe("torch-ema", model, other).averaged_state_dict(model)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = AveragingOptimizer(sgd, EMA(DECAY, warmup=TFRamp()))
    optimizer.load_averaged_state_dict(model, average, n_averaged=UPDATES)
    for number in range(UPDATES):
        step(model, UPDATES + number, other.update)
        optimizer.update_averages()
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
        return AveragingOptimizer(adam, EMA(DECAY), buffers=self.buffers())


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
    trainer.fit(module, torch.arange(UPDATES), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
def test_an_average_of_lightning_goes_on_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    other = Module(is_averaging=False)
    each_epoch = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    fit(other, EMAWeightAveraging(decay=DECAY), each_epoch)  # leaves the average in the model

    (tmp_path / "epoch=0.ckpt").rename("run.ckpt")
    with pytest.warns(UserWarning, match="no average for 'ema'"):
        exec(recipe("lightning"), {"model": Module(is_averaging=True), "torch": torch})
    model = Module(is_averaging=True)
    (optimizer,) = fit(model, EvaluateAveraged(), ckpt_path="averaging.ckpt").optimizers
    assert isinstance(optimizer, AveragingOptimizer)
    assert optimizer.param_groups[0]["n_averaged_ema"] == 2 * UPDATES
    averaged, expected = optimizer.averaged_state_dict(model), other.state_dict()
    counter = "net.1.num_batches_tracked"  # theirs stays at 1: an EMA of integers, rounded down
    assert (averaged.pop(counter), expected.pop(counter)) == (2 * UPDATES, 1)
    torch.testing.assert_close(averaged, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("n", [2, 3, 10, 1000])
def test_the_power_ramp_is_one_update_ahead_of_those_of_timm_and_diffusers(n: int) -> None:
    model, ramp = model_with_batch_norm(), PowerRamp(gamma=2, power=0.75)
    options = {"use_warmup": True, "warmup_gamma": 2, "warmup_power": 0.75}
    of_timm = timm_model_ema().ModelEmaV3(model, decay=0.9999, **options)
    of_diffusers = EMAModel(
        model.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=2, power=0.75
    )
    assert of_timm.get_decay(n + 1) == pytest.approx(1 - ramp.weight(n - 1))
    assert of_diffusers.get_decay(n + 1) == pytest.approx(1 - ramp.weight(n - 1))
