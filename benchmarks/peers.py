"""Our wrapper and other libraries, each used as its documentation says, all doing the same work."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import ema_pytorch
import torch
import torch_ema
from diffusers.training_utils import EMAModel
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from averaging_optim import AveragingOptimizer, Rule

DECAY = 0.999
PACKAGES = ("timm", "ema-pytorch", "torch-ema", "diffusers")


@dataclass(frozen=True)
class Candidate:
    """One way to keep an average.

    update: averages the weights as they are now.
    averages: returns the average of each parameter, in the model's order.
    """

    update: Callable[[], object]
    averages: Callable[[], Iterable[Tensor]]


class Idle(Optimizer):
    """An optimizer whose step does nothing, to time averaging alone."""

    def __init__(self, weights: Iterable[Tensor]) -> None:
        super().__init__(weights, {})

    def step(self, closure: object = None) -> Any:
        return None


def ours(
    model: nn.Module, rule: Rule | Mapping[str, Rule], dtype: torch.dtype | None = None
) -> Candidate:
    """Return a step of the wrapper; `averages` are those of the first rule."""
    optimizer = AveragingOptimizer(Idle(model.parameters()), rule, dtype=dtype)
    key = f"averaged_{next(iter(optimizer.rules))}"
    return Candidate(
        optimizer.step, lambda: [optimizer.state[weight][key] for weight in model.parameters()]
    )


def from_torch_swa(model: nn.Module) -> Candidate:
    averaged = AveragedModel(model)
    return Candidate(lambda: averaged.update_parameters(model), averaged.module.parameters)


def from_torch(model: nn.Module) -> Candidate:
    averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    return Candidate(lambda: averaged.update_parameters(model), averaged.module.parameters)


def from_timm(model: nn.Module, dtype: torch.dtype | None = None) -> Candidate:
    averaged = timm_model_ema().ModelEmaV3(model, decay=DECAY, dtype=dtype)
    return Candidate(lambda: averaged.update(model), averaged.module.parameters)


def from_ema_pytorch(model: nn.Module, use_foreach: bool = False) -> Candidate:
    """Without `min_value`, the decay ramps up: it is 0.37 at the second update."""
    averaged = ema_pytorch.EMA(
        model,
        beta=DECAY,
        min_value=DECAY,
        update_after_step=0,
        update_every=1,
        use_foreach=use_foreach,
    )
    return Candidate(averaged.update, averaged.ema_model.parameters)


def from_torch_ema(model: nn.Module) -> Candidate:
    """With `use_num_updates`, the decay ramps up: it is 0.25 at the second update."""
    averaged = torch_ema.ExponentialMovingAverage(model.parameters(), DECAY, use_num_updates=False)
    return Candidate(averaged.update, lambda: averaged.shadow_params)


def from_diffusers(model: nn.Module, foreach: bool = False) -> Candidate:
    """Without `min_decay`, the decay ramps up, even with `use_ema_warmup=False`."""
    averaged = EMAModel(model.parameters(), decay=DECAY, min_decay=DECAY, foreach=foreach)
    return Candidate(lambda: averaged.step(model.parameters()), lambda: averaged.shadow_params)


EMA_PEERS: dict[str, Callable[[nn.Module], Candidate]] = {
    "torch AveragedModel": from_torch,
    "timm": from_timm,
    "ema-pytorch": from_ema_pytorch,
    "ema-pytorch foreach": lambda model: from_ema_pytorch(model, use_foreach=True),
    "torch-ema": from_torch_ema,
    "diffusers": from_diffusers,
    "diffusers foreach": lambda model: from_diffusers(model, foreach=True),
}


@torch.no_grad()
def checked(
    model: nn.Module, candidates: Mapping[str, Candidate], share: float
) -> dict[str, Callable[[], object]]:
    """Let all candidates average the weights and their double. Return name → update.

    Raises:
        RuntimeError: an average isn't (1 + share) · the first weights.
    """
    for candidate in candidates.values():
        candidate.update()
    for weight in model.parameters():
        weight.mul_(2)
    for name, candidate in candidates.items():
        candidate.update()
        _check(name, candidate.averages(), model.parameters(), (1 + share) / 2)
    return {name: candidate.update for name, candidate in candidates.items()}


def _check(name: str, averages: Iterable[Tensor], weights: Iterable[Tensor], factor: float) -> None:
    for average, weight in zip(averages, weights, strict=True):
        expected = weight.to(average.dtype) * factor
        # Each formula rounds two or three times, by 6e-8 at most; standing still is off by 1e-3.
        if not torch.allclose(average, expected, rtol=1e-6, atol=0):
            raise RuntimeError(f"`{name}` must average as the others do. Check how it is called.")


def timm_model_ema() -> ModuleType:
    """Return the one file of timm that averages, because the whole package needs torchvision."""
    name = "timm_model_ema"
    if name not in sys.modules:
        path = importlib.metadata.distribution("timm").locate_file("timm/utils/model_ema.py")
        spec = importlib.util.spec_from_file_location(name, str(path))
        if spec is None or spec.loader is None:
            raise ImportError(f"{path} can't be imported. Reinstall timm.")
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
