"""Optimizers of other packages: which there are, how each is built, how each takes a step."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import logging
import pkgutil
import random
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from training import as_it_is, loss_of_batch, same, values

from averaging_optim import AveragingOptimizer

PACKAGES = (
    "bitsandbytes.optim",
    "dadaptation",
    "lion_pytorch",
    "opacus.optimizers",
    "optimi",
    "prodigyopt",
    "pytorch_optimizer",
    "schedulefree",
    "timm.optim",
    "torchao.optim",
    "transformers.optimization",
)
STEPS = 6
# Trains otherwise in one of thirty runs, bare, which the two runs of a trial do not always show.
UNSTEADY = ("pytorch_optimizer-Kron",)
# Has no parameter groups, which say what to average; test_identity.py shows how it is refused.
WITHOUT_GROUPS = ("pytorch_optimizer-SafeFP16Optimizer",)
NOT_ALIKE = "it does not train twice alike"
# Each differs from torch's optimizers in something that the others do not.
CHOSEN = (
    "dadaptation-DAdaptAdam",  # finds a learning rate of its own
    "lion_pytorch-Lion",
    "opacus-DPOptimizer",  # reads `grad_sample`, zeroes gradients by default, adds noise
    "optimi-AdamW",  # step(param=...), zero_grad(param=...), a property that can be written
    "prodigyopt-Prodigy",
    "pytorch_optimizer-AdaHessian",  # step(hessian=...)
    "pytorch_optimizer-AliG",  # needs a closure
    "pytorch_optimizer-FlashAdamW",  # states and corrections of 8 bits, a `state_dict` of its own
    "pytorch_optimizer-LOMO",  # trains in `fused_backward`, and has no `step`
    "pytorch_optimizer-Lookahead",  # keeps another as `optimizer`; saves in a format of its own
    "pytorch_optimizer-Magma",  # keeps state by the id of a weight
    "pytorch_optimizer-Muon",  # groups of two kinds
    "pytorch_optimizer-Ranger21",  # schedules itself, and saves beside torch's entries
    "pytorch_optimizer-SAM",  # calls the closure at other weights, and shares another's state
    "pytorch_optimizer-ScheduleFreeWrapper",  # has two modes
    "pytorch_optimizer-TRAC",  # keeps state under a string
    "schedulefree-RAdamScheduleFree",
    "schedulefree-ScheduleFreeWrapper",  # no torch.optim.Optimizer
    "torchao-AdamW4bit",  # tensor subclasses as states
    "transformers-Adafactor",  # lr=None
)


@dataclass(frozen=True, eq=False)
class Case:
    """An optimizer class with the options it is built with, besides what it requires."""

    package: str
    cls: type[Any]
    options: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        options = (f"{name}={value}" for name, value in self.options.items())
        return "-".join([self.package, self.cls.__name__, *options])

    def build(self, model: nn.Module) -> Any:
        """Return the bare optimizer of this model."""
        if self.package == "opacus":
            with_samples_of_gradients(model)
        own = OF_ITS_OWN.get(f"{self.package}-{self.cls.__name__}", {})
        required = {name: REQUIRED[name] for name in required_arguments(self.cls)}
        given = {name: make(model) for name, make in {**required, **own}.items()}
        return self.cls(**{**given, **self.options})


def adamw(model: nn.Module) -> AdamW:
    return AdamW(model.parameters(), lr=0.01)


def matrices(model: nn.Module) -> list[nn.Parameter]:
    return [weight for weight in model.parameters() if weight.ndim == 2]


def matrices_apart(model: nn.Module) -> list[dict[str, Any]]:
    """Return groups as optimizers of the Muon family take them."""
    others = [weight for weight in model.parameters() if weight.ndim != 2]
    return [{"params": matrices(model), "use_muon": True}, {"params": others, "use_muon": False}]


def proportion_scheduler(model: nn.Module) -> Any:
    package = importlib.import_module("pytorch_optimizer")
    scheduler = package.LinearScheduler(adamw(model), t_max=100, max_lr=0.1)
    return package.ProportionScheduler(scheduler, max_lr=0.1, max_value=0.2, min_value=0.1)


def with_samples_of_gradients(model: nn.Module) -> None:
    """Let backward passes leave the gradient of each sample, as opacus' optimizers need it."""
    # The hooks that it puts on the layers keep what is made here alive.
    importlib.import_module("opacus").GradSampleModule(model)


# How to give what constructors require, by the name of the argument, and where that is not enough.
REQUIRED: Mapping[str, Callable[[nn.Module], Any]] = {
    "params": lambda model: list(model.parameters()),
    "model": lambda model: model,
    "optimizer": adamw,
    "base": lambda model: SGD(model.parameters(), lr=0.01, momentum=0.9),
    "base_optimizer": lambda model: AdamW,
    "lr": lambda model: 0.01,
    "num_data": lambda model: 8,
    "num_iterations": lambda model: 100,
    "rho_scheduler": proportion_scheduler,
    "noise_multiplier": lambda model: 1.0,
    "max_grad_norm": lambda model: 1.0,
    "expected_batch_size": lambda model: 8,
    "target_unclipped_quantile": lambda model: 0.5,
    "clipbound_learning_rate": lambda model: 0.2,
    "max_clipbound": lambda model: 10.0,
    "min_clipbound": lambda model: 0.1,
    "unclipped_num_std": lambda model: 1.0,
}
_MOMENTUM = {"momentum": lambda model: 0.9}
_NORM_OF_EACH = {"max_grad_norm": lambda model: [1.0 for _ in model.parameters()]}
_TWO_KINDS = {"params": matrices_apart}
_MUONS = ("AdaGO", "AdaMuon", "DistributedMuon", "Muon", "MuonClip", "NorMuon")
OF_ITS_OWN: Mapping[str, Mapping[str, Callable[[nn.Module], Any]]] = {
    **{f"bitsandbytes-{name}": _MOMENTUM for name in ("LARS", "LARS32bit", "LARS8bit")},
    **{f"bitsandbytes-{name}": _MOMENTUM for name in ("SGD", "SGD32bit", "SGD8bit")},
    "bitsandbytes-PytorchLARS": _MOMENTUM,
    "opacus-DPPerLayerOptimizer": _NORM_OF_EACH,
    "opacus-SimpleDistributedPerLayerOptimizer": _NORM_OF_EACH,
    **{f"pytorch_optimizer-{name}": _TWO_KINDS for name in _MUONS},
    "pytorch_optimizer-AdaShift": {"keep_num": lambda model: 2},  # it waits for so many gradients
    "pytorch_optimizer-GSAM": {"base_optimizer": adamw},
    "pytorch_optimizer-SpectralSphere": {"params": matrices},
    "timm-Lookahead": {"base_optimizer": adamw},
    "timm-SGDP": {"lr": lambda model: 0.01},
}


def required_arguments(cls: type[Any]) -> list[str]:
    return [each.name for each in arguments_of(cls) if each.default is each.empty]


def arguments_of(cls: type[Any]) -> list[inspect.Parameter]:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(cls).parameters.values()
    return [each for each in parameters if each.kind not in variadic]


@functools.cache
def chosen_cases() -> list[Case]:
    """Return the cases for `make test`. No package is imported that none of them needs."""
    names = [name.split("-") for name in CHOSEN]
    modules = {each.split(".")[0]: each for each in PACKAGES}
    return [Case(package, getattr(loaded(modules[package]), cls)) for package, cls in names]


@functools.cache
def all_cases() -> list[Case]:
    """Return every optimizer of every package: as it is, and with each flag turned over."""
    classes = {
        (package, cls): None for package in PACKAGES for cls in optimizers_of(loaded(package))
    }
    return [
        Case(name.split(".")[0], cls, options)
        for name, cls in classes
        for options in ({}, *turned_flags(cls))
    ]


def loaded(name: str) -> ModuleType:
    # Of what could not be loaded for other devices some packages tell at length.
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return timm_optim() if name == "timm.optim" else importlib.import_module(name)
    finally:
        logging.disable(logging.NOTSET)


def timm_optim() -> ModuleType:
    """Return all optimizers of timm, whose packages cannot be imported without torchvision."""
    for name in ("timm", "timm.optim"):
        spec = importlib.util.find_spec(name)
        if spec is None:
            raise ImportError(f"{name} is not installed.")
        sys.modules.setdefault(name, importlib.util.module_from_spec(spec))
    package = sys.modules["timm.optim"]
    files = [each.name for each in pkgutil.iter_modules(package.__path__)]
    for file in files:
        if not file.startswith("_") and file != "optim_factory":
            vars(package).update(vars(importlib.import_module(f"timm.optim.{file}")))
    return package


def optimizers_of(module: ModuleType) -> Iterator[type[Any]]:
    """Yield the classes that take steps and zero gradients, as schedulers do not."""
    package = module.__name__.split(".")[0]
    for name, cls in sorted(vars(module).items()):
        if (
            inspect.isclass(cls)
            and not name.startswith("_")
            and cls.__module__.split(".")[0] == package
            and hasattr(cls, "step")
            and hasattr(cls, "zero_grad")
            and not inspect.isabstract(cls)
        ):
            yield cls


def turned_flags(cls: type[Any]) -> Iterator[dict[str, bool]]:
    for argument in arguments_of(cls):
        if isinstance(argument.default, bool):
            yield {argument.name: not argument.default}
        elif argument.name == "foreach" and argument.default is None:
            yield {"foreach": True}


@dataclass(frozen=True, eq=False)
class Run:
    """A model and its optimizer, and the way in which the optimizer is told to take a step."""

    model: nn.Sequential
    optimizer: Any
    step: Callable[[Run, int], Any]

    def train(self, steps: int, first: int = 0) -> list[list[Tensor]]:
        """Train on batches numbered from `first`, and return the weights after each step."""
        snapshots = []
        for number in range(first, first + steps):
            self.step(self, number)
            snapshots.append(values(self.model.parameters()))
        return snapshots

    def backward(self, number: int, **options: bool) -> Tensor:
        """Leave the gradients of a batch, and return its loss."""
        # Some add noise, or draw directions, and the first step of a run is not always its own.
        torch.manual_seed(number)
        random.seed(number)
        self.optimizer.zero_grad()
        with torch.enable_grad():  # some call a closure without
            loss = loss_of_batch(self.model, number)
            loss.backward(**options)
        return loss.detach()


def begun(
    case: Case, step: Callable[[Run, int], Any], wrap: Callable[[Any], Any] = as_it_is
) -> Run:
    """Return the same run at each call, ready for the first step."""
    torch.manual_seed(0)
    # Its second matrix is large enough for states of few bits to be used.
    model = nn.Sequential(nn.Linear(3, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh())
    model.append(nn.Linear(64, 2))
    optimizer = wrap(case.build(model))
    if hasattr(optimizer, "train"):
        optimizer.train()
    return Run(model, optimizer, step)


def plainly(run: Run, number: int) -> Any:
    run.backward(number)
    return run.optimizer.step()


def with_graph(run: Run, number: int) -> Any:
    run.backward(number, create_graph=True)
    return run.optimizer.step()


def with_hessian(run: Run, number: int) -> Any:
    run.backward(number)
    curvature = [each.detach().square() for each in run.model.parameters()]
    return run.optimizer.step(hessian=curvature)


def with_closure(run: Run, number: int) -> Any:
    # SAM begins with gradients that are there, others with the closure.
    run.backward(number)
    return run.optimizer.step(lambda: run.backward(number))


def with_outputs(run: Run, number: int) -> Any:
    return run.optimizer.step(lambda: (None, run.backward(number)))


def with_scaled_loss(run: Run, number: int) -> Any:
    run.optimizer.zero_grad()
    run.optimizer.backward(loss_of_batch(run.model, number))
    return run.optimizer.step()


def in_backward(run: Run, number: int) -> Any:
    run.optimizer.fused_backward(loss_of_batch(run.model, number), lr=0.01)
    if isinstance(run.optimizer, AveragingOptimizer):
        run.optimizer.update_averages()


def ways_of(optimizer: Any) -> list[Callable[[Run, int], Any]]:
    """Return ways to take a step, of which the first that works is the one."""
    if hasattr(optimizer, "fused_backward"):
        return [in_backward]
    if hasattr(optimizer, "backward"):
        return [with_scaled_loss]
    if "hessian" in inspect.signature(optimizer.step).parameters:
        return [with_hessian]
    return [plainly, with_graph, with_closure, with_outputs]


@dataclass(frozen=True)
class Trial:
    """What a bare optimizer does here: the weights after each step, or why there are none."""

    step: Callable[[Run, int], Any]
    weights: list[list[Tensor]]
    reason: str = ""


@functools.cache
def trial_of(case: Case) -> Trial:
    """Try the bare optimizer in each of the ways, and take the first that works."""
    if f"{case.package}-{case.cls.__name__}" in UNSTEADY:
        return Trial(plainly, [], NOT_ALIKE)
    if f"{case.package}-{case.cls.__name__}" in WITHOUT_GROUPS:
        return Trial(plainly, [], "it has no parameter groups and is refused")
    try:
        ways = ways_of(begun(case, plainly).optimizer)
    except (Exception, SystemExit) as error:  # one exits where triton is missing
        return Trial(plainly, [], in_one_line(error))
    trials = [trial_in(case, way) for way in ways]
    return next((trial for trial in trials if not trial.reason), trials[0])


def trial_in(case: Case, way: Callable[[Run, int], Any]) -> Trial:
    try:
        first, second = begun(case, way).train(STEPS), begun(case, way).train(STEPS)
    except (Exception, SystemExit) as error:
        return Trial(way, [], in_one_line(error))
    if same(first[0], first[-1]):
        return Trial(way, [], "its steps move no weight")
    if not all(same(one, other) for one, other in zip(first, second, strict=True)):
        return Trial(way, [], NOT_ALIKE)
    return Trial(way, first)


def in_one_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error) or 'no message'}".splitlines()[0][:120]
