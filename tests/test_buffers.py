"""Buffers that go with the weights: followed by name, averaged or copied, saved and loaded."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from modules import compiled_in_ddp, in_ddp
from mutations import quantized
from torch import Tensor, nn
from torch.nn.utils import parametrizations, spectral_norm
from torch.optim import SGD
from torch.optim.swa_utils import (
    AveragedModel,
    get_ema_multi_avg_fn,
    get_swa_multi_avg_fn,
    update_bn,
)
from training import (
    as_it_is,
    first_layer,
    frozen,
    in_place,
    loss_of_batch,
    model_with_batch_norm,
    same,
    share,
    small_model,
    through_pickle,
    train,
    values,
)

from averaging_optim import EMA, LAWA, SWA, AveragingOptimizer, Rule

Named = dict[str, Tensor]


class Centred(nn.Module):
    """A layer whose statistics are other tensors after each forward."""

    def __init__(self) -> None:
        super().__init__()
        self.mean: Tensor
        self.batches: Tensor
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("batches", torch.tensor(0))

    def forward(self, batch: Tensor) -> Tensor:
        self.mean = 0.9 * self.mean + 0.1 * batch.mean(0)
        self.batches = self.batches + 1
        return batch - self.mean


class Layers(nn.Sequential):
    """Layers with statistics, and two buffers of their own that nobody writes."""

    def __init__(self) -> None:
        norm = nn.BatchNorm1d(4, affine=False)
        super().__init__(Centred(), nn.Linear(3, 4), norm, nn.Linear(4, 2))
        self.scale: Tensor
        self.shift: Tensor
        self.register_buffer("scale", torch.tensor([1.0, 2.0]))
        self.register_buffer("shift", torch.tensor([3.0, 4.0]))


def model_with_statistics() -> Layers:
    """Return the same model at each call."""
    torch.manual_seed(0)
    return Layers()


def averaging(model: nn.Module, rule: Rule | dict[str, Rule], **options: Any) -> AveragingOptimizer:
    """Return an optimizer that looks the model's buffers up by name."""
    options = {"buffers": model, **options}
    return AveragingOptimizer(SGD(model.parameters(), lr=0.1), rule, **options)


def copies(model: nn.Module) -> Named:
    return {name: buffer.detach().clone() for name, buffer in model.named_buffers()}


def averages_by_name(rule: Rule, kept: list[Named]) -> Named:
    """Return the average of each buffer, from what the model had at each update.

    One that comes later, or has another shape, starts at its present values.
    """
    averages: Named = {}
    for n, buffers in enumerate(kept):
        averages = {name: average(averages.get(name), buffers[name], rule, n) for name in buffers}
    return averages


def average(former: Tensor | None, buffer: Tensor, rule: Rule, n: int) -> Tensor:
    if not buffer.is_floating_point():
        return buffer
    if former is None or former.shape != buffer.shape or not former.is_floating_point():
        return buffer.float() if buffer.element_size() <= 2 else buffer
    return former.lerp(buffer.to(former.dtype), share(rule, n))


def assert_same_by_name(found: Named, expected: Named) -> None:
    assert list(found) == list(expected)
    assert same(found.values(), expected.values())


def saved_buffers(optimizer: AveragingOptimizer, name: str) -> Named:
    buffers: Named = optimizer.state_dict()["averaged_buffers"][name]
    return buffers


# What happens to buffers in the middle of a run.


def only_the_forward(model: Layers) -> None:
    pass


def to_double(model: Layers) -> None:
    model.double()


def to_bfloat16(model: Layers) -> None:
    model.to(torch.bfloat16)


def to_bfloat16_and_back(model: Layers) -> None:
    model.to(torch.bfloat16)
    model.to(torch.float32)


def to_other_memory(model: Layers) -> None:
    model.to_empty(device="cpu")
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.fill_(1)


def to_synchronised_norm(model: Layers) -> None:
    model[2] = nn.SyncBatchNorm.convert_sync_batchnorm(model[2])


def to_another_module(model: Layers) -> None:
    model[2] = nn.BatchNorm1d(4, affine=False, momentum=0.5)


def to_a_copied_module(model: Layers) -> None:
    model[0] = copy.deepcopy(model[0])


def to_a_module_without_buffers(model: Layers) -> None:
    model[2] = nn.BatchNorm1d(4, affine=False, track_running_stats=False)


def to_a_lazy_module(model: Layers) -> None:
    model[2] = nn.LazyBatchNorm1d(affine=False)


def assigned(model: Layers) -> None:
    model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True)


def deleted(model: Layers) -> None:
    del model.scale


def set_to_none(model: Layers) -> None:
    model.register_buffer("scale", None)


def added(model: Layers) -> None:
    model.register_buffer("offset", torch.tensor([8.0]))
    model[3].register_buffer("length", torch.tensor(2.5, dtype=torch.bfloat16))


def deleted_and_added(model: Layers) -> None:
    del model.scale
    model.register_buffer("scale", torch.tensor([[9.0]]))


def exchanged(model: Layers) -> None:
    model.scale, model.shift = model.shift, model.scale


def passed_on(model: Layers) -> None:
    """As a model does that keeps what it had before."""
    model.shift = model.scale
    model.scale = torch.tensor([7.0, 7.0])


def turned_into_another_kind(model: Layers) -> None:
    """An integer into a fraction, and the other way round."""
    model[2].register_buffer("num_batches_tracked", torch.tensor(1.5))
    model.scale = torch.tensor([7, 7])


def shared(model: Layers) -> None:
    model[3].register_buffer("scale", model.scale)


def shared_and_parted(model: Layers) -> None:
    """Casting makes two of a shared buffer."""
    model[3].register_buffer("scale", model.scale)
    model.double()


CHANGES = [
    only_the_forward,
    to_double,
    to_bfloat16,
    to_bfloat16_and_back,
    to_other_memory,
    to_synchronised_norm,
    to_another_module,
    to_a_copied_module,
    to_a_module_without_buffers,
    to_a_lazy_module,
    assigned,
    deleted,
    set_to_none,
    added,
    deleted_and_added,
    exchanged,
    passed_on,
    turned_into_another_kind,
    shared,
    shared_and_parted,
]


@pytest.mark.parametrize("change", CHANGES)
def test_the_average_of_a_buffer_follows_its_name_whatever_tensor_has_it(
    change: Callable[[Layers], None],
) -> None:
    model = model_with_statistics()
    rules: dict[str, Rule] = {"ema": EMA(0.75), "swa": SWA()}
    optimizer = averaging(model, rules)
    kept = []
    for step, act in enumerate([only_the_forward, only_the_forward, change, only_the_forward]):
        act(model)
        train(model, optimizer, 1, first=step)
        kept.append(copies(model))
    expected = {name: averages_by_name(rule, kept) for name, rule in rules.items()}
    assert frozen(optimizer.state_dict()["averaged_buffers"]) == frozen(expected)
    with optimizer.swap_to_averaged("swa"):
        inside = copies(model)
    present = {key: each.to(kept[-1][key].dtype) for key, each in expected["swa"].items()}
    assert_same_by_name(inside, present)
    assert_same_by_name(copies(model), kept[-1])


class Scaled(nn.Linear):
    """A layer with a factor."""

    def __init__(self) -> None:
        super().__init__(2, 2, bias=False)
        self.scale: Tensor
        self.register_buffer("scale", torch.ones(1))


class Tied(nn.Module):
    """A model whose two layers have one weight and one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Scaled(), Scaled()
        self.second.weight, self.second.scale = self.first.weight, self.first.scale


def test_the_parts_that_casting_makes_of_a_shared_buffer_all_have_its_average() -> None:
    model = Tied()
    optimizer = averaging(model, EMA(0.5))
    optimizer.update_averages()
    assert list(saved_buffers(optimizer, "ema")) == ["first.scale"]
    model.first.scale.fill_(5)
    optimizer.update_averages()
    model.double()
    averaged = torch.tensor([3.0])
    expected = {"first.scale": averaged, "second.scale": averaged}
    assert_same_by_name(saved_buffers(optimizer, "ema"), expected)
    with optimizer.swap_to_averaged():
        assert same(copies(model).values(), [averaged.double()] * 2)
    optimizer.update_averages()
    assert same(saved_buffers(optimizer, "ema").values(), [torch.tensor([4.0])] * 2)


def swa_of_floats(averages: Any, present: Any, n_averaged: Any) -> None:
    """As torch does, which fails over integers."""
    if averages[0].is_floating_point():
        get_swa_multi_avg_fn()(averages, present, n_averaged)


@pytest.mark.parametrize("use_buffers", [True, False], ids=["averaged", "copied"])
@pytest.mark.parametrize(
    ("rule", "multi_avg_fn"),
    [
        pytest.param(EMA(0.75), get_ema_multi_avg_fn(0.75), id="ema"),
        pytest.param(SWA(), swa_of_floats, id="swa"),
    ],
)
def test_floating_point_buffers_are_those_of_torchs_averaged_model(
    rule: Rule, multi_avg_fn: Any, use_buffers: bool
) -> None:
    model = model_with_statistics()
    optimizer = averaging(model, {"one": rule}, use_buffers=use_buffers)
    reference = AveragedModel(model, multi_avg_fn=multi_avg_fn, use_buffers=use_buffers)
    for step in range(4):
        train(model, optimizer, 1, first=step)
        reference.update_parameters(model)
    # torch averages counts too; here they are copied.
    expected = copies(reference.module) | {
        name: count for name, count in copies(model).items() if not count.is_floating_point()
    }
    assert_same_by_name(saved_buffers(optimizer, "one"), expected)
    with optimizer.swap_to_averaged():
        assert_same_by_name(copies(model), expected)


class Masked(nn.Module):
    """A layer whose mask is made anew when it is too short, as causal ones are."""

    def __init__(self, mask: Tensor, *, persistent: bool = True) -> None:
        super().__init__()
        self.mask: Tensor
        self.register_buffer("mask", mask, persistent=persistent)
        self.linear = nn.Linear(1, 1)


def causal(length: int) -> Tensor:
    return torch.full((length, length), -torch.inf).triu(1)


def test_masks_with_infinities_are_copied_at_each_update() -> None:
    model = Masked(causal(2))
    optimizer = averaging(model, {"ema": EMA(0.5), "last": LAWA(k=2)})
    for value in (0.0, 1.0):
        model.mask = causal(2) + value
        optimizer.update_averages()
    model.mask = causal(2) + 9
    with optimizer.swap_to_averaged("ema"):
        assert same([model.mask], [causal(2) + 1])
    with optimizer.swap_to_averaged("last"):
        assert same([model.mask], [causal(2) + 1])
    assert same([model.mask], [causal(2) + 9])


@pytest.mark.parametrize("make", [causal, torch.ones, torch.arange], ids=["mask", "float", "int"])
def test_a_cache_of_any_length_goes_with_the_averages_as_it_is_now(
    make: Callable[[int], Tensor],
) -> None:
    model = Masked(make(2))
    optimizer = averaging(model, EMA(0.5))
    for length in (2, 5, 3):
        model.mask = make(length)
        optimizer.update_averages()
        with optimizer.swap_to_averaged():
            assert same([model.mask], [make(length)])
    model.mask = make(7)
    with optimizer.swap_to_averaged():
        assert same([model.mask], [make(7)])


def spectral_by_hooks() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(spectral_norm(nn.Linear(3, 4)), nn.Tanh(), nn.Linear(4, 2))


def spectral_by_parametrizations() -> nn.Sequential:
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Tanh(), parametrizations.spectral_norm(nn.Linear(4, 2)))
    return nn.Sequential(nn.Linear(3, 4), inner)


@pytest.mark.parametrize("build", [spectral_by_hooks, spectral_by_parametrizations])
def test_under_the_swap_a_spectral_norm_computes_with_averaged_weights_and_present_vectors(
    build: Callable[[], nn.Sequential],
) -> None:
    """Means of unit vectors are shorter than these, and the norm would be off."""
    model = build()
    optimizer = averaging(model, SWA())
    kept: list[list[Tensor]] = []
    for step in range(4):
        train(model, optimizer, 1, first=step)
        kept.append(values(model.parameters()))
    by_hand = build()
    by_hand.load_state_dict(model.state_dict())
    with torch.no_grad():
        for i, weight in enumerate(by_hand.parameters()):
            weight.copy_(kept[0][i])
            for n in (1, 2, 3):
                weight.lerp_(kept[n][i], 1 / (n + 1))
    model.eval()
    by_hand.eval()
    with optimizer.swap_to_averaged():
        inside = loss_of_batch(model, 9)
    assert same([inside], [loss_of_batch(by_hand, 9)])


# Saved and loaded.


def with_statistics() -> tuple[nn.Module, AveragingOptimizer]:
    model = model_with_statistics()
    return model, averaging(model, {"ema": EMA(0.75), "swa": SWA(start=1)})


def with_snapshots_by_name() -> tuple[nn.Module, AveragingOptimizer]:
    model = model_with_statistics()
    return model, averaging(model, LAWA(k=2))


def with_copied_buffers() -> tuple[nn.Module, AveragingOptimizer]:
    model = model_with_statistics()
    return model, averaging(model, EMA(0.75), use_buffers=False)


def with_spectral_norm() -> tuple[nn.Module, AveragingOptimizer]:
    model = spectral_by_parametrizations()
    return model, averaging(model, EMA(0.75))


RUNS = [with_statistics, with_snapshots_by_name, with_copied_buffers, with_spectral_norm]
Run = tuple[nn.Module, AveragingOptimizer]


@pytest.mark.parametrize("start", RUNS)
def test_resuming_equals_never_stopping(start: Callable[[], Run], tmp_path: Path) -> None:
    model, optimizer = start()
    train(model, optimizer, 3)
    path = tmp_path / "checkpoint.pt"
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    train(model, optimizer, 3, first=3)

    resumed_model, resumed = start()
    checkpoint = torch.load(path, weights_only=True)
    resumed_model.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    train(resumed_model, resumed, 3, first=3)
    assert frozen(resumed.state_dict()) == frozen(optimizer.state_dict())
    assert frozen(resumed_model.state_dict()) == frozen(model.state_dict())


@pytest.mark.parametrize("start", RUNS)
def test_buffers_are_saved_under_the_names_that_they_have_in_the_model(
    start: Callable[[], Run],
) -> None:
    model, optimizer = start()
    train(model, optimizer, 3)
    saved = optimizer.state_dict()["averaged_buffers"]
    assert all(list(each) == list(copies(model)) for each in saved.values())
    assert all(isinstance(each, dict) for each in saved.values())


@pytest.mark.parametrize("from_names", [True, False], ids=["names_to_list", "list_to_names"])
def test_averages_saved_in_a_list_are_loaded_by_name_and_the_other_way_round(
    from_names: bool,
) -> None:
    def begin(by_name: bool) -> Run:
        model = model_with_batch_norm()
        buffers = model if by_name else model.buffers()
        return model, averaging(model, {"ema": EMA(0.75), "last": LAWA(k=2)}, buffers=buffers)

    model, optimizer = begin(from_names)
    train(model, optimizer, 3)
    other_model, other = begin(not from_names)
    other_model.load_state_dict(model.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for run in ((model, optimizer), (other_model, other)):
        train(*run, 2, first=3)
    expected = {key: kept_in(each) for key, each in buffers_of(optimizer).items()}
    assert {key: kept_in(each) for key, each in buffers_of(other).items()} == expected


def buffers_of(optimizer: AveragingOptimizer) -> dict[str, Any]:
    buffers: dict[str, Any] = optimizer.state_dict()["averaged_buffers"]
    return buffers


def kept_in(saved: Named | list[Tensor]) -> Any:
    return frozen(list(saved.values()) if isinstance(saved, dict) else saved)


Damage = Callable[[dict[str, Any]], object]
ENTRY = r"`averaged_buffers\['ema'\]\['{}'\]` "
DAMAGES: dict[str, tuple[Damage, str]] = {
    "unknown": (
        lambda saved: saved.update({"2.running": torch.ones(1)}),
        r"`averaged_buffers\['ema'\]` must contain buffers of the model only, got '2\.running'\.",
    ),
    "missing": (
        lambda saved: saved.pop("2.running_mean"),
        ENTRY.format(r"2\.running_mean") + r"must be a tensor, got None\.",
    ),
    "shape": (
        lambda saved: saved.update({"0.mean": torch.ones(4)}),
        ENTRY.format(r"0\.mean") + r"must have the shape \(3,\), got \(4,\)\.",
    ),
    "dimensions": (
        lambda saved: saved.update({"0.batches": torch.tensor([1])}),
        ENTRY.format(r"0\.batches") + r"must have the shape \(\), got \(1,\)\.",
    ),
    "kind": (
        lambda saved: saved.update({"0.mean": torch.ones(3).long()}),
        ENTRY.format(r"0\.mean") + r"must be floating-point, got torch\.int64\.",
    ),
    "text": (
        lambda saved: saved.update({"0.mean": "x"}),
        ENTRY.format(r"0\.mean") + r"must be a tensor, got 'x'\.",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_wrong_names_and_values_are_refused_and_change_nothing(damage: str) -> None:
    model, optimizer = with_statistics()
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    act, message = DAMAGES[damage]
    act(saved["averaged_buffers"]["ema"])
    train(model, optimizer, 1, first=3)
    before = frozen(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert frozen(optimizer.state_dict()) == before


@pytest.mark.parametrize("length", [2, 5], ids=["shorter", "longer"])
@pytest.mark.parametrize("make", [causal, torch.ones], ids=["mask", "float"])
def test_caches_that_the_model_does_not_save_are_saved_with_no_average_either(
    make: Callable[[int], Tensor], length: int
) -> None:
    def begin() -> tuple[Masked, AveragingOptimizer]:
        model = Masked(make(2), persistent=False)
        return model, averaging(model, {"ema": EMA(0.5), "last": LAWA(k=2)})

    model, optimizer = begin()
    model.mask = make(3)
    optimizer.update_averages()
    saved = optimizer.state_dict()
    assert "averaged_buffers" not in saved
    other_model, other = begin()
    other_model.mask = make(length)
    other.update_averages()
    other_model.mask = make(length) + 1
    other.load_state_dict(saved)
    with other.swap_to_averaged("ema"):
        assert same([other_model.mask], [make(length) + 1])


@pytest.mark.parametrize("saved_as", [dict, list])
@pytest.mark.parametrize(
    ("make", "persistent"),
    [(causal, True), (causal, False), (torch.ones, False)],
    ids=["mask", "mask_not_saved", "float_not_saved"],
)
def test_a_cache_that_has_another_length_than_the_saved_one_stays_what_it_is(
    make: Callable[[int], Tensor], persistent: bool, saved_as: Callable[[Any], Any]
) -> None:
    model = Masked(make(2), persistent=persistent)
    optimizer = averaging(model, EMA(0.5))
    optimizer.update_averages()
    saved = optimizer.state_dict()
    average = {"mask": make(5)}
    # 0.1.0 saves all buffers, in a list.
    saved["averaged_buffers"] = {"ema": average if saved_as is dict else [*average.values()]}
    optimizer.load_state_dict(saved)
    with optimizer.swap_to_averaged():
        assert same([model.mask], [make(2)])


@pytest.mark.parametrize("cache", [None, torch.zeros(1)], ids=["not_yet", "made"])
def test_a_cache_that_is_made_in_the_forward_may_be_there_or_not_when_averages_are_loaded(
    cache: Tensor | None,
) -> None:
    def begin() -> Run:
        model = model_with_batch_norm()
        model.register_buffer("cache", None, persistent=False)
        return model, averaging(model, EMA(0.75))

    model, optimizer = begin()
    model.register_buffer("cache", torch.ones(2), persistent=False)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    other_model, other = begin()
    other_model.register_buffer("cache", cache, persistent=False)
    other.load_state_dict(saved)
    assert frozen(other.state_dict()) == frozen(saved)


def compiled_inside(model: nn.Sequential) -> None:
    layer: Any = torch.compile(model[1])
    model[1] = layer


def in_data_parallel_inside(model: nn.Sequential) -> None:
    model[1] = nn.DataParallel(model[1])


@pytest.mark.parametrize("wrap", [compiled_inside, in_data_parallel_inside])
@pytest.mark.parametrize("loads_wrapped", [False, True], ids=["saved_wrapped", "loads_wrapped"])
def test_parts_of_a_model_may_be_wrapped_when_it_is_saved_and_not_when_it_is_loaded(
    wrap: Callable[[nn.Sequential], None], loads_wrapped: bool
) -> None:
    model, other_model = model_with_batch_norm(), model_with_batch_norm()
    optimizer = averaging(model, EMA(0.75))
    train(model, optimizer, 2)
    before = frozen(optimizer.state_dict())
    wrap(other_model if loads_wrapped else model)
    saved = optimizer.state_dict()
    assert frozen(saved) == before
    other = averaging(other_model, EMA(0.75))
    other.load_state_dict(saved)
    assert frozen(other.state_dict()) == frozen(saved)


def deep_copied(model: nn.Module, optimizer: AveragingOptimizer) -> Run:
    return copy.deepcopy((model, optimizer))


def pickled(model: nn.Module, optimizer: AveragingOptimizer) -> Run:
    run: Run = through_pickle((model, optimizer))
    return run


# torch refuses to pickle the modules of parametrizations.
@pytest.mark.parametrize("copied", [deep_copied, pickled])
@pytest.mark.parametrize("start", [with_statistics, with_snapshots_by_name, with_copied_buffers])
def test_a_model_copied_with_its_optimizer_trains_like_the_first_one_and_apart_from_it(
    start: Callable[[], Run], copied: Callable[[nn.Module, AveragingOptimizer], Run]
) -> None:
    model, optimizer = start()
    train(model, optimizer, 2)
    other_model, other = copied(model, optimizer)
    before = frozen(optimizer.state_dict()), frozen(model.state_dict())
    train(other_model, other, 2, first=2)
    assert (frozen(optimizer.state_dict()), frozen(model.state_dict())) == before
    train(model, optimizer, 2, first=2)
    assert frozen(other.state_dict()) == frozen(optimizer.state_dict())
    assert frozen(other_model.state_dict()) == frozen(model.state_dict())


# Inside a swap.


@pytest.fixture(params=[False, True], ids=["data_set", "parameters_replaced"])
def conversion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Let casting set the data of parameters, or replace parameters, as buffers always are."""
    before = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(request.param)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(before)


def forward(model: nn.Sequential) -> None:
    loss_of_batch(model, 7)


@pytest.mark.usefixtures("conversion")
@in_place
@pytest.mark.parametrize(
    ("replace", "dtype"),
    [
        (forward, torch.float32),
        (to_double, torch.float64),
        (to_bfloat16, torch.bfloat16),
        (to_other_memory, torch.float32),
        (assigned, torch.float32),
        (to_synchronised_norm, torch.float32),
    ],
)
def test_whatever_is_replaced_inside_a_swap_holds_the_training_values_after_it(
    replace: Callable[[nn.Sequential], None], dtype: torch.dtype, in_place: bool
) -> None:
    model = model_with_statistics()
    optimizer = averaging(model, EMA(0.5))
    train(model, optimizer, 3)
    expected = [
        each.to(dtype) if each.is_floating_point() else each
        for each in values(model.state_dict().values())
    ]
    with optimizer.swap_to_averaged(in_place=in_place):
        replace(model)
        assert not same(model.state_dict().values(), expected)
    assert same(model.state_dict().values(), expected)


@pytest.mark.usefixtures("conversion")
@in_place
def test_all_parts_that_casting_inside_a_swap_makes_of_what_is_tied_are_restored(
    in_place: bool,
) -> None:
    model = Tied()
    optimizer = averaging(model, SWA())
    optimizer.update_averages()
    with torch.no_grad():
        model.first.weight.fill_(5)
        model.first.scale.fill_(7)
    expected = [each.double() for each in model.state_dict().values()]
    with optimizer.swap_to_averaged(in_place=in_place):
        model.double()
    assert same(model.state_dict().values(), expected)


@pytest.mark.parametrize(
    "replace",
    [
        lambda scale: torch.zeros(1).expand(2),
        lambda scale: torch.zeros(5),
        lambda scale: torch.zeros(2).requires_grad_() * 2,
        lambda scale: torch.zeros(2, dtype=torch.float64),
    ],
    ids=["expanded", "longer", "of_a_graph", "double"],
)
def test_a_buffer_of_any_making_inside_a_swap_holds_the_training_values_after_it(
    replace: Callable[[Tensor], Tensor],
) -> None:
    model = model_with_statistics()
    optimizer = averaging(model, EMA(0.5))
    train(model, optimizer, 3)
    model.scale.fill_(6)
    expected = values(model.parameters())
    with optimizer.swap_to_averaged():
        model.scale = replace(model.scale)
    assert same([model.scale.float()], [torch.tensor([6.0, 6.0])])
    assert same(model.parameters(), expected)
    train(model, optimizer, 1, first=3)


def test_update_bn_inside_a_swap_is_safe_for_buffers_that_are_replaced_at_each_forward() -> None:
    model = model_with_statistics()
    optimizer = averaging(model, EMA(0.5))
    train(model, optimizer, 3)
    before = frozen(model.state_dict()), frozen(optimizer.state_dict())
    batches = [torch.randn(8, 3, generator=torch.Generator().manual_seed(9))]
    with optimizer.swap_to_averaged():
        by_hand = copy.deepcopy(model)
        update_bn(batches, model)
        inside = frozen(model.state_dict())
    assert (frozen(model.state_dict()), frozen(optimizer.state_dict())) == before
    update_bn(batches, by_hand)
    assert inside == frozen(by_hand.state_dict())


# Models that are wrapped, and tensors that are given instead of a model.


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    "wrap", [as_it_is, in_ddp, nn.DataParallel, torch.compile, compiled_in_ddp]
)
def test_names_are_those_of_the_model_inside_whatever_wraps_it(
    wrap: Callable[[Any], nn.Module],
) -> None:
    model = model_with_batch_norm()
    wrapped = wrap(model)
    optimizer = averaging(wrapped, EMA(0.75), buffers=wrapped)
    kept = []
    for step in range(3):
        train(model, optimizer, 1, first=step)
        kept.append(copies(model))
    assert_same_by_name(saved_buffers(optimizer, "ema"), averages_by_name(EMA(0.75), kept))


def averaged_model(model: nn.Module, optimizer: AveragingOptimizer) -> None:
    optimizer.averaged_model(model)


def averaged_state_dict(model: nn.Module, optimizer: AveragingOptimizer) -> None:
    optimizer.averaged_state_dict(model)


def load_averaged_state_dict(model: nn.Module, optimizer: AveragingOptimizer) -> None:
    optimizer.load_averaged_state_dict(model, model.state_dict())


CALLS = [averaged_model, averaged_state_dict, load_averaged_state_dict]


@pytest.mark.parametrize("call", CALLS)
def test_calls_that_are_given_the_model_tell_that_it_has_not_the_buffers_any_more(
    call: Callable[[nn.Module, AveragingOptimizer], None],
) -> None:
    model = model_with_batch_norm()
    optimizer = averaging(model, EMA(0.5), buffers=model.buffers())
    train(model, optimizer, 1)
    model.to(torch.float64)
    with pytest.warns(UserWarning, match=r"Pass `buffers=model`, which follows them\.") as caught:
        call(model, optimizer)
    assert [each.filename for each in caught] == [__file__]


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("given", ["model", "tensors"])
def test_calls_that_are_given_the_model_say_nothing_while_its_buffers_are_followed(
    call: Callable[[nn.Module, AveragingOptimizer], None], given: str
) -> None:
    model = model_with_batch_norm()
    buffers = model if given == "model" else list(model.buffers())
    optimizer = averaging(model, EMA(0.5), buffers=buffers)
    train(model, optimizer, 1)
    if given == "model":
        model.to(torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(model, optimizer)


# What can't be buffers.


def expanded() -> Tensor:
    return torch.ones(1).expand(3)


def of_8_bits() -> Tensor:
    return quantized(torch.ones(3))


def sparse() -> Tensor:
    return torch.ones(3).to_sparse()


@pytest.mark.parametrize("make", [expanded, sparse, of_8_bits])
def test_an_expanded_sparse_or_quantized_buffer_is_refused(
    make: Callable[[], Tensor],
) -> None:
    model = small_model()
    model[0].register_buffer("mask", make())
    message = (
        r"`buffers` must contain tensors .* got '0\.mask' that is .*, of shape \(3,\)\. Clone it"
    )
    with pytest.raises(ValueError, match=message):
        averaging(model, EMA())


def test_a_trained_parameter_that_is_a_buffer_too_is_refused() -> None:
    model = small_model()
    model[2].register_buffer("same", first_layer(model).weight)
    message = r"`buffers` must contain no trained parameter, got '2\.same'\."
    with pytest.raises(ValueError, match=message):
        averaging(model, EMA())


@pytest.mark.parametrize(
    ("buffers", "message"),
    [
        (None, "`buffers` must be a model or an iterable of tensors, got None."),
        (3, "`buffers` must be a model or an iterable of tensors, got 3."),
        (nn.Linear, "`buffers` must be a model or an iterable of tensors, got <class"),
        (torch.ones(2), "`buffers` must be a model or an iterable of tensors, got tensor"),
        (["mean"], "`buffers` must contain tensors, got 'mean'."),
        ({"mean": torch.ones(1)}, "`buffers` must contain tensors, got 'mean'."),
        ([nn.Linear(1, 1)], "`buffers` must contain tensors, got Linear"),
    ],
    ids=["none", "number", "class", "tensor", "names", "dict", "models"],
)
def test_what_is_neither_a_model_nor_tensors_is_refused(buffers: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        averaging(small_model(), EMA(), buffers=buffers)


@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_use_buffers_is_a_bool(value: Any) -> None:
    with pytest.raises(TypeError, match=f"`use_buffers` must be True or False, got {value!r}"):
        averaging(small_model(), EMA(), use_buffers=value)


# Modules that are not made yet.


def lazy_model(*, is_made: bool) -> nn.Sequential:
    torch.manual_seed(0)
    norm = nn.LazyBatchNorm1d()
    model = nn.Sequential(nn.LazyLinear(4), norm, nn.LazyLinear(2))
    if is_made:
        model(torch.zeros(2, 3))
        nn.BatchNorm1d.reset_running_stats(norm)
    return model


def test_lazy_parameters_and_buffers_are_averaged_as_if_they_had_been_made_before() -> None:
    def averaged(model: nn.Sequential) -> dict[str, Any]:
        optimizer = averaging(model, EMA(0.5))
        torch.manual_seed(0)
        assert optimizer.state_dict()["state"] == {}
        train(model, optimizer, 3)
        return optimizer.averaged_state_dict(model)

    made, lazy = lazy_model(is_made=True), lazy_model(is_made=False)
    assert frozen(averaged(lazy)) == frozen(averaged(made))


@pytest.mark.parametrize(
    "call",
    [
        AveragingOptimizer.check_model,
        AveragingOptimizer.averaged_model,
        AveragingOptimizer.averaged_state_dict,
        lambda optimizer, model: optimizer.load_averaged_state_dict(model, {}),
    ],
)
def test_calls_that_are_given_no_model_are_refused(
    call: Callable[[AveragingOptimizer, Any], object],
) -> None:
    optimizer = averaging(model := model_with_batch_norm(), EMA(0.5))
    with pytest.raises(TypeError, match=r"^`model` must be a torch\.nn\.Module, got <generator"):
        call(optimizer, model.parameters())
