"""A model whose parameters are averages follows them, whatever becomes of either model."""

from __future__ import annotations

import copy
import gc
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any
from weakref import ref

import pytest
import torch
import torch.distributed as dist
from modules import Adapted, compiled, in_ddp, with_frozen_base
from torch import Tensor, nn
from torch.optim import SGD
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from training import (
    TWO_RULES,
    averages,
    averaging_sgd,
    first_layer,
    frozen,
    loss_of_batch,
    model_with_batch_norm,
    same,
    small_model,
    through_pickle,
    train,
    values,
)

from averaging_optim import EMA, LAWA, AveragingOptimizer


def kept_of(optimizer: AveragingOptimizer, weight: Tensor) -> Tensor:
    """Return the average of a weight, itself if it has none."""
    kept: Tensor = optimizer.state[weight].get("averaged_ema", weight)
    return kept


def assert_is_the_average(
    teacher: nn.Module, model: nn.Module, optimizer: AveragingOptimizer
) -> None:
    for own, weight in zip(teacher.parameters(), model.parameters(), strict=True):
        kept = kept_of(optimizer, weight)
        assert (own.data_ptr(), own.shape, own.dtype) == (kept.data_ptr(), kept.shape, kept.dtype)
        assert isinstance(own, nn.Parameter)
        assert not own.requires_grad


def go_on(model: nn.Sequential, optimizer: AveragingOptimizer) -> None:
    train(model, optimizer, 3)


def load(model: nn.Sequential, optimizer: AveragingOptimizer) -> None:
    other = small_model()
    saved = averaging_sgd(other, EMA(0.9))
    train(other, saved, 2, first=5)
    optimizer.load_state_dict(saved.state_dict())


def load_exported(model: nn.Sequential, optimizer: AveragingOptimizer) -> None:
    ones = {key: torch.ones_like(each) for key, each in model.state_dict().items()}
    optimizer.load_averaged_state_dict(model, ones)


def load_plain(model: nn.Sequential, optimizer: AveragingOptimizer) -> None:
    with pytest.warns(UserWarning, match="no average for 'ema'"):
        optimizer.load_state_dict(SGD(small_model().parameters(), lr=0.1).state_dict())


def restart(model: nn.Sequential, optimizer: AveragingOptimizer) -> None:
    optimizer.restart()


def widen(model: nn.Sequential, optimizer: AveragingOptimizer) -> None:
    weight = first_layer(model).weight
    weight.data = torch.ones(5, 3)
    with pytest.warns(UserWarning, match=r"changed their shapes to \(5, 3\)"):
        optimizer.update_averages()


def replace(model: nn.Sequential, optimizer: AveragingOptimizer) -> None:
    weight = first_layer(model).weight
    weight.data = torch.ones(2, 3)
    optimizer.state[weight]["averaged_ema"] = torch.full((2, 3), 7.0)
    optimizer.update_averages()


def drop(model: nn.Sequential, optimizer: AveragingOptimizer) -> None:
    del optimizer.state[first_layer(model).weight]["averaged_ema"]
    optimizer.update_averages()


def freeze(model: nn.Sequential, optimizer: AveragingOptimizer) -> None:
    first_layer(model).requires_grad_(False)
    train(model, optimizer, 2)


def cast(model: nn.Sequential, optimizer: AveragingOptimizer) -> None:
    model.double()
    train(model, optimizer, 2)


def cast_into_other_memory(model: nn.Sequential, optimizer: AveragingOptimizer) -> None:
    for weight in model.parameters():
        weight.data = weight.data.clone()
    train(model, optimizer, 2)


@pytest.mark.parametrize(
    "act",
    [
        go_on,
        load,
        load_exported,
        load_plain,
        restart,
        widen,
        replace,
        drop,
        freeze,
        cast,
        cast_into_other_memory,
    ],
)
@pytest.mark.parametrize("is_new", [True, False], ids=["from_the_start", "later"])
def test_parameters_stay_the_averages_in_their_memory(
    act: Callable[[nn.Sequential, AveragingOptimizer], None], is_new: bool
) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9))
    train(model, optimizer, 0 if is_new else 2)
    teacher = optimizer.averaged_model(model)
    assert_is_the_average(teacher, model, optimizer)
    act(model, optimizer)
    assert_is_the_average(teacher, model, optimizer)


def test_a_parameter_that_is_unfrozen_is_the_models_own_before_and_the_average_after() -> None:
    model = small_model()
    first_layer(model).requires_grad_(False)
    optimizer = averaging_sgd(model, EMA(0.9))
    teacher = optimizer.averaged_model(model)
    train(model, optimizer, 2)
    weight = first_layer(model).weight
    assert first_layer(teacher).weight.data_ptr() == weight.data_ptr()
    first_layer(model).requires_grad_(True)
    train(model, optimizer, 2, first=2)
    assert_is_the_average(teacher, model, optimizer)
    assert not same([first_layer(teacher).weight], [weight])


def test_until_its_first_update_a_model_holds_the_weights_and_then_the_average() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9))
    teacher = optimizer.averaged_model(model)
    assert same(teacher.parameters(), small_model().parameters())
    train(model, optimizer, 3)
    assert same(teacher.parameters(), averages(optimizer, "ema"))
    assert not same(teacher.parameters(), model.parameters())


def test_an_update_before_the_first_step_starts_the_average_at_the_initial_weights() -> None:
    """As mean teacher, BYOL and DINO have it, whose teachers begin as copies."""
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9))
    optimizer.update_averages()
    teacher = optimizer.averaged_model(model)
    expected = values(model.parameters())
    for weights in train(model, optimizer, 4):
        expected = [a.lerp(w, 1 - 0.9) for a, w in zip(expected, weights, strict=True)]
    assert same(teacher.parameters(), expected)


def test_each_average_has_models_of_its_own() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, {**TWO_RULES, "last": LAWA(k=2)})
    teachers = {name: optimizer.averaged_model(model, name) for name in optimizer.rules}
    again = optimizer.averaged_model(model, "swa")
    train(model, optimizer, 4)
    found = {name: frozen(values(each.parameters())) for name, each in teachers.items()}
    assert found == {name: frozen(averages(optimizer, name)) for name in optimizer.rules}
    assert len(set(found.values())) == 3
    assert same(again.parameters(), averages(optimizer, "swa"))


def test_models_that_are_made_in_inference_mode_follow_outside_of_it() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, EMA(0.9))
    with torch.inference_mode():
        teacher = optimizer.averaged_model(model)
    train(model, optimizer, 3)
    assert_is_the_average(teacher, model, optimizer)
    assert same(teacher.buffers(), model.buffers())
    assert not any(each.is_inference() for each in teacher.state_dict().values())


# Buffers, against torch's AveragedModel and a mean teacher written by hand.


def averaged_by_torch(model: nn.Module, use_buffers: bool) -> AveragedModel:
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=use_buffers)


@pytest.mark.parametrize("is_eval", [True, False], ids=["eval_at_once", "eval_at_the_end"])
@pytest.mark.parametrize("use_buffers", [True, False], ids=["averaged", "copied"])
def test_an_evaluated_model_with_batch_norm_is_torchs_averaged_model(
    use_buffers: bool, is_eval: bool
) -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, EMA(0.9), buffers=model.buffers() if use_buffers else ())
    teacher, expected = optimizer.averaged_model(model), averaged_by_torch(model, use_buffers)
    teacher.train(not is_eval)
    expected.eval()
    losses: list[tuple[Tensor, Tensor]] = []
    for step in range(5):
        train(model, optimizer, 1, first=step)
        expected.update_parameters(model)
        if is_eval:
            losses.append((loss_of_batch(teacher, step), loss_of_batch(expected, step)))
    teacher.eval()
    losses.append((loss_of_batch(teacher, 9), loss_of_batch(expected, 9)))
    assert same([ours for ours, _ in losses], [theirs for _, theirs in losses])
    # torch averages integers too, and truncates them.
    floating = [each for each in expected.module.buffers() if each.is_floating_point()]
    assert same([each for each in teacher.buffers() if each.is_floating_point()], floating)
    assert list(teacher.buffers())[-1].item() == 5


class Whitening(nn.Module):
    """A layer that keeps its mean by putting another tensor in its place."""

    mean: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(4))
        self.former: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.former.append(self.mean)
            self.mean = self.mean.clone().lerp_(x.mean(0).detach(), 0.5)
        return x - self.mean


NORMS: dict[str, Callable[[], nn.Module]] = {
    "batch": lambda: nn.BatchNorm1d(4),
    "cumulative": lambda: nn.BatchNorm1d(4, momentum=None),
    "assigned": Whitening,
}


def student_with(norm: str) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), NORMS[norm](), nn.Linear(4, 2))


class WrittenByHand:
    """A mean teacher: a module of its own, whose weights move toward the student's."""

    def __init__(self, student: nn.Module) -> None:
        self.module = copy.deepcopy(student).requires_grad_(False)
        self.is_first = True

    def update(self, student: nn.Module) -> None:
        for own, weight in zip(self.module.parameters(), student.parameters(), strict=True):
            own.lerp_(weight.detach(), 1 if self.is_first else 1 - 0.9)
        self.is_first = False


@pytest.mark.parametrize("with_buffers", [True, False], ids=["buffers_averaged", "not_averaged"])
@pytest.mark.parametrize("norm", NORMS)
def test_a_model_in_train_mode_keeps_statistics_of_its_own_as_a_mean_teacher_does(
    norm: str, with_buffers: bool
) -> None:
    def run(by_hand: bool) -> tuple[list[Tensor], nn.Module, nn.Module, AveragingOptimizer]:
        student = student_with(norm)
        buffers: Any = student if with_buffers else ()
        optimizer = AveragingOptimizer(SGD(student.parameters(), lr=0.1), EMA(0.9), buffers=buffers)
        written = WrittenByHand(student)
        teacher = written.module if by_hand else optimizer.averaged_model(student)
        losses = []
        for step in range(6):
            optimizer.zero_grad()
            # Another batch than the student's, so that its statistics are others.
            consistency = (loss_of_batch(teacher, 100 + step) - loss_of_batch(student, step)).abs()
            (loss_of_batch(student, step) + consistency).backward()
            optimizer.step()
            written.update(student)
            losses.append(consistency.detach())
        return losses, student, teacher, optimizer

    losses, student, teacher, optimizer = run(by_hand=False)
    expected_losses, expected_student, expected_teacher, other = run(by_hand=True)
    assert same(losses, expected_losses)
    assert same(teacher.state_dict().values(), expected_teacher.state_dict().values())
    assert same(student.state_dict().values(), expected_student.state_dict().values())
    assert frozen(optimizer.state_dict()) == frozen(other.state_dict())
    assert not same(teacher.buffers(), student.buffers())
    teacher.eval()
    optimizer.update_averages()
    followed = optimizer.averaged_state_dict(student) if with_buffers else student.state_dict()
    assert same(teacher.buffers(), [followed[key] for key, _ in student.named_buffers()])


def load_all(model: nn.Module, optimizer: AveragingOptimizer, saved: dict[str, Any]) -> None:
    optimizer.load_state_dict(saved)


def load_buffers(model: nn.Module, optimizer: AveragingOptimizer, saved: dict[str, Any]) -> None:
    optimizer.averaged_buffers.load_state_dict(
        {"n_averaged_ema": 1, "averaged_buffers": saved["averaged_buffers"]}
    )


def load_export(model: nn.Module, optimizer: AveragingOptimizer, saved: dict[str, Any]) -> None:
    buffers = saved["averaged_buffers"]["ema"]
    optimizer.load_averaged_state_dict(model, {**model.state_dict(), **buffers})


@pytest.mark.parametrize("act", [load_all, load_buffers, load_export])
def test_buffers_follow_when_their_averages_are_loaded(
    act: Callable[[nn.Module, AveragingOptimizer, dict[str, Any]], None],
) -> None:
    model, other = model_with_batch_norm(), model_with_batch_norm()
    optimizer = averaging_sgd(model, EMA(0.9), buffers=model)
    teacher = optimizer.averaged_model(model)
    former = averaging_sgd(other, EMA(0.9), buffers=other)
    train(other, former, 2)
    train(model, optimizer, 1)
    saved = former.state_dict()
    act(model, optimizer, saved)
    assert same(teacher.buffers(), saved["averaged_buffers"]["ema"].values())


def test_buffers_follow_when_an_average_restarts() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, EMA(0.9), buffers=model)
    teacher = optimizer.averaged_model(model)
    train(model, optimizer, 2)
    optimizer.restart()
    assert same(teacher.state_dict().values(), model.state_dict().values())


def test_buffers_that_are_not_averaged_have_the_dtype_of_averages_so_that_modules_run() -> None:
    model = model_with_batch_norm().bfloat16()
    optimizer = averaging_sgd(model, EMA(0.9))
    teacher = optimizer.averaged_model(model).eval()
    train(model, optimizer, 3)
    loss_of_batch(teacher, 0)
    floating = [each for each in model.buffers() if each.is_floating_point()]
    assert same(list(teacher.buffers())[:2], [each.float() for each in floating])


def test_buffers_that_are_not_averaged_are_where_the_averages_are() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, EMA(0.9), device="meta")
    teacher = optimizer.averaged_model(model)
    train(model, optimizer, 1)
    assert {each.device.type for each in teacher.state_dict().values()} == {"meta"}


def test_a_buffer_that_grows_is_followed() -> None:
    model = nn.Linear(3, 2)
    model.register_buffer("cache", torch.zeros(2))
    optimizer = averaging_sgd(model, EMA(0.9))
    teacher = optimizer.averaged_model(model)
    model.register_buffer("cache", torch.arange(5.0))
    train(model, optimizer, 1)
    assert same(teacher.buffers(), [torch.arange(5.0)])


# What is not averaged.


def with_base_in_no_optimizer() -> tuple[nn.Module, AveragingOptimizer]:
    model = Adapted()
    adapters = [*model.down.parameters(), *model.up.parameters()]
    return model, AveragingOptimizer(SGD(adapters, lr=0.1), EMA(0.9))


def with_base_in_a_group_without_averages() -> tuple[nn.Module, AveragingOptimizer]:
    model = Adapted().requires_grad_(True)
    groups: list[dict[str, Any]] = [
        {"params": [*model.down.parameters(), *model.up.parameters()]},
        {"params": [*model.base.parameters()], "average": False},
    ]
    return model, AveragingOptimizer(SGD(groups, lr=0.1), EMA(0.9))


def with_base_excluded() -> tuple[nn.Module, AveragingOptimizer]:
    model = Adapted().requires_grad_(True)
    sgd = SGD(model.parameters(), lr=0.1)
    return model, AveragingOptimizer(sgd, EMA(0.9), exclude=list(model.base.parameters()))


@pytest.mark.parametrize(
    "build",
    [
        with_frozen_base,
        with_base_in_no_optimizer,
        with_base_in_a_group_without_averages,
        with_base_excluded,
    ],
)
@pytest.mark.parametrize("has_instance", [False, True], ids=["copied", "into"])
def test_what_is_not_averaged_is_shared_with_the_model_and_takes_no_memory(
    build: Callable[[], tuple[Any, AveragingOptimizer]], has_instance: bool
) -> None:
    model, optimizer = build()
    teacher = optimizer.averaged_model(model, into=Adapted() if has_instance else None)
    train(model, optimizer, 3)
    model.load_state_dict({key: each + 1 for key, each in model.state_dict().items()})
    for own, weight in zip(teacher.base.parameters(), model.base.parameters(), strict=True):
        assert own.data_ptr() == weight.data_ptr()
        assert own is not weight
    assert not any(each.requires_grad for each in teacher.parameters())
    adapters = [model.down.weight, model.up.weight]
    assert same(
        [teacher.down.weight, teacher.up.weight], [kept_of(optimizer, each) for each in adapters]
    )
    assert not same([teacher.down.weight, teacher.up.weight], adapters)


def test_what_is_not_averaged_follows_the_model_when_it_is_moved() -> None:
    model, optimizer = with_base_in_no_optimizer()
    teacher = optimizer.averaged_model(model)
    model.double()
    train(model, optimizer, 1)
    assert same(
        teacher.get_submodule("base").parameters(), model.get_submodule("base").parameters()
    )


# What a copy keeps.


class Scaled(nn.Parameter):
    """A parameter that a package has made a class for."""


def test_classes_of_parameters_and_their_attributes_are_kept() -> None:
    model = small_model()
    layer = first_layer(model)
    layer.weight = Scaled(layer.weight.detach())
    layer.weight.lr_scale = 0.5  # type: ignore[attr-defined]
    layer.bias.tags = ["no_decay"]  # type: ignore[attr-defined]
    optimizer = averaging_sgd(model, EMA(0.9))
    copied = first_layer(optimizer.averaged_model(model))
    assert type(copied.weight) is Scaled
    assert vars(copied.weight) == {"lr_scale": 0.5}
    assert vars(copied.bias) == {"tags": ["no_decay"]}


class Tied(nn.Module):
    """Two layers with one weight and one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(2, 2), nn.Linear(2, 2)
        self.b.weight = self.a.weight
        scale = torch.ones(2)
        self.a.register_buffer("scale", scale)
        self.b.register_buffer("scale", scale)


@pytest.mark.parametrize("has_instance", [False, True], ids=["copied", "into"])
def test_tied_parameters_and_buffers_stay_tied(has_instance: bool) -> None:
    model = Tied()
    optimizer = AveragingOptimizer(SGD(model.parameters(), lr=0.1), EMA())
    teacher = optimizer.averaged_model(model, into=Tied() if has_instance else None)
    assert teacher.a.weight is teacher.b.weight
    assert teacher.a.weight.data_ptr() != model.a.weight.data_ptr()
    assert teacher.a.scale is teacher.b.scale


def compiled_in_data_parallel(model: nn.Module) -> nn.Module:
    return nn.DataParallel(compiled(model))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", [in_ddp, nn.DataParallel, compiled_in_data_parallel])
def test_of_a_wrapped_model_the_module_inside_is_taken(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    model = small_model()
    wrapped = wrap(model)
    optimizer = averaging_sgd(wrapped, EMA(0.9))
    teacher = optimizer.averaged_model(wrapped)
    second = optimizer.averaged_model(wrapped, into=wrap(small_model()))
    train(wrapped, optimizer, 3)
    assert [type(teacher), type(second)] == [nn.Sequential] * 2
    assert_is_the_average(teacher, model, optimizer)
    assert_is_the_average(second, model, optimizer)


# Models that copy.deepcopy refuses, or copies otherwise.


class SelfCopying(nn.Linear):
    """A layer that copies itself without looking at what was copied before."""

    def __init__(self) -> None:
        super().__init__(3, 2)

    def __deepcopy__(self, memo: dict[int, Any]) -> SelfCopying:
        result = SelfCopying()
        result.load_state_dict(self.state_dict())
        return result


def scripted() -> Any:
    with pytest.warns(DeprecationWarning, match=r"torch\.jit"):
        return torch.jit.script(model_with_batch_norm())


@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("build", "message"),
    [
        (scripted, "a RecursiveScriptModule whose parameter '0.weight' would not be the average"),
        (SelfCopying, "a SelfCopying whose parameter 'weight' would not be the average"),
    ],
    ids=["scripted", "self_copying"],
)
def test_a_model_that_would_not_be_made_of_averages_is_refused_and_may_be_given(
    build: Callable[[], Any], message: str
) -> None:
    model = build()
    optimizer = averaging_sgd(model, EMA(0.9))
    with pytest.raises(
        ValueError, match=rf"^`model` must be .* with its memo, got {message}.*`into`"
    ):
        optimizer.averaged_model(model)
    assert_follows(optimizer.averaged_model(model, into=build()), model, optimizer)


def assert_follows(teacher: nn.Module, model: nn.Module, optimizer: AveragingOptimizer) -> None:
    """Train, and compare what both models give."""
    train(model, optimizer, 3)
    teacher.eval()
    optimizer.update_averages()
    model.eval()
    with optimizer.swap_to_averaged():
        expected = [loss_of_batch(model, 7), *values(model.parameters())]
    assert same([loss_of_batch(teacher, 7), *teacher.parameters()], expected)
    assert not any(each.requires_grad for each in teacher.parameters())


def with_weight_norm() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(3, 2))


def with_a_lock() -> nn.Module:
    model = small_model()
    model.lock = threading.Lock()  # type: ignore[assignment]
    return model


def with_a_process_group() -> nn.Module:
    torch.manual_seed(0)
    group = dist.group.WORLD
    return nn.Sequential(nn.Linear(3, 4), nn.SyncBatchNorm(4, process_group=group), nn.Linear(4, 2))


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (with_weight_norm, "RuntimeError: Only Tensors created explicitly"),
        (with_a_lock, "TypeError: cannot pickle '_thread.lock' object"),
        (with_a_process_group, "TypeError: cannot pickle .*ProcessGroup"),
    ],
    ids=["weight_norm", "lock", "process_group"],
)
def test_a_model_that_cannot_be_copied_is_refused_and_another_instance_may_be_given(
    build: Callable[[], nn.Module], reason: str
) -> None:
    model, second = build().eval(), build().eval()
    optimizer = averaging_sgd(model, EMA(0.9))
    loss_of_batch(model, 0)
    loss_of_batch(second, 0).backward()
    with pytest.raises(ValueError, match=rf"^`model` must be .* can copy\..* `into`\. \({reason}"):
        optimizer.averaged_model(model)
    with torch.no_grad():
        for weight in second.parameters():
            weight.zero_()
    teacher = optimizer.averaged_model(model, into=second)
    assert teacher is second
    assert not any(weight.grad is not None for weight in second.parameters())
    assert_follows(teacher, model, optimizer)


def itself(model: nn.Sequential) -> Any:
    return model


def one_of_its_layers_in_another(model: nn.Sequential) -> Any:
    return nn.Sequential(nn.Linear(3, 4), *list(model)[1:])


def with_memory_of_its(model: nn.Sequential) -> Any:
    other = model_with_batch_norm()
    list(other.parameters())[-1].data = list(model.parameters())[-1].data
    return other


def wider(model: nn.Sequential) -> Any:
    return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def without_buffers(model: nn.Sequential) -> Any:
    norm = nn.BatchNorm1d(4, track_running_stats=False)
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Linear(4, 2))


def with_one_layer_more(model: nn.Sequential) -> Any:
    return nn.Sequential(*model_with_batch_norm(), nn.Linear(2, 2))


def with_tied_biases(model: nn.Sequential) -> Any:
    other = model_with_batch_norm()
    layer = first_layer(other)
    _, _, _, layer.bias, *_ = other.parameters()
    return other


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (itself, r"share no tensor with the model, got its '0\.weight'"),
        (one_of_its_layers_in_another, r"share no tensor with the model, got its '1\.weight'"),
        (with_memory_of_its, r"share no tensor with the model, got its '2\.bias'"),
        (wider, r"be another instance .* a '0\.weight' of shape \(4, 3\), got \(8, 3\)"),
        (without_buffers, r"be another instance .* a '1\.running_mean' of shape \(4,\), got None"),
        (with_one_layer_more, r"be another instance .* a '3\.weight' of shape None, got \(2, 2\)"),
        (with_tied_biases, r"have an untied '1\.bias', as the model has, got one that is tied"),
    ],
)
def test_anything_but_another_instance_is_refused_and_unchanged(
    make: Callable[[nn.Sequential], Any], message: str
) -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, EMA(0.9))
    train(model, optimizer, 2)
    other = make(model)

    def look() -> Any:
        gradients = [(each.requires_grad, each.grad) for each in other.parameters()]
        addresses = [each.data_ptr() for each in other.state_dict().values()]
        return frozen(other.state_dict()), frozen(gradients), addresses

    before = look()
    with pytest.raises(ValueError, match=f"^`into` must {message}"):
        optimizer.averaged_model(model, into=other)
    assert look() == before


def test_anything_but_a_module_is_refused_as_another_instance() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9))
    other: Any = [nn.Linear(3, 4)]
    with pytest.raises(TypeError, match=r"^`into` must be a torch\.nn\.Module, got \[Linear"):
        optimizer.averaged_model(model, into=other)


# Models that are cast, copied or let go.


def to_double(teacher: nn.Module) -> None:
    teacher.double()


def to_half(teacher: nn.Module) -> None:
    teacher.half()


def to_meta(teacher: nn.Module) -> None:
    teacher.to("meta")


def to_other_parameters(teacher: nn.Module) -> None:
    """As future versions of torch are to cast models."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        teacher.double()
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("move", [to_double, to_half, to_meta, to_other_parameters])
def test_a_model_that_is_cast_or_moved_parts_with_one_warning(
    move: Callable[[nn.Module], None],
) -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, EMA(0.9))
    parting, staying = optimizer.averaged_model(model), optimizer.averaged_model(model)
    train(model, optimizer, 2)
    move(parting)
    before = [each for each in parting.state_dict().values() if not each.is_meta]
    kept = frozen(before)
    with pytest.warns(UserWarning, match="was cast or moved, and no longer follows") as warned:
        train(model, optimizer, 1, first=2)
    assert len(warned) == 1
    assert warned[0].filename.endswith("training.py")
    train(model, optimizer, 1, first=3)
    assert frozen(before) == kept
    assert_is_the_average(staying, model, optimizer)


def test_a_cast_that_changes_nothing_parts_nothing() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9), dtype=torch.float64)
    teacher = optimizer.averaged_model(model).double()
    train(model, optimizer, 2)
    assert_is_the_average(teacher, model, optimizer)


def calls_in(act: Callable[[], object]) -> int:
    """Return how many functions are called."""
    count = 0

    def note(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += 1

    sys.setprofile(note)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


def teachers_of(optimizer: AveragingOptimizer, model: nn.Module) -> Iterator[nn.Module]:
    for _ in range(1000):
        yield optimizer.averaged_model(model)


def test_models_that_are_let_go_are_neither_kept_nor_followed() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, EMA(0.9))
    for _ in range(2):
        optimizer.update_averages()
    before = calls_in(optimizer.update_averages)
    kept = [ref(teacher) for teacher in teachers_of(optimizer, model)]
    gc.collect()
    assert not any(each() for each in kept)
    assert calls_in(optimizer.update_averages) == before


def test_the_optimizer_and_the_model_are_let_go_while_an_averaged_model_stays() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9))
    train(model, optimizer, 2)
    teacher, expected = optimizer.averaged_model(model), averages(optimizer, "ema")
    left = ref(model), ref(optimizer)
    del model, optimizer
    gc.collect()
    assert not any(each() for each in left)
    assert same(teacher.parameters(), expected)


@pytest.mark.parametrize("copied", [copy.deepcopy, through_pickle])
def test_copies_of_an_optimizer_have_no_models_and_those_of_a_model_do_not_follow(
    copied: Callable[[Any], Any],
) -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, EMA(0.9), buffers=model.buffers())
    teacher = optimizer.averaged_model(model)
    train(model, optimizer, 2)
    other_model, other_optimizer = copied((model, optimizer))
    other_teacher = copied(teacher)
    before = frozen(teacher.state_dict())
    assert frozen(other_teacher.state_dict()) == before
    train(other_model, other_optimizer, 2, first=2)
    assert frozen(teacher.state_dict()) == before
    its_own = other_optimizer.averaged_model(other_model)
    train(model, optimizer, 1, first=2)
    train(other_model, other_optimizer, 1, first=4)
    assert_is_the_average(teacher, model, optimizer)
    assert_is_the_average(its_own, other_model, other_optimizer)
    assert frozen(other_teacher.state_dict()) == before
    assert not any(each.requires_grad for each in other_teacher.parameters())
