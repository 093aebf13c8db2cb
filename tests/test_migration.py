"""The recipes of MIGRATION.md, run on what the other libraries have really saved."""

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
from peers import timm_model_ema
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import loss_of_batch, model_with_batch_norm

from averaging_optim import EMA, AveragingOptimizer, PowerRamp, TFRamp

PAGE = (Path(__file__).parent.parent / "MIGRATION.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
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
    (recipe,) = [block for block in BLOCKS if block.startswith(f"# {library}\n")]
    for block in (BLOCKS[0], recipe):
        exec(compile(block, "MIGRATION.md", "exec"), namespace)
    optimizer: AveragingOptimizer = namespace["optimizer"]
    return optimizer


def assert_holds(optimizer: AveragingOptimizer, other: Other) -> None:
    entries = optimizer.state_dict()["state"].values()
    kept = [entry["averaged_ema"] for entry in entries]
    # Each library rounds in its own way, a few times an update.
    torch.testing.assert_close(kept, list(other.averages()), rtol=1e-6, atol=1e-7)


def test_there_is_a_recipe_for_each_library() -> None:
    assert [block.splitlines()[0] for block in BLOCKS[1:]] == [f"# {name}" for name in LIBRARIES]


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
