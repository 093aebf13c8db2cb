"""A swap amid what programs do inside it, beside it and around it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from mutations import quantized
from schedulefree import SGDScheduleFree
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.optim import SGD
from training import (
    DTYPES,
    MODES,
    averages,
    averaging_sgd,
    everything,
    frozen,
    in_place,
    model_with_batch_norm,
    same,
    small_model,
    train,
    values,
)

from averaging_optim import EMA, LAWA, SWA, AveragingOptimizer, Rule

RULES: dict[str, Rule] = {"ema": EMA(0.5), "last": LAWA(k=2)}


class Adapter(nn.Linear):
    """A layer that merges a low-rank update into its weight in `eval()`, as LoRA layers do."""

    def __init__(self) -> None:
        super().__init__(3, 3)
        self.down, self.up = nn.Linear(3, 1, bias=False), nn.Linear(1, 3, bias=False)

    def train(self, mode: bool = True) -> Adapter:
        if mode != self.training:
            sign = -1 if mode else 1
            self.weight.data.add_(self.up.weight @ self.down.weight, alpha=sign)
        super().train(mode)
        return self


def look_up_with_max_norm(model: nn.ModuleDict, inner: Any) -> None:
    model["embedding"](torch.tensor([0, 1]))


def merge_adapters(model: nn.ModuleDict, inner: Any) -> None:
    model.eval()


def clamp(model: nn.ModuleDict, inner: Any) -> None:
    for weight in model.parameters():
        weight.data.clamp_(-0.01, 0.01)


def set_to_evaluation(model: nn.ModuleDict, inner: Any) -> None:
    inner.eval()
    inner.train()


def write_into_buffers(model: nn.ModuleDict, inner: Any) -> None:
    for buffer in model.buffers():
        buffer.fill_(7)


@pytest.mark.parametrize(
    "write",
    [look_up_with_max_norm, merge_adapters, clamp, set_to_evaluation, write_into_buffers],
)
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["alike", "double"])
def test_what_is_written_inside_is_undone_and_never_reaches_an_average(
    write: Callable[[nn.ModuleDict, Any], None], dtype: torch.dtype | None
) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "embedding": nn.Embedding(4, 3, max_norm=0.1),
            "adapter": Adapter(),
            "norm": nn.BatchNorm1d(3),
        }
    )
    inner = SGDScheduleFree(model.parameters(), lr=0.1)
    inner.train()
    optimizer = AveragingOptimizer(inner, RULES, buffers=model.buffers(), dtype=dtype)
    for _ in range(3):
        for weight in model.parameters():
            weight.grad = torch.randn_like(weight)
        optimizer.step()
    before, state = values(model.state_dict().values()), frozen(optimizer.state_dict())
    with optimizer.swap_to_averaged("ema"):
        inside = values(model.state_dict().values())
        write(model, inner)
        assert not same(model.state_dict().values(), inside) or write is set_to_evaluation
    assert same(model.state_dict().values(), before)
    assert frozen(optimizer.state_dict()) == state


def test_what_was_handed_out_stays_what_it_was_through_a_swap() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, RULES, buffers=model.buffers())
    train(model, optimizer, 3)
    teacher = optimizer.averaged_model(model, "ema")
    weight = next(model.parameters())
    average = optimizer.state[weight]["averaged_ema"]
    saved = optimizer.state_dict()
    handed_out: list[Callable[[], Any]] = [
        lambda: frozen(saved),
        lambda: frozen(teacher.state_dict()),
        lambda: frozen(average),
    ]
    before = [each() for each in handed_out]
    with optimizer.swap_to_averaged("ema"):
        assert [each() for each in handed_out] == before
        saved_inside = optimizer.state_dict()
        assert optimizer.state[weight]["averaged_ema"] is average
        assert same(teacher.parameters(), model.parameters())
    assert [each() for each in handed_out] == before
    assert frozen(saved_inside) == before[0]


@pytest.mark.parametrize("inside", MODES.values(), ids=MODES)
@pytest.mark.parametrize("on_leaving", MODES.values(), ids=MODES)
@in_place
@pytest.mark.parametrize(("weights", "dtype"), DTYPES)
def test_a_swap_is_entered_and_left_in_any_mode(
    inside: Callable[[], Any],
    on_leaving: Callable[[], Any],
    in_place: bool,
    weights: torch.dtype,
    dtype: torch.dtype | None,
) -> None:
    model = small_model(weights)
    optimizer = averaging_sgd(model, EMA(0.5), dtype=dtype)
    train(model, optimizer, 3)
    before = everything(model, optimizer)
    swap = optimizer.swap_to_averaged(in_place=in_place)
    with inside():
        swap.__enter__()
    with on_leaving():
        swap.__exit__(None, None, None)
    assert same(everything(model, optimizer), before)
    train(model, optimizer, 1, first=3)


def make(optimizer: AveragingOptimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    optimizer.averaged_model(model, "ema")


def update(optimizer: AveragingOptimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    optimizer.update_averages()


def load(optimizer: AveragingOptimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    optimizer.load_state_dict(saved)


def load_exported(optimizer: AveragingOptimizer, model: nn.Module, saved: dict[str, Any]) -> None:
    optimizer.load_averaged_state_dict(model, model.state_dict(), "ema")


@pytest.mark.parametrize("act", [make, update, load, load_exported])
def test_averages_that_inference_mode_has_made_are_averaged_outside_of_it(
    act: Callable[[AveragingOptimizer, nn.Module, dict[str, Any]], None],
) -> None:
    def run(mode: Callable[[], Any]) -> list[Tensor]:
        model = small_model()
        # Without momenta, which a bare SGD that has loaded them in this mode cannot train with.
        former, optimizer = (
            AveragingOptimizer(SGD(model.parameters(), lr=0.1), RULES) for _ in range(2)
        )
        train(model, former, 2)
        with mode():
            act(optimizer, model, copy.deepcopy(former.state_dict()))
        train(model, optimizer, 2, first=2)
        return [*averages(optimizer, "ema"), *averages(optimizer, "last")]

    assert same(run(torch.inference_mode), run(torch.enable_grad))


def test_what_parametrizations_have_cached_is_computed_again_inside_and_outside() -> None:
    model = parametrizations.weight_norm(nn.Linear(3, 2))
    optimizer = averaging_sgd(model, EMA(0.5))
    train(model, optimizer, 3)
    batch = torch.randn(4, 3)
    expected = model(batch)
    with optimizer.swap_to_averaged():
        averaged = model(batch)
    assert not same([averaged], [expected])
    with parametrize.cached():
        assert same([model(batch)], [expected])
        with optimizer.swap_to_averaged():
            assert same([model(batch)], [averaged])
        assert same([model(batch)], [expected])


@pytest.mark.parametrize("swaps_params", [True, False], ids=["swapped", "set"])
def test_a_model_that_is_cast_inside_has_the_training_weights_in_the_new_dtype(
    swaps_params: bool,
) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.5))
    train(model, optimizer, 3)
    expected = [weight.double() for weight in values(model.parameters())]
    former = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swaps_params)
    try:
        with optimizer.swap_to_averaged():
            for weight in model.parameters():
                weight.grad = None
            model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(former)
    assert same(model.parameters(), expected)


def test_a_weight_that_is_resized_inside_comes_back_in_its_former_shape() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), SWA())
    optimizer.update_averages()
    weight.data.fill_(3.0)
    with optimizer.swap_to_averaged():
        weight.data = torch.zeros(5)
    assert same([weight], [torch.full((2,), 3.0)])


@pytest.mark.parametrize(
    "transformed",
    [
        lambda f, x: torch.func.grad(f)(x),
        lambda f, x: torch.func.vmap(f)(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.vmap(torch.func.grad(f))(x),
    ],
    ids=["grad", "vmap", "jvp", "vmap_of_grad"],
)
def test_functions_that_torch_transforms_are_called_inside_a_swap_and_have_none_in_them(
    transformed: Callable[[Callable[[Tensor], Tensor], Tensor], Any],
) -> None:
    model = nn.Linear(3, 1)
    optimizer = averaging_sgd(model, EMA(0.5))
    train(model, optimizer, 3)
    before, x = everything(model, optimizer), torch.randn(2, 3)
    teacher = optimizer.averaged_model(model)

    def swapping(x: Tensor) -> Tensor:
        with optimizer.swap_to_averaged():
            total: Tensor = model(x).sum()
        return total

    with pytest.raises(RuntimeError, match="not allowed inside a function that torch"):
        transformed(swapping, x)
    assert same(everything(model, optimizer), before)
    with optimizer.swap_to_averaged():
        inside = transformed(lambda x: model(x).sum(), x)
    expected = transformed(lambda x: teacher(x).sum(), x)
    torch.testing.assert_close(inside, expected, rtol=0, atol=0)


def test_a_swap_is_a_context_manager_and_nothing_else() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.5))
    train(model, optimizer, 3)
    before = values(model.parameters())
    swap: Any = optimizer.swap_to_averaged()
    with pytest.raises(TypeError, match="not callable"):
        swap(lambda: None)
    with pytest.raises(RuntimeError, match="must be entered before it is left"):
        swap.__exit__(None, None, None)
    swap.__enter__()
    with pytest.raises(RuntimeError, match="must be called for each block"):
        swap.__enter__()
    assert same(model.parameters(), averages(optimizer, "ema"))
    swap.__exit__(None, None, None)
    assert same(model.parameters(), before)
    with pytest.raises(RuntimeError, match="must be entered before it is left"):
        swap.__exit__(None, None, None)
    with pytest.raises(RuntimeError, match="must be called for each block"):
        swap.__enter__()
    assert same(model.parameters(), before)


def test_a_swap_that_is_entered_and_not_kept_stays_entered() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.5))
    train(model, optimizer, 3)
    optimizer.swap_to_averaged().__enter__()
    assert same(model.parameters(), averages(optimizer, "ema"))
    with pytest.raises(RuntimeError, match="`step` is not allowed inside"):
        optimizer.step()


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.zeros(1).expand(3), "expanded"),
        (lambda: torch.zeros(3).to_sparse(), "torch.sparse_coo"),
        (lambda: quantized(torch.zeros(3)), "quantized"),
    ],
    ids=["expanded", "sparse", "quantized"],
)
def test_a_buffer_without_memory_of_its_own_is_refused(
    make: Callable[[], Tensor], kind: str
) -> None:
    sgd = SGD(small_model().parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=rf"`buffers` must contain .* got one that is {kind}.*Clone"
    ):
        AveragingOptimizer(sgd, EMA(), buffers=[make()])


def test_an_expanded_weight_is_refused() -> None:
    weight = nn.Parameter(torch.zeros(1))
    weight.data = weight.data.expand(3)
    with pytest.raises(ValueError, match=r"`optimizer` must contain .* that is expanded, of shape"):
        AveragingOptimizer(SGD([weight], lr=0.1), EMA())


def test_averages_of_8_bits_are_refused() -> None:
    sgd = SGD(small_model().parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"`dtype` must be one that torch can average in, got"):
        AveragingOptimizer(sgd, EMA(), dtype=torch.float8_e4m3fn)


def test_an_average_that_restarts_on_loading_is_the_present_weights_at_once() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, RULES, buffers=model.buffers())
    train(model, optimizer, 3)
    teacher = optimizer.averaged_model(model, "last")
    saved = averaging_sgd(model, {"ema": EMA(0.5)}, buffers=model.buffers())
    train(model, saved, 2, first=3)
    with pytest.warns(UserWarning, match="no average for 'last'"):
        optimizer.load_state_dict(saved.state_dict())
    assert same(averages(optimizer, "last"), model.parameters())
    assert same(teacher.parameters(), model.parameters())
    assert same(optimizer.averaged_state_dict(model, "last").values(), model.state_dict().values())
    weight = next(model.parameters())
    assert same([optimizer.state[weight]["averaged_last_1"]], [weight])
    kept = optimizer.state_dict()["averaged_buffers"]["last"]
    assert same(kept, model.buffers())


def test_a_checkpoint_is_checked_against_the_shapes_that_weights_have_now() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = AveragingOptimizer(SGD([weight], lr=0.1), SWA())
    optimizer.update_averages()
    saved = copy.deepcopy(optimizer.state_dict())
    weight.data = torch.ones(3)
    with pytest.raises(ValueError, match=r"\['averaged_swa'\]` must have the shape \(3,\), got"):
        optimizer.load_state_dict(saved)
    with pytest.warns(UserWarning, match="changed their shapes to"):
        assert same(averages(optimizer, "swa"), [torch.ones(3)])
