"""The host doesn't wait for the device, but in the cases that docs/performance.md names.

A GPU's host waits when it reads a tensor, or runs an operation whose result has a shape that
depends on values. Such reads are seen on a CPU too: torch shows each operation, and tags these.

What the wrapped optimizer reads is its own affair. Most of the tests wrap SGD, which reads
nothing; of other optimizers, the reads must be those that they make without a wrapper.

On a device, averages take other branches, and the host also waits for copies between it and the
CPU. So all calls run once more on a device that torch lets Python make up, with FakeTensorMode in
the place of kernels. That shows operations, dtypes and devices, but no values: whatever the host
reads there is 0. It can't show rounding at random, as the made-up device has no generator. (Fake
CUDA tensors show less: a CPU build of torch refuses their `copy_`, gradients and generators.)
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from processes import in_processes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim import LBFGS, SGD, Adagrad, Adam, AdamW, NAdam, Optimizer, RMSprop
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree, backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

from averaging_optim import (
    EMA,
    LAWA,
    SWA,
    T_ADEMA,
    AveragingOptimizer,
    ExponentialRamp,
    Formula,
    HalfLifeFraction,
    Lookahead,
    PolynomialAverage,
    PowerEMA,
    PowerRamp,
    Rule,
    SwitchEMA,
    TFRamp,
    together,
)

# The operation that `item()` and `bool()` of a tensor come to.
ITEM = "_local_scalar_dense"

READING_TAGS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# Not tagged, as its result has a shape of its own, but it counts what a mask selects.
READING_OPERATIONS = {"index_put", "index_put_"}
# On a CPU these read the memory without an operation.
READING_METHODS = {
    Tensor.tolist,
    Tensor.numpy,
    Tensor.__array__,
    Tensor.__dlpack__,
    Tensor.__repr__,
}


class Operations(TorchDispatchMode):
    """Note the operations by which the host reads a tensor, or copies one to or from a device."""

    def __init__(self, reads: list[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # as torch wrote it
        self.reads = reads

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.is_inference_mode_enabled() and func._can_decompose():
            # Elsewhere autograd does so, and what such an operation consists of is seen.
            with self:
                return func.decompose(*args, **kwargs)
        name = func.overloadpacket.__name__
        if READING_TAGS.intersection(func.tags) or name in READING_OPERATIONS:
            self.reads.append(name)
            if name == ITEM and isinstance(args[0], FakeTensor):
                return 0
        result = func(*args, **kwargs)
        if "copy" in name and len(devices_of([args, result])) > 1:
            self.reads.append(name)
        return result


class Methods(TorchFunctionMode):
    """Note the methods by which Python reads the memory of a tensor."""

    def __init__(self, reads: list[str]) -> None:
        super().__init__()
        self.reads = reads

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READING_METHODS:
            self.reads.append(func.__name__)
        return func(*args, **(kwargs or {}))


def devices_of(nested: Any) -> set[torch.device]:
    return {each.device for each in _pytree.tree_leaves(nested) if isinstance(each, Tensor)}


@contextmanager
def host_reads() -> Iterator[list[str]]:
    """Give a list of what reads a tensor in this block, in order."""
    reads: list[str] = []
    with Methods(reads), Operations(reads):
        yield reads


class Centred(nn.Module):
    """Buffers of both kinds, as of batch norm, which can't be made on a made-up device."""

    mean: Tensor
    count: Tensor

    def __init__(self, device: str) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.long, device=device))

    def forward(self, features: Tensor) -> Tensor:
        self.mean.lerp_(features.detach().mean(0), 0.1)
        self.count += 1
        return features - self.mean


@dataclass(frozen=True)
class Setup:
    """A model and what averages it."""

    rule: Rule | dict[str, Rule] = field(default_factory=lambda: EMA(0.9))
    dtype: torch.dtype = torch.float32
    has_buffers: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    def build(self, device: str = "cpu") -> tuple[nn.Module, AveragingOptimizer]:
        place: dict[str, Any] = {"dtype": self.dtype, "device": device}
        centred = [Centred(device)] if self.has_buffers else []
        model = nn.Sequential(nn.Linear(3, 4, **place), *centred, nn.Linear(4, 2, **place))
        sgd = SGD(model.parameters(), lr=0.1, momentum=0.9)
        return model, AveragingOptimizer(sgd, self.rule, buffers=model, **self.options)


RULES: dict[str, Rule] = {
    "ema": EMA(0.9),
    "debiased_ema": EMA(0.9, debias=True),
    "warmed_up_ema": EMA(0.9, warmup=SWA()),
    "swa": SWA(),
    "t_adema": T_ADEMA(0.9, 3),
    "exponential_ramp": ExponentialRamp(0.9, 10),
    "polynomial_average": PolynomialAverage(8),
    "power_ema": PowerEMA(6),
    "half_life_fraction": HalfLifeFraction(0.1),
    "power_ramp": PowerRamp(),
    "tf_ramp": TFRamp(),
    "lawa": LAWA(2),
    "lookahead": Lookahead(every=2),
    "switch_ema": SwitchEMA(0.9, every=2),
    "formula": Formula(lambda n: 1 / (n + 1)),
}
SETUPS = {
    **{name: Setup(rule) for name, rule in RULES.items()},
    "several": Setup({"ema": EMA(0.9), "lawa": LAWA(2), "lookahead": Lookahead(every=2)}),
    "bfloat16_in_float32": Setup(dtype=torch.bfloat16),
    "complex": Setup(dtype=torch.complex64),
    "float32_in_float64": Setup(options={"dtype": torch.float64}),
    "averaged_buffers": Setup(has_buffers=True),
    "copied_buffers": Setup(has_buffers=True, options={"use_buffers": False}),
    "several_with_buffers": Setup({"swa": SWA(), "lawa": LAWA(2)}, has_buffers=True),
    "excluded_biases": Setup(options={"exclude": lambda weight: weight.dim() == 1}),
}
AT_RANDOM = {"dtype": torch.bfloat16, "rounding": "stochastic"}
ROUNDED = {
    "rounded_at_random": Setup(LAWA(2), options=AT_RANDOM),
    "several_rounded_at_random": Setup({"ema": EMA(0.9), "swa": SWA()}, options=AT_RANDOM),
}


def loss_of(model: nn.Module) -> Tensor:
    first = next(model.parameters())
    # An output that is not 0 for all inputs, whose gradients are 0 on no kind of number.
    loss: Tensor = model(torch.ones(8, 3, dtype=first.dtype, device=first.device)).abs().mean()
    return loss


def train(model: nn.Module, optimizer: Optimizer, name: str = "") -> None:
    optimizer.zero_grad()
    loss_of(model).backward()
    optimizer.step()


def swap(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    with optimizer.swap_to_averaged(name):
        loss_of(model)


def swap_in_inference_mode(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    with torch.inference_mode(), optimizer.swap_to_averaged(name):
        optimizer.averaged_state_dict(model, name)


def swap_in_place(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    with optimizer.swap_to_averaged(name, in_place=True):
        loss_of(model)
        optimizer.state_dict()


def swap_and_cast(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    with optimizer.swap_to_averaged(name):
        model.double()  # casts all but complex numbers


def swap_to_sum(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    with optimizer.swap_to_averaged({"weights": 0.25, name: 0.75}):
        loss_of(model)


def follow_with_a_teacher(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    teacher = optimizer.averaged_model(model, name)
    train(model, optimizer)
    loss_of(teacher)


def load_exported(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    exported = optimizer.averaged_state_dict(model, name)
    optimizer.load_averaged_state_dict(model, exported, name)
    train(model, optimizer)


def save_and_load(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    saved = _pytree.tree_map_only(Tensor, torch.clone, optimizer.state_dict())
    optimizer.load_state_dict(saved)
    train(model, optimizer)


def load_plain(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    with warnings.catch_warnings(action="ignore"):  # of averages that it has none of
        optimizer.load_state_dict(optimizer.wrapped.state_dict())
    train(model, optimizer)


def restart(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    optimizer.restart(name)
    train(model, optimizer)


def add_a_group(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    first = next(model.parameters())
    added = nn.Parameter(torch.ones_like(first))
    optimizer.add_param_group({"params": [added]})
    added.grad = torch.ones_like(added)
    optimizer.step()


def step_at_a_rate_on_the_device(
    model: nn.Module, optimizer: AveragingOptimizer, name: str
) -> None:
    device = next(model.parameters()).device
    # Its own step reads no learning rate.
    idle = AveragingOptimizer.of(model, EMA(0.9), use_buffers=False)
    idle.param_groups[0]["lr"] = torch.zeros((), device=device)
    idle.step()


def unfreeze(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    first = next(model.parameters()).requires_grad_(False)
    train(model, optimizer)
    first.requires_grad_()
    train(model, optimizer)


def replace_an_average(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    first = next(model.parameters())
    optimizer.state[first][f"averaged_{name}"] = optimizer.state[first][f"averaged_{name}"] * 2
    train(model, optimizer)


def replace_a_buffer(model: nn.Module, optimizer: AveragingOptimizer, name: str) -> None:
    for module in model.modules():
        for key, buffer in module.named_buffers(recurse=False):
            setattr(module, key, buffer.clone())
    train(model, optimizer)


Call = Callable[[nn.Module, AveragingOptimizer, str], object]
CALLS: dict[str, Call] = {
    "step": train,
    "update_averages": lambda model, optimizer, name: optimizer.update_averages(),
    "swap": swap,
    "swap_in_place": swap_in_place,
    "swap_in_inference_mode": swap_in_inference_mode,
    "swap_to_sum": swap_to_sum,
    "evaluate_averages": lambda model, optimizer, name: optimizer.evaluate_averages(
        lambda: loss_of(model)
    ),
    "averaged_model": follow_with_a_teacher,
    "averaged_state_dict": lambda model, optimizer, name: optimizer.averaged_state_dict(
        model, name, only_averaged=True
    ),
    "load_averaged_state_dict": load_exported,
    "state_dict": lambda model, optimizer, name: optimizer.state_dict(),
    "load_state_dict": save_and_load,
    "load_plain_state_dict": load_plain,
    "restart": restart,
    "n_averaged": lambda model, optimizer, name: optimizer.n_averaged(name),
    "add_param_group": add_a_group,
    "unfreeze": unfreeze,
    "state": replace_an_average,
    "replaced_buffers": replace_a_buffer,
    "deepcopy": lambda model, optimizer, name: copy.deepcopy(optimizer),
}


# Whose host knows no learning rate without waiting, and doesn't ask.
ON_DEVICE_ALONE: dict[str, Call] = {"step_at_a_rate_on_the_device": step_at_a_rate_on_the_device}
# A fake parameter can't be cast: torch exchanges it with another tensor, which its mode refers to.
ON_CPU_ALONE: dict[str, Call] = {"swap_and_cast": swap_and_cast}


def reads_of(setup: Setup, call: Call, device: str = "cpu") -> list[str]:
    """Return what the first steps of a run, and then a call, read."""
    with host_reads():  # which is no claim about constructors
        model, optimizer = setup.build(device)
    with host_reads() as reads:
        for _ in range(4):
            train(model, optimizer)
        call(model, optimizer, next(iter(optimizer.rules)))
    return reads


@pytest.mark.parametrize(
    "call", [*CALLS.values(), *ON_CPU_ALONE.values()], ids=[*CALLS, *ON_CPU_ALONE]
)
@pytest.mark.parametrize("setup", [*SETUPS.values(), *ROUNDED.values()], ids=[*SETUPS, *ROUNDED])
def test_the_host_reads_no_tensor(setup: Setup, call: Call) -> None:
    assert reads_of(setup, call) == []


READERS: dict[str, tuple[Callable[[Tensor], object], list[str]]] = {
    "item": (lambda t: t[0].item(), [ITEM]),
    "bool": (lambda t: bool(t[0]), [ITEM]),
    "float": (lambda t: float(t[0]), [ITEM]),
    "format": (lambda t: f"{t[0]}", [ITEM]),
    "repr": (repr, ["__repr__"]),
    "condition": (lambda t: 1 if (t > 0).all() else 0, [ITEM]),
    "contains": (lambda t: t[0] in [torch.ones(())], [ITEM]),
    "equal": (lambda t: t.equal(t), ["equal"]),
    "is_nonzero": (lambda t: t[0].is_nonzero(), [ITEM]),
    "nonzero": (lambda t: t.nonzero(), ["nonzero"]),
    "where": (lambda t: torch.where(t > 0), ["nonzero"]),
    "unique": (lambda t: t.unique(), ["_unique2"]),
    "mask": (lambda t: t[t > 0], ["index"]),
    "write_by_mask": (lambda t: t.index_put_((t > 0,), t[:1]), ["index_put_"]),
    "tolist": (lambda t: t.tolist(), ["tolist"]),
    "numpy": (lambda t: t.numpy(), ["numpy"]),
    "asarray": (np.asarray, ["__array__"]),
}


@pytest.mark.parametrize(("read", "names"), READERS.values(), ids=READERS)
def test_a_read_is_seen(read: Callable[[Tensor], object], names: list[str]) -> None:
    with host_reads() as reads:
        read(torch.arange(3.0))
    assert reads == names


def test_a_read_is_seen_in_inference_mode() -> None:
    with host_reads() as reads, torch.inference_mode():
        bool(torch.ones(()))
    assert reads == [ITEM]


TOGETHER: dict[str, Callable[[nn.Module, Any], object]] = {
    "swap": lambda model, both: swap(model, both, "ema"),
    "swap_to_sum": lambda model, both: swap_to_sum(model, both, "ema"),
    "evaluate_averages": lambda model, both: both.evaluate_averages(lambda: loss_of(model)),
    "averaged_model": lambda model, both: both.averaged_model(model),
    "averaged_state_dict": lambda model, both: both.averaged_state_dict(model),
    "load_averaged_state_dict": lambda model, both: both.load_averaged_state_dict(
        model, both.averaged_state_dict(model)
    ),
}


@pytest.mark.parametrize("call", TOGETHER.values(), ids=TOGETHER)
def test_several_optimizers_together_read_no_tensor(
    call: Callable[[nn.Module, Any], object],
) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizers = [AveragingOptimizer(SGD(each.parameters(), lr=0.1), EMA(0.9)) for each in model]
    with host_reads() as reads:
        loss_of(model).backward()
        for optimizer in optimizers:
            optimizer.step()
        call(model, together(*optimizers))
    assert reads == []


OPTIMIZERS: dict[str, Callable[[Iterable[Tensor]], Optimizer]] = {
    "sgd": lambda weights: SGD(weights, lr=0.1),
    "foreach_sgd": lambda weights: SGD(weights, lr=0.1, momentum=0.9, foreach=True),
    "adam": lambda weights: Adam(weights),
    "foreach_adam": lambda weights: Adam(weights, foreach=True),
    "fused_adam": lambda weights: Adam(weights, fused=True),
    "adamw": lambda weights: AdamW(weights, amsgrad=True),
    "nadam": lambda weights: NAdam(weights),
    "rmsprop": lambda weights: RMSprop(weights),
    "adagrad": lambda weights: Adagrad(weights),
    "lbfgs": lambda weights: LBFGS(weights, line_search_fn="strong_wolfe"),
}


def reads_of_a_run(
    build: Callable[[Iterable[Tensor]], Optimizer], wrap: Callable[[Optimizer], Optimizer]
) -> list[str]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = wrap(build(model.parameters()))

    def closure() -> float:
        optimizer.zero_grad()
        loss = loss_of(model)
        loss.backward()
        return loss  # type: ignore[return-value]  # which torch's optimizers take too

    with host_reads() as reads:
        for _ in range(3):
            optimizer.step(closure)
            optimizer.load_state_dict(optimizer.state_dict())
    return reads


@pytest.mark.parametrize("build", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_wrapper_reads_what_the_bare_optimizer_reads(
    build: Callable[[Iterable[Tensor]], Optimizer],
) -> None:
    bare = reads_of_a_run(build, lambda optimizer: optimizer)
    assert reads_of_a_run(build, lambda optimizer: AveragingOptimizer(optimizer, EMA(0.9))) == bare


def test_a_buffer_is_read_when_it_is_first_seen_and_then_never() -> None:
    with host_reads() as reads:
        model, optimizer = Setup(has_buffers=True).build()
    assert reads == [ITEM]  # of the one that is floating-point
    model.register_buffer("added", torch.ones(2))
    with host_reads() as reads:
        train(model, optimizer)
    assert reads == [ITEM]
    with host_reads() as reads:
        train(model, optimizer)
    assert reads == []


@pytest.mark.parametrize("rule", [EMA(0.9), {"ema": EMA(0.9), "swa": SWA()}], ids=["one", "two"])
def test_skip_nonfinite_reads_each_new_average_and_then_one_number_an_update(
    rule: Rule | dict[str, Rule],
) -> None:
    model, optimizer = Setup(rule, options={"skip_nonfinite": True}).build()
    with host_reads() as reads:
        train(model, optimizer)
    assert reads == [ITEM] * (1 + 4 * len(optimizer.rules))
    with host_reads() as reads:
        train(model, optimizer)
        swap(model, optimizer, "ema")
        optimizer.state_dict()
    assert reads == [ITEM]


@pytest.mark.parametrize(
    ("scale", "reads_of_step"), [(1.0, 1), (0.0, 4)], ids=["nonzero_gradients", "zero_gradients"]
)
def test_a_step_at_learning_rate_0_reads_gradients_until_one_is_not_0(
    scale: float, reads_of_step: int
) -> None:
    model, optimizer = Setup().build()
    train(model, optimizer)
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.zero_grad()
    loss_of(model).mul(scale).backward()
    with host_reads() as reads:
        optimizer.step()
    assert reads == [ITEM] * reads_of_step


class ChecksInfinities(SGD):
    """An optimizer of the kind that looks for infinities itself, with the scaler it is given."""

    _step_supports_amp_scaling = True

    def step(self, closure: Any = None, *, grad_scaler: Any = None) -> Any:
        grad_scaler._check_inf_per_device(self)
        return super().step(closure)


def reads_with_grad_scaler(optimizer: Optimizer, model: nn.Module) -> list[str]:
    scaler = torch.amp.GradScaler("cpu")
    scaled: Any = scaler.scale(loss_of(model))
    scaled.backward()
    with host_reads() as reads:
        scaler.step(optimizer)
    return reads


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize(
    ("build", "of_scaler", "of_wrapper"),
    [
        pytest.param(lambda weights: SGD(weights, lr=0.1), 1, 0, id="scaler_skips"),
        pytest.param(lambda weights: SGD(weights, lr=0.1, fused=True), 0, 1, id="kernel_skips"),
        pytest.param(lambda weights: ChecksInfinities(weights, lr=0.1), 0, 1, id="step_skips"),
    ],
)
def test_a_skip_is_read_once_by_the_scaler_or_else_by_the_wrapper(
    build: Callable[[Iterable[Tensor]], Optimizer], of_scaler: int, of_wrapper: int
) -> None:
    model = nn.Linear(3, 4)
    bare = build(model.parameters())
    assert reads_with_grad_scaler(bare, model) == [ITEM] * of_scaler
    wrapped = AveragingOptimizer(build(model.parameters()), EMA(0.9))
    assert reads_with_grad_scaler(wrapped, model) == [ITEM] * (of_scaler + of_wrapper)


ON_DEVICE = {**SETUPS, "in_main_memory": Setup(options={"device": "cpu"})}
CALLS_ON_DEVICE = {**CALLS, **ON_DEVICE_ALONE}


def reads_on_device() -> dict[tuple[str, str], list[str]]:
    """Return what each call reads on a device that Python makes up, by setup and call."""
    backend_registration._setup_privateuseone_for_python_backend("made_up")
    reads = {}
    with warnings.catch_warnings(action="ignore"):  # torch's, of addresses of fake tensors
        for setup, call in itertools.product(ON_DEVICE, CALLS_ON_DEVICE):
            with FakeTensorMode():
                of, do = ON_DEVICE[setup], CALLS_ON_DEVICE[call]
                reads[setup, call] = reads_of(of, do, "made_up")
    return reads


@pytest.fixture(scope="module")
def on_device() -> dict[tuple[str, str], list[str]]:
    # In a process of its own, which alone has the device.
    (reads,) = in_processes(1, reads_on_device)
    found: dict[tuple[str, str], list[str]] = reads
    return found


needs_made_up_device = pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch lets Python make up no device",
)


@needs_made_up_device
@pytest.mark.parametrize("call", CALLS_ON_DEVICE)
@pytest.mark.parametrize("setup", SETUPS)
def test_the_host_reads_no_tensor_and_copies_none_to_or_from_a_device(
    on_device: dict[tuple[str, str], list[str]], setup: str, call: str
) -> None:
    assert on_device[setup, call] == []


COPIES = {"_to_copy", "_foreach_copy_", "copy_"}


@needs_made_up_device
@pytest.mark.parametrize("call", CALLS)
def test_averages_in_main_memory_are_copied_and_not_read(
    on_device: dict[tuple[str, str], list[str]], call: str
) -> None:
    reads = on_device["in_main_memory", call]
    assert reads
    assert COPIES.issuperset(reads)
