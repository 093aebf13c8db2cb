"""Small real training runs that the tests share."""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_leaves

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
)

in_place = pytest.mark.parametrize("in_place", [False, True], ids=["backed_up", "in_place"])
MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": torch.enable_grad,
}
# Of weights and averages: alike, they change places in a swap; else weights are backed up.
DTYPES = [
    pytest.param(torch.float32, None, id="exchanged"),
    pytest.param(torch.bfloat16, None, id="backed_up"),
    pytest.param(torch.float32, torch.float64, id="backed_up_double"),
    pytest.param(torch.bfloat16, torch.bfloat16, id="exchanged_low"),
]
TWO_RULES: dict[str, Rule] = {"ema": EMA(0.9), "swa": SWA()}


def small_model(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Return the same model of four parameters at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).to(dtype)


def model_with_batch_norm() -> nn.Sequential:
    """Return the same model with floating-point and integer buffers at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def averaging_sgd(
    model: nn.Module,
    rule: Rule | dict[str, Rule],
    *,
    buffers: nn.Module | Iterable[Tensor] = (),
    dtype: torch.dtype | None = None,
    device: str | None = None,
) -> AveragingOptimizer:
    sgd = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return AveragingOptimizer(sgd, rule, buffers=buffers, dtype=dtype, device=device)


Run = tuple[nn.Sequential, AveragingOptimizer]


def of_bfloat16_weights() -> Run:
    model = small_model(torch.bfloat16)
    return model, averaging_sgd(model, TWO_RULES)


def with_snapshots() -> Run:
    model = model_with_batch_norm()
    rules: dict[str, Rule] = {
        "last": LAWA(k=3),
        "epochs": LAWA(k=2, start=1, every=2),
        "ema": EMA(0.9),
    }
    return model, averaging_sgd(model, rules, buffers=model.buffers())


def train(model: nn.Module, optimizer: Optimizer, steps: int, first: int = 0) -> list[list[Tensor]]:
    """Train on batches numbered from `first`, and return the weights after each step."""
    snapshots = []
    for step in range(first, first + steps):
        optimizer.zero_grad()
        loss_of_batch(model, step).backward()
        optimizer.step()
        snapshots.append(values(model.parameters()))
    return snapshots


def first_layer(model: nn.Sequential) -> nn.Linear:
    layer = model[0]
    assert isinstance(layer, nn.Linear)
    return layer


def weights_of(optimizer: Optimizer) -> list[Tensor]:
    return [weight for group in optimizer.param_groups for weight in group["params"]]


def gradients_of(model: nn.Module) -> list[Tensor]:
    return [weight.grad for weight in model.parameters() if weight.grad is not None]


def loss_of_batch(model: nn.Module, number: int) -> Tensor:
    first = next(model.parameters())
    generator = torch.Generator().manual_seed(number)
    batch = torch.randn(8, 3, generator=generator).to(first.dtype)
    loss: Tensor = (model(batch) - 1).square().mean()
    return loss


def fill(weight: Tensor, value: float) -> None:
    with torch.no_grad():
        weight.fill_(value)


def update_with(optimizer: AveragingOptimizer, weight: Tensor, *present: float) -> None:
    """Give the weight each value in turn, and update the averages with it."""
    for value in present:
        fill(weight, value)
        optimizer.update_averages()


def values(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone() for tensor in tensors]


def recurrence(rule: Rule, snapshots: list[list[Tensor]]) -> list[Tensor]:
    """Return the average of the weights after each step, by formulas of its own.

    `Tensor.lerp` is the arithmetic of the averages too, so that bits can be compared.
    """
    assert rule.every is not None
    due = snapshots[rule.start + rule.every - 1 :: rule.every]
    due = due[-rule.k :] if isinstance(rule, LAWA) else due
    average = due[0]
    for n, weights in enumerate(due[1:], 1):
        average = [a.lerp(w, share(rule, n)) for a, w in zip(average, weights, strict=True)]
    return average


def share(rule: Rule, n: int) -> float:
    """Return the share of the present weights after n ≥ 1 updates."""
    if isinstance(rule, EMA):
        return 1 - rule.decay
    if isinstance(rule, T_ADEMA):
        return 1 - rule.alpha * math.tanh(n / rule.timescale)
    if isinstance(rule, Lookahead):
        return rule.alpha
    if isinstance(rule, SwitchEMA):
        return 1 - rule.decay
    assert isinstance(rule, SWA | LAWA)
    return 1 / (n + 1)


def assert_same_steps(found: Iterable[Any], expected: Iterable[Any]) -> None:
    """Check what there was after each of as many steps, bit for bit."""
    for step, expected_step in zip(found, expected, strict=True):
        assert same(step, expected_step)


def assert_same_averages(optimizer: Optimizer, expected: Optimizer) -> None:
    assert isinstance(optimizer, AveragingOptimizer)
    assert isinstance(expected, AveragingOptimizer)
    for name in expected.rules:
        assert same(averages(optimizer, name), averages(expected, name)), name


def assert_averages_of(optimizer: AveragingOptimizer, snapshots: list[list[Tensor]]) -> None:
    """Check all averages against the recurrence over the weights after each step."""
    for name, rule in optimizer.rules.items():
        assert same(averages(optimizer, name), recurrence(rule, snapshots)), name


UNIT = st.floats(0, 1)
READING_RULES: st.SearchStrategy[Rule] = st.one_of(
    st.builds(EMA, UNIT),
    st.builds(EMA, UNIT, debias=st.booleans(), warmup=st.sampled_from([SWA(), TFRamp()])),
    st.builds(EMA, UNIT, warmup=st.builds(PowerRamp, st.floats(0.01, 1e4), st.floats(0.01, 1))),
    st.just(SWA()),
    st.builds(T_ADEMA, UNIT, st.floats(0.1, 100)),
    st.builds(ExponentialRamp, UNIT, st.floats(0.1, 1e4)),
    st.builds(PolynomialAverage, st.floats(0, 100)),
    st.builds(PowerEMA, st.floats(0, 100)),
    st.builds(HalfLifeFraction, st.floats(1e-3, 1)),
    st.builds(PowerRamp, st.floats(0.01, 1e4), st.floats(0.01, 1)),
    st.just(TFRamp()),
    st.builds(LAWA, st.integers(2, 6)),
    st.builds(Formula, st.sampled_from([lambda n: 1 / n, lambda n: 0.5])),
)
WRITING_RULES: st.SearchStrategy[Rule] = st.one_of(
    st.builds(Lookahead, UNIT), st.builds(SwitchEMA, UNIT, every=st.integers(1, 5))
)
EVERY_RULE = st.one_of(READING_RULES, WRITING_RULES)


def as_it_is(optimizer: Optimizer) -> Optimizer:
    return optimizer


def through_pickle(thing: Any) -> Any:
    return pickle.loads(pickle.dumps(thing))


def averages(optimizer: AveragingOptimizer, name: str) -> list[Tensor]:
    """Return the averages of all parameters, in the order of the state dict."""
    return saved_averages(optimizer.state_dict(), name)


def through_a_file(state_dict: Any) -> Any:
    return _saved_and_loaded(state_dict, weights_only=True)


def through_any_file(thing: Any) -> Any:
    """Save and load as what is no state dict is, such as a whole model."""
    return _saved_and_loaded(thing, weights_only=False)


def _saved_and_loaded(thing: Any, *, weights_only: bool) -> Any:
    file = io.BytesIO()
    torch.save(thing, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=weights_only)


def tensors_in(nested: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(nested) if isinstance(leaf, Tensor)]


def saved_averages(state_dict: dict[str, Any], name: str) -> list[Tensor]:
    # Of parameters of which the wrapped optimizer keeps nothing, as LBFGS of all but one.
    apart = state_dict.get("averaged_parameters", {})
    entries = {**state_dict["state"], **{index: apart[index] for index in apart if apart[index]}}
    return [entries[index][f"averaged_{name}"].clone() for index in sorted(entries)]


def everything(model: nn.Module, optimizer: AveragingOptimizer) -> list[Tensor]:
    """Return copies of all values the model and the optimizer hold, counters included."""
    state_dict = optimizer.state_dict()
    entries = [state_dict["state"][index] for index in sorted(state_dict["state"])]
    kept = [entry[key] for entry in entries for key in sorted(entry)]
    for buffers in state_dict.get("averaged_buffers", {}).values():
        kept += buffers.values() if isinstance(buffers, dict) else buffers
    counters = [torch.tensor(group["averaging_steps"]) for group in state_dict["param_groups"]]
    return values([*model.parameters(), *model.buffers(), *kept, *counters])


def same(first: Iterable[Tensor], second: Iterable[Tensor]) -> bool:
    """Return whether all tensors are equal bit for bit, NaN included, and of one dtype."""
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))
        for a, b in zip(first, second, strict=True)
    )


def bits(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def frozen(nested: Any) -> Any:
    """Return what compares equal for nested dicts and lists of equal bits, types and order."""
    if isinstance(nested, Tensor):
        return str(nested.dtype), tuple(nested.shape), bits(nested).numpy().tobytes()
    if isinstance(nested, dict):
        return dict, tuple((frozen(key), frozen(value)) for key, value in nested.items())
    if isinstance(nested, list | tuple):
        return type(nested), tuple(map(frozen, nested))
    return type(nested), nested
