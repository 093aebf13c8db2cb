"""Arguments, hooks and groups: the wrapper is the one optimizer there is to see."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import CSVLogger
from pytorch_optimizer import SAM, AdaHessian, Lookahead, SafeFP16Optimizer
from schedulefree import ScheduleFreeWrapper
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils.hooks import RemovableHandle
from training import (
    averages,
    averaging_sgd,
    gradients_of,
    loss_of_batch,
    recurrence,
    same,
    small_model,
    train,
    update_with,
    values,
)

from averaging_optim import EMA, LAWA, SWA, AveragingOptimizer


class Picky(SGD):
    """An optimizer that takes what torch's do not."""

    def step(  # type: ignore[override]  # as some optimizers define it
        self, closure: Any = None, *, scale: float, hessian: Any = None
    ) -> Any:
        self.got = (closure, scale, hessian)
        return super().step(closure)

    def zero_grad(self) -> None:  # type: ignore[override]  # as some optimizers define it
        super().zero_grad(set_to_none=False)


def test_step_and_zero_grad_hand_on_what_they_are_given_and_nothing_else() -> None:
    model = small_model()
    inner = Picky(model.parameters(), lr=0.1)
    optimizer = AveragingOptimizer(inner, EMA())
    loss_of_batch(model, 0).backward()
    optimizer.step(None, scale=2.0, hessian="h")
    assert inner.got == (None, 2.0, "h")
    optimizer.zero_grad()
    assert same(gradients_of(model), [torch.zeros_like(p) for p in model.parameters()])
    with pytest.raises(TypeError, match="set_to_none"):
        optimizer.zero_grad(set_to_none=True)
    with pytest.raises(TypeError, match="scale"):
        optimizer.step()


@pytest.mark.parametrize("build", [SGD, Adam, Picky, AdaHessian])
@pytest.mark.parametrize("method", ["step", "zero_grad"])
def test_signatures_are_those_of_the_wrapped_optimizer(
    build: Callable[..., Optimizer], method: str
) -> None:
    inner = build(small_model().parameters(), lr=0.1)
    optimizer = AveragingOptimizer(inner, EMA())
    expected = inspect.signature(getattr(inner, method))
    bound = getattr(optimizer, method)
    assert inspect.signature(bound) == expected
    # torch's schedulers take the function out of the method.
    assert list(inspect.signature(bound.__func__).parameters)[1:] == list(expected.parameters)


class Proxy:
    """An optimizer that is another in all that is asked of it."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":
            raise AttributeError(name)
        return getattr(self.inner, name)


def test_an_optimizer_that_hands_all_on_to_another_is_wrapped_and_shows_that_ones_signature() -> (
    None
):
    model = small_model()
    proxies: list[Any] = [Proxy(build(model.parameters(), lr=0.1)) for build in (Picky, SGD)]
    picky, plain = (AveragingOptimizer(each, EMA()) for each in proxies)
    assert "hessian" in inspect.signature(picky.step).parameters
    assert "hessian" not in inspect.signature(plain.step).parameters
    train(model, plain, 2)
    assert plain.param_groups[0]["n_averaged_ema"] == 2


def test_a_method_without_a_signature_is_called_all_the_same() -> None:
    builtin: Any = max  # of which Python does not know what it takes

    class Builtin(SGD):
        zero_grad = builtin

    optimizer = AveragingOptimizer(Builtin(small_model().parameters()), EMA())
    optimizer.zero_grad([1, 2])
    assert list(inspect.signature(optimizer.zero_grad).parameters) == ["args", "kwargs"]


def test_two_optimizers_show_each_its_own_signature() -> None:
    picky = AveragingOptimizer(Picky(small_model().parameters(), lr=0.1), EMA())
    plain = averaging_sgd(small_model(), EMA())
    assert "hessian" in inspect.signature(picky.step).parameters
    assert "hessian" not in inspect.signature(plain.step).parameters
    assert AveragingOptimizer.step.__doc__
    assert next(iter(inspect.signature(AveragingOptimizer.step).parameters)) == "self"


def test_global_hooks_run_once_a_step_and_the_wrappers_own_after_the_average() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA())
    seen: list[tuple[str, str, int]] = []

    def note(name: str) -> Callable[..., None]:
        def hook(by: Optimizer, *_: Any) -> None:
            n_averaged = optimizer.param_groups[0]["n_averaged_ema"]
            seen.append((name, type(by).__name__, n_averaged))

        return hook

    handles: list[RemovableHandle] = [
        register_optimizer_step_pre_hook(note("global pre")),
        register_optimizer_step_post_hook(note("global post")),
        optimizer.register_step_pre_hook(note("pre")),
        optimizer.register_step_post_hook(note("post")),
        optimizer.wrapped.register_step_pre_hook(note("wrapped pre")),
        optimizer.wrapped.register_step_post_hook(note("wrapped post")),
    ]
    train(model, optimizer, 1)
    for handle in handles:
        handle.remove()
    assert seen == [
        ("pre", "AveragingOptimizer", 0),
        ("global pre", "SGD", 0),
        ("wrapped pre", "SGD", 0),
        ("wrapped post", "SGD", 0),
        ("global post", "SGD", 0),
        ("post", "AveragingOptimizer", 1),
    ]


def test_a_pre_hook_may_change_the_arguments_of_a_step() -> None:
    model = small_model()
    inner = Picky(model.parameters(), lr=0.1)
    optimizer = AveragingOptimizer(inner, EMA())
    handle = optimizer.register_step_pre_hook(lambda *_: ((None,), {"scale": 3.0}))
    optimizer.step()
    assert inner.got == (None, 3.0, None)
    handle.remove()
    wrong: Any = lambda *_: "x"  # noqa: E731  # a hook that torch refuses too
    optimizer.register_step_pre_hook(wrong)
    with pytest.raises(RuntimeError, match=r"must return None or \(args, kwargs\), got 'x'\."):
        optimizer.step(scale=1.0)


def test_the_profiler_shows_one_optimizer_range_a_step() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA())
    train(model, optimizer, 1)
    with torch.profiler.profile() as profile:
        train(model, optimizer, 2, first=1)
    ranges = [each.name for each in profile.events() if each.name.startswith("Optimizer.step#")]
    assert ranges == ["Optimizer.step#SGD.step"] * 2


def test_a_program_that_unwraps_whatever_has_an_optimizer_finds_none(tmp_path: Path) -> None:
    optimizer = averaging_sgd(small_model(), EMA())
    assert not hasattr(optimizer, "optimizer")
    inner: Any = Lookahead(SGD(small_model().parameters(), lr=0.1))
    assert AveragingOptimizer(inner, EMA()).optimizer is inner.optimizer  # type: ignore[attr-defined]

    class Model(BoringModel):
        def configure_optimizers(self) -> Any:
            return AveragingOptimizer(super().configure_optimizers()[0][0], EMA())

    monitor = LearningRateMonitor()
    trainer = Trainer(
        max_steps=2,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        limit_val_batches=0,
        callbacks=[monitor],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of loaders without workers
        trainer.fit(Model())
    assert list(monitor.lrs) == ["lr-AveragingOptimizer"]


def resume(build: Callable[[nn.Module], Any], path: Path) -> None:
    """Check that training resumed out of a file goes on as if it had never stopped."""
    model = small_model()
    optimizer = build(model)
    for number in range(3):
        steps(model, optimizer, number)
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
    resumed_model = small_model()
    resumed = build(resumed_model)
    saved = torch.load(path, weights_only=False)
    resumed_model.load_state_dict(saved["model"])
    resumed.load_state_dict(saved["optimizer"])
    for number in range(3, 6):
        steps(model, optimizer, number)
        steps(resumed_model, resumed, number)
    assert same(model.parameters(), resumed_model.parameters())
    for name in optimizer.rules:
        with optimizer.swap_to_averaged(name), resumed.swap_to_averaged(name):
            assert same(model.parameters(), resumed_model.parameters())
    counters = [
        {key: group[key] for key in group if "averag" in key} for group in optimizer.param_groups
    ]
    assert counters == [{key: g[key] for key in g if "averag" in key} for g in resumed.param_groups]


def steps(model: nn.Module, optimizer: Any, number: int) -> None:
    optimizer.zero_grad()
    loss_of_batch(model, number).backward()
    optimizer.step()


def schedule_free(model: nn.Module) -> Any:
    wrapper = ScheduleFreeWrapper(SGD(model.parameters(), lr=0.1))
    wrapper.train()
    return wrapper


OF_ANOTHER_FORM: dict[str, Callable[[nn.Module], Any]] = {
    "lookahead": lambda model: Lookahead(SGD(model.parameters(), lr=0.1, momentum=0.9)),
    "schedulefree": schedule_free,
}


@pytest.mark.parametrize("build", OF_ANOTHER_FORM.values(), ids=OF_ANOTHER_FORM)
def test_an_optimizer_whose_state_dict_is_not_torchs_saves_and_loads(
    build: Callable[[nn.Module], Any], tmp_path: Path
) -> None:
    def averaging(model: nn.Module) -> AveragingOptimizer:
        return AveragingOptimizer(build(model), {"ema": EMA(0.9), "last": LAWA(k=2)})

    resume(averaging, tmp_path / "checkpoint.pt")


def test_a_state_dict_that_is_not_torchs_is_saved_as_it_is_with_the_averages_beside_it() -> None:
    model = small_model()
    inner: Any = Lookahead(SGD(model.parameters(), lr=0.1))
    optimizer = AveragingOptimizer(inner, EMA(0.9), buffers=[torch.ones(2)])
    steps(model, optimizer, 0)
    saved = optimizer.state_dict()
    assert saved.keys() == {*inner.state_dict(), "averaging_optim"}
    beside = saved["averaging_optim"]
    assert beside.keys() == {"state", "param_groups", "averaged_buffers"}
    assert [set(entry) for entry in beside["state"].values()] == [{"averaged_ema"}] * 4
    assert beside["param_groups"][0]["n_averaged_ema"] == 1
    del beside["state"][2]
    with pytest.raises(ValueError, match=r"`state\[2\]\['averaged_ema'\]` must be a tensor"):
        optimizer.load_state_dict(saved)


def test_what_has_no_parameter_groups_is_refused_with_what_to_do() -> None:
    inner: Any = SafeFP16Optimizer(SGD(small_model().parameters(), lr=0.1))
    message = (
        "`optimizer` must have a list of `param_groups`, got a SafeFP16Optimizer with None. Wrap"
    )
    with pytest.raises(TypeError, match=message):
        AveragingOptimizer(inner, EMA())


def test_sam_around_it_saves_and_loads_and_averages_once_a_step(tmp_path: Path) -> None:
    def build(model: nn.Module) -> Any:
        def base(groups: Any, **options: Any) -> AveragingOptimizer:
            return AveragingOptimizer(SGD(groups, **options), EMA(0.5))

        made: Any = base
        return SAM(model.parameters(), made, lr=0.1)

    def both_steps(model: nn.Module, optimizer: Any, number: int) -> None:
        for take in (optimizer.first_step, optimizer.second_step):
            loss_of_batch(model, number).backward()
            take(zero_grad=True)

    model = small_model()
    sam = build(model)
    snapshots = []
    for number in range(3):
        both_steps(model, sam, number)
        snapshots.append(values(model.parameters()))
    inner: AveragingOptimizer = sam.base_optimizer
    assert same(averages(inner, "ema"), recurrence(EMA(0.5), snapshots))
    torch.save(sam.state_dict(), tmp_path / "sam.pt")
    resumed = build(model)
    resumed.load_state_dict(torch.load(tmp_path / "sam.pt", weights_only=True))
    for number in range(3, 5):
        both_steps(model, resumed, number)
        snapshots.append(values(model.parameters()))
    assert same(averages(resumed.base_optimizer, "ema"), recurrence(EMA(0.5), snapshots))
    assert resumed.param_groups[0]["n_averaged_ema"] == 5


def test_counts_of_updates_without_an_average_are_warned_of_and_start_at_0() -> None:
    model = small_model()
    former = averaging_sgd(model, SWA())
    train(model, former, 3)
    optimizer = averaging_sgd(model, SWA())
    optimizer.param_groups = [dict(group) for group in former.param_groups]
    with pytest.warns(UserWarning, match="count updates of 'swa', but the average was not loaded"):
        snapshots = train(model, optimizer, 1, first=3)
    snapshots += train(model, optimizer, 2, first=4)
    assert same(averages(optimizer, "swa"), recurrence(SWA(), snapshots))


def test_wrapping_again_starts_new_averages() -> None:
    model = small_model()
    sgd = SGD(model.parameters(), lr=0.1)
    former = AveragingOptimizer(sgd, {"a": EMA(0.5)})
    train(model, former, 2)
    latter = AveragingOptimizer(sgd, SWA())
    snapshots = train(model, latter, 3, first=2)
    assert same(averages(latter, "swa"), recurrence(SWA(), snapshots))
    assert "n_averaged_a" not in sgd.param_groups[0]
    again = AveragingOptimizer(copy.deepcopy(sgd), EMA())
    assert again.param_groups[0]["n_averaged_ema"] == 0


def test_wrapping_again_is_refused_inside_a_swap() -> None:
    optimizer = averaging_sgd(small_model(), SWA())
    with (
        optimizer.swap_to_averaged(),
        pytest.raises(RuntimeError, match="not allowed inside `swap_to_averaged"),
    ):
        AveragingOptimizer(optimizer.wrapped, EMA())


@pytest.mark.parametrize("method", ["step", "state_dict", "update_averages"])
def test_a_wrapper_whose_optimizer_was_wrapped_again_refuses_its_calls(method: str) -> None:
    sgd = SGD(small_model().parameters(), lr=0.1)
    former = AveragingOptimizer(sgd, {"a": EMA(0.5)})
    AveragingOptimizer(sgd, SWA())
    with pytest.raises(RuntimeError, match="wrapped optimizer has been wrapped again"):
        getattr(former, method)()


def by_the_wrapped(optimizer: AveragingOptimizer, group: dict[str, Any]) -> None:
    optimizer.wrapped.add_param_group(group)


def by_hand(optimizer: AveragingOptimizer, group: dict[str, Any]) -> None:
    optimizer.param_groups.append({**optimizer.param_groups[0], **group})


def in_front_by_hand(optimizer: AveragingOptimizer, group: dict[str, Any]) -> None:
    bare = {key: each for key, each in optimizer.param_groups[0].items() if "averag" not in key}
    optimizer.param_groups.insert(0, {**bare, **group})


def by_assignment(optimizer: AveragingOptimizer, group: dict[str, Any]) -> None:
    optimizer.param_groups = [*optimizer.param_groups, {**optimizer.defaults, **group}]


@pytest.mark.parametrize("add", [by_the_wrapped, by_hand, in_front_by_hand, by_assignment])
@pytest.mark.parametrize("saves_at_once", [True, False], ids=["save", "step"])
def test_a_group_added_past_the_wrapper_is_averaged_and_counted(
    add: Callable[[AveragingOptimizer, dict[str, Any]], None], saves_at_once: bool
) -> None:
    first, second = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.full((1,), 8.0))
    optimizer = AveragingOptimizer(SGD([first], lr=0.1), SWA())
    optimizer.update_averages()
    add(optimizer, {"params": [second]})
    saved = optimizer.state_dict() if saves_at_once else {"param_groups": []}
    for group in saved["param_groups"]:
        assert group["n_averaged_swa"] == 1
    with torch.no_grad():
        second.zero_()
    optimizer.update_averages()
    assert [group["n_averaged_swa"] for group in optimizer.param_groups] == [2, 2]
    # Averages of weights that come later begin at their values: 8 if one was made before.
    expected = 4.0 if saves_at_once else 0.0
    assert optimizer.state[second]["averaged_swa"].item() == expected


def test_a_parameter_that_is_twice_in_a_group_is_averaged_once() -> None:
    weight = nn.Parameter(torch.zeros(1))
    with pytest.warns(UserWarning, match="duplicate parameters"):
        sgd = SGD([weight, weight], lr=0.1)
    optimizer = AveragingOptimizer(sgd, EMA(0.5))
    update_with(optimizer, weight, 0.0, 8.0)
    assert optimizer.state[weight]["averaged_ema"].item() == 4
    with optimizer.swap_to_averaged():
        assert weight.item() == 4
    assert weight.item() == 8


def test_a_weight_of_another_shape_restarts_its_average() -> None:
    weights = [nn.Parameter(torch.ones(2)) for _ in range(2)]
    optimizer = AveragingOptimizer(SGD(weights, lr=0.1), {"ema": EMA(0.5), "last": LAWA(k=2)})
    optimizer.update_averages()
    weights[0].data = torch.full((3, 2), 5.0)
    weights[1].data.fill_(3.0)
    with pytest.warns(UserWarning, match=r"changed their shapes to \(3, 2\)"):
        optimizer.update_averages()
    expected: list[Tensor] = [torch.full((3, 2), 5.0), torch.full((2,), 2.0)]
    assert same(averages(optimizer, "ema"), expected)
    assert same(averages(optimizer, "last"), expected)


def test_a_property_of_the_wrapped_optimizer_that_raises_shows_its_own_error() -> None:
    class Raising(SGD):
        @property
        def noise(self) -> float:
            raise AttributeError("the noise is set by `attach`")

        @property
        def scale(self) -> float:
            return float(self.defaults["lr"]) * 2

        @scale.setter
        def scale(self, scale: float) -> None:
            self.defaults["lr"] = scale / 2

    optimizer: Any = AveragingOptimizer(Raising(small_model().parameters(), lr=0.1), EMA())
    with pytest.raises(AttributeError, match="set by `attach`"):
        _ = optimizer.noise
    optimizer.scale = 1.0
    assert optimizer.wrapped.defaults["lr"] == 0.5
    assert optimizer.scale == 1.0


@pytest.mark.parametrize("name", ["defaults", "param_groups", "state", "step", "zero_grad"])
def test_getattr_static_finds_what_an_optimizer_has(name: str) -> None:
    """Python 3.12 looks so for the members of a protocol, such as Lightning's of optimizers."""
    optimizer = averaging_sgd(small_model(), EMA(0.9))
    assert inspect.getattr_static(optimizer, name, None) is not None


def test_defaults_that_are_replaced_are_those_of_the_wrapped_optimizer() -> None:
    optimizer = averaging_sgd(small_model(), EMA(0.9))
    defaults = {**optimizer.defaults, "lr": 0.5}
    optimizer.defaults = defaults
    assert optimizer.wrapped.defaults is defaults
