"""Exports of a part, or of a model that has changed or is wrapped, and what they must not miss."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_runs import Module, averages_in, each_epoch, fit, trainer_with
from modules import compiled, compiled_in_ddp, in_ddp, with_frozen_base
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Muon
from training import (
    averages,
    averaging_sgd,
    everything,
    first_layer,
    frozen,
    loss_of_batch,
    model_with_batch_norm,
    same,
    small_model,
    train,
    values,
)
from transformers_runs import DATA, Recording, arguments_for, language_model

from averaging_optim import EMA, SWA, AveragingOptimizer, together
from averaging_optim.integrations.lightning import EvaluateAveraged

KEYS = ["0.weight", "0.bias", "2.weight", "2.bias"]


def ones_of(model: nn.Module) -> dict[str, Tensor]:
    return {key: torch.ones_like(each) for key, each in model.state_dict().items()}


# What is averaged, alone.


def test_an_export_of_what_is_averaged_holds_the_adapters_alone_and_loads_back() -> None:
    model, optimizer = with_frozen_base()
    train(model, optimizer, 3)
    exported = optimizer.averaged_state_dict(model, only_averaged=True)
    assert list(exported) == ["down.weight", "up.weight"]
    assert sum(each.untyped_storage().nbytes() for each in exported.values()) == 4 * (3 + 2)
    assert same(exported.values(), averages(optimizer, "ema"))
    other, fresh = with_frozen_base()
    assert fresh.load_averaged_state_dict(other, exported, n_averaged=3) == ([], [])
    assert frozen(fresh.averaged_state_dict(other, only_averaged=True)) == frozen(exported)


def test_an_export_of_what_is_averaged_leaves_buffers_and_parts_out_that_are_not() -> None:
    model = model_with_batch_norm()
    groups: list[dict[str, Any]] = [
        {"params": [*model[0].parameters(), *model[1].parameters()]},
        {"params": list(model[2].parameters()), "average": False},
    ]
    optimizer = AveragingOptimizer(SGD(groups, lr=0.1), EMA(0.9))
    train(model, optimizer, 2)
    exported = optimizer.averaged_state_dict(model, only_averaged=True)
    assert list(exported) == ["0.weight", "0.bias", "1.weight", "1.bias"]
    optimizer = AveragingOptimizer(SGD(groups, lr=0.1), EMA(0.9), buffers=model)
    exported = optimizer.averaged_state_dict(model, only_averaged=True)
    assert list(exported) == [key for key in model.state_dict() if not key.startswith("2.")]


def test_whether_only_averages_are_exported_must_be_said_by_a_bool() -> None:
    model, optimizer = with_frozen_base()
    yes: Any = 1
    with pytest.raises(TypeError, match="`only_averaged` must be True or False, got 1"):
        optimizer.averaged_state_dict(model, only_averaged=yes)


# Names of wrapped models.


def compiled_inside(model: nn.Sequential) -> nn.Module:
    layer: Any = torch.compile(model[0], backend="eager")
    model[0] = layer
    return model


def parallel_inside(model: nn.Sequential) -> nn.Module:
    model[2] = nn.DataParallel(model[2])
    return model


WRAPPERS: list[Callable[[nn.Sequential], nn.Module]] = [
    in_ddp,
    nn.DataParallel,
    compiled,
    compiled_in_ddp,
    compiled_inside,
    parallel_inside,
]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_an_export_of_a_wrapped_model_loads_into_the_plain_one(
    wrap: Callable[[nn.Sequential], nn.Module],
) -> None:
    expected_model, plain = small_model(), small_model()
    expected_optimizer = averaging_sgd(expected_model, EMA(0.9))
    train(expected_model, expected_optimizer, 3)
    model = wrap(small_model())
    optimizer = averaging_sgd(model, EMA(0.9))
    train(model, optimizer, 3)
    exported = optimizer.averaged_state_dict(model)
    assert list(exported) == KEYS
    plain.load_state_dict(exported)
    expected = expected_optimizer.averaged_state_dict(expected_model)
    assert frozen(plain.state_dict()) == frozen(expected)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("loads_wrapped", [False, True], ids=["saved_wrapped", "loads_wrapped"])
@pytest.mark.parametrize("wrap", WRAPPERS)
def test_a_state_dict_of_a_wrapped_model_starts_an_average_of_a_plain_one_and_the_other_way(
    wrap: Callable[[nn.Sequential], nn.Module], loads_wrapped: bool
) -> None:
    """As version 0.1.0 has exported it: under the names that the wrapper gives."""
    wrapped, plain = wrap(small_model()), small_model()
    saved, model = (plain, wrapped) if loads_wrapped else (wrapped, plain)
    optimizer = averaging_sgd(model, EMA(0.9))
    assert optimizer.load_averaged_state_dict(model, {}, strict=False).missing_keys == KEYS
    before = ones_of(saved)
    state_dict = dict(before)
    assert optimizer.load_averaged_state_dict(model, state_dict) == ([], [])
    assert state_dict.keys() == before.keys()
    assert list(optimizer.averaged_state_dict(model)) == KEYS
    assert same(averages(optimizer, "ema"), [torch.ones_like(p) for p in model.parameters()])


class Nested(nn.Module):
    """A model with modules that are called as wrappers call theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.module = nn.Linear(1, 1, bias=False)


def test_modules_that_are_called_as_in_wrappers_keep_their_names() -> None:
    model = Nested()
    optimizer = averaging_sgd(model, EMA(0.9))
    saved = {"weight": torch.tensor([1.0]), "module.weight": torch.tensor([[2.0]])}
    optimizer.load_averaged_state_dict(model, saved)
    assert frozen(optimizer.averaged_state_dict(model)) == frozen(saved)
    with pytest.raises(
        ValueError, match=r"`state_dict` must contain keys of the model only, got 'module"
    ):
        optimizer.load_averaged_state_dict(model, {"module.module.weight": torch.ones(1, 1)})


# What fits.


def with_head(size: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, size))


def test_a_new_head_of_another_size_starts_at_the_present_values() -> None:
    old, new = with_head(2), with_head(5)
    former = averaging_sgd(old, EMA(0.9))
    train(old, former, 3)
    exported = former.averaged_state_dict(old)
    optimizer = averaging_sgd(new, EMA(0.9))
    missing, unexpected = optimizer.load_averaged_state_dict(
        new, exported, n_averaged=3, strict=False
    )
    assert (missing, unexpected) == (["2.weight", "2.bias"], ["2.weight", "2.bias"])
    expected = [exported["0.weight"], exported["0.bias"], *new[2].parameters()]
    assert same(optimizer.averaged_state_dict(new).values(), expected)
    assert optimizer.n_averaged() == 3


def test_what_is_not_loaded_keeps_its_average() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, SWA())
    train(model, optimizer, 3)
    before = optimizer.averaged_state_dict(model)
    part = {key: each for key, each in ones_of(model).items() if key.startswith("0.")}
    missing, unexpected = optimizer.load_averaged_state_dict(model, part, strict=False)
    assert (missing, unexpected) == (["2.weight", "2.bias"], [])
    assert frozen(optimizer.averaged_state_dict(model)) == frozen({**before, **part})


def test_a_loss_with_parameters_of_its_own_is_not_asked_for_in_an_export_of_the_model() -> None:
    model, loss = small_model(), nn.Linear(2, 1)
    sgd = SGD([*model.parameters(), *loss.parameters()], lr=0.1)
    optimizer = AveragingOptimizer(sgd, EMA(0.9))
    optimizer.update_averages()
    before = optimizer.averaged_state_dict(loss)
    with pytest.raises(
        ValueError, match=r"got a model without one of shape \(1, 2\)\. .*`strict=False`"
    ):
        optimizer.load_averaged_state_dict(model, ones_of(model))
    found = optimizer.load_averaged_state_dict(model, ones_of(model), strict=False)
    assert found == ([], [])
    assert frozen(optimizer.averaged_state_dict(model)) == frozen(ones_of(model))
    assert frozen(optimizer.averaged_state_dict(loss)) == frozen(before)


DICTS: dict[str, dict[str, Tensor]] = {
    "empty": {},
    "part": {"0.bias": torch.ones(4), "1.weight": torch.ones(4)},
    "more": {"5.bias": torch.ones(1), **ones_of(model_with_batch_norm()), "head": torch.ones(2)},
    "other": {"b": torch.ones(1), "a": torch.ones(1)},
}


@pytest.mark.parametrize("state_dict", DICTS.values(), ids=DICTS)
def test_missing_and_unexpected_keys_are_those_that_torch_returns(
    state_dict: dict[str, Tensor],
) -> None:
    model = model_with_batch_norm()
    given: Any = OrderedDict(state_dict)
    # Without which torch takes it for one of a version that had no `num_batches_tracked`.
    given._metadata = model.state_dict()._metadata  # type: ignore[attr-defined]
    expected = model_with_batch_norm().load_state_dict(given, strict=False)
    optimizer = averaging_sgd(model, EMA(0.9), buffers=model)
    found = optimizer.load_averaged_state_dict(model, state_dict, strict=False)
    assert found == tuple(expected)


@pytest.mark.parametrize("state_dict", [{}, DICTS["other"]], ids=["empty", "other"])
def test_a_state_dict_without_a_matching_entry_changes_nothing(
    state_dict: dict[str, Tensor],
) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9))
    train(model, optimizer, 3)
    before = everything(model, optimizer)
    found = optimizer.load_averaged_state_dict(model, state_dict, n_averaged=50, strict=False)
    assert (len(found.missing_keys), len(found.unexpected_keys)) == (4, len(state_dict))
    assert same(everything(model, optimizer), before)
    assert optimizer.n_averaged() == 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2).int(), "must be floating-point, got torch.int32"),
        ([1.0, 1.0], r"must be a tensor, got \[1\.0, 1\.0\]"),
    ],
    ids=["integers", "list"],
)
def test_an_entry_of_another_kind_is_refused_and_nothing_changes(value: Any, message: str) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9))
    train(model, optimizer, 2)
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=rf"`state_dict\['2\.bias'\]` {message}"):
        optimizer.load_averaged_state_dict(model, {**ones_of(model), "2.bias": value}, strict=False)
    assert same(everything(model, optimizer), before)


def test_whether_all_must_fit_must_be_said_by_a_bool() -> None:
    model = small_model()
    no: Any = None
    with pytest.raises(TypeError, match="`strict` must be True or False, got None"):
        averaging_sgd(model, EMA()).load_averaged_state_dict(model, {}, strict=no)


# Models of which a part is trained and not averaged.


Parts = tuple[nn.Sequential, AveragingOptimizer]


def with_another_optimizer() -> Parts:
    model = small_model()
    SGD(model[2].parameters(), lr=0.1)
    return model, averaging_sgd(model[0], EMA(0.9))


def with_a_replaced_layer() -> Parts:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9))
    model[2] = nn.Linear(4, 2)
    return model, optimizer


def with_many_layers() -> Parts:
    model = nn.Sequential(*(nn.Linear(1, 1) for _ in range(6)))
    return model, averaging_sgd(model[0], EMA(0.9))


CALLS: dict[str, Callable[[AveragingOptimizer, nn.Module], Any]] = {
    "averaged_state_dict": lambda optimizer, model: optimizer.averaged_state_dict(model),
    "averaged_model": lambda optimizer, model: optimizer.averaged_model(model),
    "together": lambda optimizer, model: together(optimizer).averaged_state_dict(model),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize(
    ("build", "names"),
    [
        (with_another_optimizer, r"'2\.weight', '2\.bias'"),
        (with_a_replaced_layer, r"'2\.weight', '2\.bias'"),
        (
            with_many_layers,
            r"'1\.weight', '1\.bias', .*, '3\.weight' and 5 more",
        ),
    ],
)
def test_what_is_trained_and_not_averaged_is_named(
    build: Callable[[], Parts],
    names: str,
    call: Callable[[AveragingOptimizer, nn.Module], Any],
) -> None:
    model, optimizer = build()
    optimizer.update_averages()
    message = f"`model` must have no parameter that is trained and not averaged, got {names}\\. If"
    with pytest.raises(ValueError, match=message):
        call(optimizer, model)


def left_out_by_group(model: nn.Sequential) -> AveragingOptimizer:
    groups: list[dict[str, Any]] = [
        {"params": list(model[0].parameters())},
        {"params": list(model[2].parameters()), "average": False},
    ]
    return AveragingOptimizer(SGD(groups, lr=0.1), EMA(0.9))


def excluded(model: nn.Sequential) -> AveragingOptimizer:
    sgd = SGD(model.parameters(), lr=0.1)
    return AveragingOptimizer(sgd, EMA(0.9), exclude=list(model[2].parameters()))


def excluded_by_shape(model: nn.Sequential) -> AveragingOptimizer:
    sgd = SGD(model.parameters(), lr=0.1)
    return AveragingOptimizer(sgd, EMA(0.9), exclude=lambda p: p.shape[0] == 2)


def excluded_from_elsewhere(model: nn.Sequential) -> AveragingOptimizer:
    """By the optimizer of the other layer, which trains it not."""
    sgd = SGD(model[0].parameters(), lr=0.1)
    return AveragingOptimizer(sgd, EMA(0.9), exclude=list(model[2].parameters()))


def frozen_part(model: nn.Sequential) -> AveragingOptimizer:
    model[2].requires_grad_(False)
    return averaging_sgd(model, EMA(0.9))


@pytest.mark.parametrize(
    "build",
    [left_out_by_group, excluded, excluded_by_shape, excluded_from_elsewhere, frozen_part],
)
def test_what_was_said_not_to_be_averaged_is_exported_and_copied_as_it_is(
    build: Callable[[nn.Sequential], AveragingOptimizer],
) -> None:
    model = small_model()
    optimizer = build(model)
    train(model, optimizer, 3)
    layer = first_layer(model)
    kept = [optimizer.state[each]["averaged_ema"] for each in layer.parameters()]
    expected = [*kept, *model[2].parameters()]
    assert not same(kept, layer.parameters())
    assert same(optimizer.averaged_state_dict(model).values(), expected)
    assert same(optimizer.averaged_model(model).parameters(), expected)
    exported = optimizer.averaged_state_dict(model, only_averaged=True)
    assert list(exported) == ["0.weight", "0.bias"]


def of_half_a_language_model(directory: Path) -> Recording:
    """Return a trainer whose optimizer averages the first half of the weights."""
    model = language_model()
    weights = list(model.parameters())
    sgd = SGD(weights[:4], lr=0.01)
    optimizer = AveragingOptimizer(sgd, EMA(0.9))
    scheduler = torch.optim.lr_scheduler.ConstantLR(sgd)
    arguments = arguments_for(directory, max_steps=1)
    return Recording(
        model,
        arguments,
        train_dataset=DATA,
        eval_dataset=DATA[:2],
        optimizers=(optimizer, scheduler),
    )


def test_a_trainer_of_transformers_neither_evaluates_nor_saves_half_an_average(
    tmp_path: Path,
) -> None:
    trainer = of_half_a_language_model(tmp_path)
    trainer.train()
    message = "trained and not averaged, got 'transformer.h.0.attn.c_attn.weight', .* more"
    with pytest.raises(ValueError, match=message):
        trainer.evaluate()
    with pytest.raises(ValueError, match=message):
        trainer.predict(DATA[:2])
    with pytest.raises(ValueError, match=message):
        trainer.save_averaged(tmp_path / "averaged")
    assert not (tmp_path / "averaged").exists()


class ByDimension(Module):
    """Trains matrices with Muon and vectors with AdamW, stepping by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        matrices = [each for each in self.parameters() if each.ndim == 2]
        vectors = [each for each in self.parameters() if each.ndim < 2]
        return [
            AveragingOptimizer(Muon(matrices, lr=0.01), EMA(0.9)),
            AveragingOptimizer(AdamW(vectors, lr=0.01), EMA(0.9)),
        ]

    def training_step(self, batch: int) -> Tensor:
        loss = super().training_step(batch)
        optimizers: Any = self.optimizers()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss


class MatricesAlone(ByDimension):
    """The same, but that vectors are trained without an average."""

    def configure_optimizers(self) -> Any:
        muon, adam = super().configure_optimizers()
        return [muon, adam.wrapped]


# The state after the step, which Lightning warns of, is the one to look at.
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
def test_lightning_evaluates_the_whole_of_a_model_that_muon_and_adam_train(tmp_path: Path) -> None:
    trainer, module = trainer_with(EvaluateAveraged(), each_epoch(tmp_path)), ByDimension()
    fit(trainer, module)
    matrices_first = averages_in(tmp_path / "epoch=1.ckpt")
    by_ndim = sorted(range(4), key=lambda i: (module.seen[-1][i].ndim < 2, i))
    assert same([module.seen[-1][i] for i in by_ndim], matrices_first)
    assert not any(
        torch.equal(seen, weight)
        for seen, weight in zip(module.seen[-1], module.parameters(), strict=True)
    )


def test_lightning_refuses_half_an_average_before_training() -> None:
    trainer = trainer_with(EvaluateAveraged())
    with pytest.raises(ValueError, match=r"trained and not averaged, got 'net\.0\.bias', 'net\.2"):
        fit(trainer, MatricesAlone())
    assert trainer.global_step == 0


def test_an_evaluation_of_the_loss_of_half_an_average_is_left_to_the_swap() -> None:
    """Which takes no model, and so can't know of what it lacks."""
    model = small_model()
    optimizer = averaging_sgd(model[0], EMA(0.9))
    train(model, optimizer, 2)
    outside = values(model[2].parameters())
    with optimizer.swap_to_averaged():
        assert same(model[2].parameters(), outside)
        loss_of_batch(model, 0)
