"""Lightning drives, saves and resumes the wrapper, and EvaluateAveraged evaluates its averages."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger
from lightning_runs import (
    BATCHES,
    Adversaries,
    Module,
    all_averages,
    all_there_is,
    averages_in,
    averaging_optimizers,
    each_epoch,
    each_step,
    fit,
    trainer_with,
    uninterrupted,
    weights_in,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import StepLR
from training import (
    TWO_RULES,
    averages,
    averaging_sgd,
    everything,
    same,
    small_model,
    train,
    values,
)

from averaging_optim import EMA, AveragingOptimizer, together
from averaging_optim.integrations.lightning import EvaluateAveraged

# Resuming without the callback that wrote the checkpoint is meant: nothing of it is needed.
pytestmark = pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")


# The state after the step, which Lightning warns of, is the one to resume from.
@pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization")
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("build", [Module, Adversaries])
def test_resuming_after_a_crash_in_the_middle_of_an_epoch_equals_never_crashing(
    build: Callable[..., Module], precision: str, tmp_path: Path
) -> None:
    crashing = trainer_with(each_step(tmp_path), EvaluateAveraged(), precision=precision)
    with pytest.raises(ArithmeticError, match="crashed on purpose"):
        fit(crashing, build(crash_at=("train", BATCHES + 3)))
    latest = max(tmp_path.iterdir(), key=lambda path: int(path.stem.removeprefix("step=")))

    module, trainer = build(), trainer_with(EvaluateAveraged(), precision=precision)
    fit(trainer, module, ckpt_path=latest)
    expected = uninterrupted(build(), precision=precision)
    assert same(all_there_is(module, trainer), expected)


def test_averages_of_16_bit_weights_are_in_float32() -> None:
    trainer = trainer_with(precision="bf16-true")
    fit(trainer, Module())
    assert {average.dtype for average in all_averages(trainer)} == {torch.float32}


def test_the_trainer_trains_and_averages_as_a_plain_loop_does() -> None:
    trainer, module = trainer_with(), Module()
    fit(trainer, module)
    net = small_model()
    optimizer = averaging_sgd(net, EMA(0.9))
    scheduler = StepLR(optimizer, 1, 0.9)
    for step in range(2 * BATCHES):
        train(net, optimizer, 1, first=step)
        scheduler.step()
    assert same(all_there_is(module.net, trainer), everything(net, optimizer))


def test_only_real_steps_count_when_gradients_are_accumulated() -> None:
    class Snapshots(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
            snapshots.append(values(pl_module.parameters()))

    snapshots: list[list[Tensor]] = []
    trainer = trainer_with(Snapshots(), accumulate_grad_batches=BATCHES // 2, max_epochs=1)
    fit(trainer, Module())
    group = trainer.optimizers[0].param_groups[0]
    assert (group["averaging_steps"], group["n_averaged_ema"]) == (2, 2)
    first, second = snapshots[BATCHES // 2 - 1], snapshots[-1]
    expected = [a.lerp(b, 1 - 0.9) for a, b in zip(first, second, strict=True)]
    assert same(all_averages(trainer), expected)


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["exchanged", "replaced"])
def test_validation_in_fit_sees_the_average_and_leaves_training_unchanged(
    dtype: torch.dtype | None,
) -> None:
    trainer, module = trainer_with(EvaluateAveraged()), Module(dtype=dtype)
    fit(trainer, module)
    assert len(module.seen) == 4
    assert same(module.seen[-1], [average.float() for average in all_averages(trainer)])
    assert not same(module.seen[-1], module.parameters())
    assert same(all_there_is(module, trainer), uninterrupted(Module(dtype=dtype)))


def test_validation_within_an_epoch_sees_the_average_of_that_step(tmp_path: Path) -> None:
    checkpoints = each_step(tmp_path)
    trainer, module = trainer_with(EvaluateAveraged(), checkpoints, val_check_interval=2), Module()
    fit(trainer, module)
    assert same(module.seen[0], averages_in(tmp_path / "step=2.ckpt"))
    assert same(all_there_is(module, trainer), uninterrupted(Module()))


@pytest.mark.parametrize("evaluation", ["validate", "test", "predict"])
@pytest.mark.parametrize("build", [Module, Adversaries])
def test_an_evaluation_after_fit_sees_all_averages_and_restores(
    build: Callable[..., Module], evaluation: str
) -> None:
    trainer, module = trainer_with(EvaluateAveraged()), build()
    fit(trainer, module)
    before = all_there_is(module, trainer)
    getattr(trainer, evaluation)(module, range(1))
    assert same(module.seen[-1], all_averages(trainer))
    assert same(all_there_is(module, trainer), before)


def test_the_name_chooses_the_average() -> None:
    trainer, module = trainer_with(EvaluateAveraged("swa")), Module(TWO_RULES)
    fit(trainer, module)
    assert same(module.seen[-1], all_averages(trainer, "swa"))
    assert not same(module.seen[-1], all_averages(trainer, "ema"))


@pytest.mark.parametrize("name", [None, "typo"])
def test_a_name_that_is_not_one_average_is_refused_before_training(name: str | None) -> None:
    trainer = trainer_with(EvaluateAveraged(name))
    with pytest.raises(ValueError, match=rf"`name` must be one of 'ema', 'swa', got {name!r}\."):
        fit(trainer, Module(TWO_RULES))
    assert trainer.global_step == 0


def test_optimizers_that_lightning_has_wrapped_are_swapped_themselves() -> None:
    class Wrapping(Module):
        def configure_optimizers(self) -> Any:
            self.averaging = averaging_sgd(self.net, EMA(0.9))
            return LightningOptimizer(self.averaging)

        def validation_step(self, batch: int) -> None:
            super().validation_step(batch)
            with pytest.raises(RuntimeError, match="not allowed inside `swap_to_averaged"):
                self.averaging.update_averages()

    trainer, module = trainer_with(EvaluateAveraged()), Wrapping()
    fit(trainer, module)
    assert same(module.seen[-1], averages(module.averaging, "ema"))


class TestLightningOptimizer:
    """What `self.optimizers()` returns: a second object with the attributes of the first."""

    @pytest.fixture
    def optimizer(self) -> AveragingOptimizer:
        weight = nn.Parameter(torch.tensor([2.0]))
        optimizer = AveragingOptimizer(torch.optim.SGD([weight], lr=1.0), EMA(0.5))
        optimizer.update_averages()
        with torch.no_grad():
            weight.fill_(4)
        return optimizer

    def test_shares_its_swap_with_the_optimizer(self, optimizer: AveragingOptimizer) -> None:
        (weight,) = optimizer.param_groups[0]["params"]
        lightning: Any = LightningOptimizer(optimizer)
        with lightning.swap_to_averaged():
            with pytest.raises(RuntimeError, match="not allowed inside `swap_to_averaged"):
                optimizer.update_averages()
            with optimizer.swap_to_averaged():
                assert weight.item() == 2
            assert weight.item() == 2
        assert weight.item() == 4

    def test_saves_and_loads_as_the_optimizer_does(self, optimizer: AveragingOptimizer) -> None:
        lightning: Any = LightningOptimizer(optimizer)
        saved = copy.deepcopy(lightning.state_dict())
        optimizer.update_averages()
        lightning.load_state_dict(saved)
        assert same(averages(optimizer, "ema"), [torch.tensor([2.0])])
        assert optimizer.param_groups[0]["n_averaged_ema"] == 1


class OneOfTwo(Adversaries):
    """Two networks, the second of which is trained and not averaged."""

    def configure_optimizers(self) -> Any:
        averaging, plain = super().configure_optimizers()
        return [averaging, plain.wrapped]


class OneOfTwoAsSaid(OneOfTwo):
    """The same, and the first optimizer was told so."""

    def configure_optimizers(self) -> Any:
        averaging, plain = super().configure_optimizers()
        exclude = list(self.other.parameters())
        return [AveragingOptimizer(averaging.wrapped, EMA(0.9), exclude=exclude), plain]


def test_optimizers_that_do_not_average_are_allowed_if_the_module_says_so() -> None:
    trainer, module = trainer_with(EvaluateAveraged()), OneOfTwoAsSaid()
    fit(trainer, module)
    assert same(module.seen[-1], [*all_averages(trainer), *module.other.parameters()])


def test_a_model_with_a_part_that_is_trained_and_not_averaged_is_refused_before_training() -> None:
    trainer, module = trainer_with(EvaluateAveraged()), OneOfTwo()
    with pytest.raises(ValueError, match=r"trained and not averaged, got 'other\.0\.weight', .*"):
        fit(trainer, module)
    assert trainer.global_step == 0


class MatricesApart(Module):
    """Trains matrices with Muon and vectors with AdamW, as torch's Muon asks for."""

    def __init__(self, *, averaging: bool = True) -> None:
        super().__init__()
        self.averaging = averaging
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        matrices = [weight for weight in self.parameters() if weight.ndim == 2]
        vectors = [weight for weight in self.parameters() if weight.ndim == 1]
        optimizers = [torch.optim.Muon(matrices, lr=0.02), torch.optim.AdamW(vectors, lr=0.01)]
        if self.averaging:
            optimizers = [AveragingOptimizer(each, TWO_RULES) for each in optimizers]
        return optimizers, [StepLR(each, 1, 0.5) for each in optimizers]

    def training_step(self, batch: int) -> Tensor:
        loss = super().training_step(batch)
        optimizers: Any = self.optimizers()
        self.zero_grad()
        self.manual_backward(loss)
        for optimizer in optimizers:
            optimizer.step()
        return loss


def test_muon_and_adamw_are_evaluated_and_saved_together(tmp_path: Path) -> None:
    trainer, module = trainer_with(EvaluateAveraged("ema", save="averaged")), MatricesApart()
    fit(trainer, module)
    averaged = together(*averaging_optimizers(trainer)).averaged_state_dict(module, "ema")
    assert same(module.seen[-1], [averaged[name] for name, _ in module.named_parameters()])
    trainer.save_checkpoint(tmp_path / "averaged.ckpt", weights_only=True)
    assert same(weights_in(tmp_path / "averaged.ckpt"), averaged.values())
    expected = MatricesApart(averaging=False)
    fit(trainer_with(), expected)
    assert same(module.parameters(), expected.parameters())


def learning_rates(module: Module, folder: Path) -> dict[str, list[float]]:
    monitor = LearningRateMonitor()
    fit(trainer_with(monitor, logger=CSVLogger(folder), log_every_n_steps=1), module)
    return monitor.lrs


def test_learning_rates_are_logged_once_for_each_optimizer(tmp_path: Path) -> None:
    logged = learning_rates(MatricesApart(), tmp_path / "averaging")
    expected = learning_rates(MatricesApart(averaging=False), tmp_path / "bare")
    # Lightning names them after the class of what it is given.
    assert list(logged) == ["lr-AveragingOptimizer", "lr-AveragingOptimizer-1"]
    assert list(expected) == ["lr-Muon", "lr-AdamW"]
    assert list(logged.values()) == list(expected.values())


def test_learning_rates_have_the_names_that_schedulers_are_given(tmp_path: Path) -> None:
    class Named(MatricesApart):
        def configure_optimizers(self) -> Any:
            optimizers, schedulers = super().configure_optimizers()
            named = zip(schedulers, ["lr-Muon", "lr-AdamW"], strict=True)
            return optimizers, [{"scheduler": each, "name": name} for each, name in named]

    expected = learning_rates(MatricesApart(averaging=False), tmp_path / "bare")
    assert learning_rates(Named(), tmp_path / "averaging") == expected


def test_the_sanity_check_sees_the_weights() -> None:
    class Continued(Module):
        def configure_optimizers(self) -> Any:
            optimizer = averaging_sgd(self.net, EMA(0.9))
            zeros = {key: torch.zeros_like(each) for key, each in self.net.state_dict().items()}
            optimizer.load_averaged_state_dict(self.net, zeros)
            return optimizer

    trainer, module = trainer_with(EvaluateAveraged(), num_sanity_val_steps=1), Continued()
    fit(trainer, module)
    assert same(module.seen[0], small_model().parameters())
    assert same(module.seen[-1], all_averages(trainer))


def test_checkpoints_made_at_the_end_of_validation_hold_weights_and_averages(
    tmp_path: Path,
) -> None:
    checkpoints = ModelCheckpoint(
        tmp_path, "{step}", monitor="loss", save_top_k=-1, save_on_train_epoch_end=False
    )
    trainer, module = trainer_with(checkpoints, EvaluateAveraged()), Module()
    fit(trainer, module)
    assert same(weights_in(tmp_path / "step=12.ckpt"), module.parameters())
    assert same(averages_in(tmp_path / "step=12.ckpt"), all_averages(trainer))


@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["exchanged", "replaced"])
@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_validation_end"])
def test_a_checkpoint_made_during_an_evaluation_holds_weights_and_averages(
    hook: str, dtype: torch.dtype | None, tmp_path: Path
) -> None:
    def save(trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(tmp_path / "during.ckpt")

    early = Callback()
    setattr(early, hook, save)
    trainer, module = trainer_with(early, EvaluateAveraged()), Module(dtype=dtype)
    fit(trainer, module)
    assert same(weights_in(tmp_path / "during.ckpt"), module.parameters())
    assert same(averages_in(tmp_path / "during.ckpt"), all_averages(trainer))
    assert same(module.seen[-1], [average.float() for average in all_averages(trainer)])


# With an OnExceptionCheckpoint, Lightning looks for one to resume from; there is none yet.
@pytest.mark.filterwarnings("ignore:.*was called without a model. The last model")
@pytest.mark.filterwarnings("ignore:.*there is no last checkpoint available")
@pytest.mark.parametrize("dtype", [None, torch.float64], ids=["exchanged", "replaced"])
def test_validation_that_raises_leaves_the_training_weights(
    dtype: torch.dtype | None, tmp_path: Path
) -> None:
    module = Module(dtype=dtype, crash_at=("validate", 4))
    trainer = trainer_with(OnExceptionCheckpoint(tmp_path), EvaluateAveraged())
    with pytest.raises(ArithmeticError, match="crashed on purpose"):
        fit(trainer, module)
    expected = uninterrupted(Module(dtype=dtype))
    assert same(all_there_is(module, trainer), expected)
    assert same(weights_in(tmp_path / "on_exception.ckpt"), module.parameters())
    averaging_optimizers(trainer)[0].update_averages()


def test_a_second_optimizer_that_cannot_be_swapped_leaves_the_first_as_it_was() -> None:
    class Mismatched(Adversaries):
        def configure_optimizers(self) -> Any:
            return [averaging_sgd(self.net, TWO_RULES), averaging_sgd(self.other, EMA(0.9))]

    callback = EvaluateAveraged("ema")
    trainer, module = trainer_with(callback), Mismatched()
    fit(trainer, module)
    before = all_there_is(module, trainer)
    callback.name = "swa"
    with pytest.raises(ValueError, match=r"`name` must be one of 'ema', got 'swa'\."):
        trainer.validate(module, range(1))
    assert same(all_there_is(module, trainer), before)


def test_a_checkpoint_is_evaluated_with_the_averages_it_holds(tmp_path: Path) -> None:
    trainer, module = trainer_with(EvaluateAveraged(), each_epoch(tmp_path)), Module()
    fit(trainer, module)
    optimizer = trainer.optimizers[0]
    early, late = tmp_path / "epoch=0.ckpt", tmp_path / "epoch=1.ckpt"
    trainer.test(module, range(1), ckpt_path=early)
    assert same(module.seen[-1], averages_in(early))
    assert same(module.parameters(), weights_in(early))
    trainer.test(module, range(1), ckpt_path=late)
    assert same(module.seen[-1], averages_in(late))
    assert trainer.optimizers[0] is optimizer


@pytest.mark.parametrize("build", [Module, Adversaries])
def test_a_new_trainer_evaluates_the_averages_of_a_checkpoint(
    build: Callable[..., Module], tmp_path: Path
) -> None:
    fit(trainer_with(each_epoch(tmp_path)), build())
    trainer, module = trainer_with(EvaluateAveraged()), build()
    trainer.validate(module, range(1), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(module.seen[-1], averages_in(tmp_path / "epoch=0.ckpt"))
    assert same(module.parameters(), weights_in(tmp_path / "epoch=0.ckpt"))
    train(module.net, averaging_optimizers(trainer)[0], 1)


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_a_checkpoint_of_weights_alone_is_refused(trained: bool, tmp_path: Path) -> None:
    checkpoints = each_epoch(tmp_path, save_weights_only=True)
    trainer, module = trainer_with(EvaluateAveraged(), checkpoints), Module()
    fit(trainer, module)
    before = values(module.parameters())
    trainer = trainer if trained else trainer_with(EvaluateAveraged())
    path = tmp_path / "epoch=1.ckpt"
    with pytest.raises(ValueError, match=r"`ckpt_path` must hold optimizer states .* got '.*ckpt'"):
        trainer.validate(module, range(1), ckpt_path=str(path))
    assert same(module.parameters(), before)


def test_a_checkpoint_left_over_from_a_failed_run_is_not_taken_for_the_next(
    tmp_path: Path,
) -> None:
    class Failing(Module):
        def on_validation_model_eval(self) -> None:
            raise ArithmeticError("crashed on purpose")

    fit(trainer_with(each_epoch(tmp_path)), Module())
    weights_only = tmp_path / "weights.ckpt"
    whole = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    torch.save({key: whole[key] for key in whole if key in WITH_WEIGHTS}, weights_only)
    trainer = trainer_with(EvaluateAveraged())
    with pytest.raises(ArithmeticError, match="crashed on purpose"):
        trainer.validate(Failing(), range(1), ckpt_path=tmp_path / "epoch=0.ckpt")
    with pytest.raises(ValueError, match="`ckpt_path` must hold optimizer states"):
        trainer.validate(Module(), range(1), ckpt_path=weights_only)


WITH_WEIGHTS = {"epoch", "global_step", "pytorch-lightning_version", "state_dict", "loops"}

NOTHING_FOUND = r"^EvaluateAveraged found no AveragingOptimizer of this model"


@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_a_model_without_averages_is_evaluated_as_it_is_with_a_warning(trained: bool) -> None:
    trainer, module = trainer_with(EvaluateAveraged()), Module()
    if trained:
        fit(trainer, Module())
    with pytest.warns(UserWarning, match=NOTHING_FOUND):
        trainer.validate(module, range(1))
    assert same(module.seen[-1], small_model().parameters())


def test_training_without_an_averaging_optimizer_warns() -> None:
    class Plain(Module):
        def configure_optimizers(self) -> Optimizer:
            optimizer: Optimizer = super().configure_optimizers()["optimizer"].wrapped
            return optimizer

    trainer, module = trainer_with(EvaluateAveraged()), Plain()
    with pytest.warns(UserWarning, match=NOTHING_FOUND):
        fit(trainer, module)
    assert same(module.seen[-1], module.parameters())
