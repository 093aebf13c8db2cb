"""Checkpoints of Lightning's Trainer hold what was evaluated, and resume what was trained."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.tuner.tuning import Tuner
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
from processes import in_processes
from torch import Tensor
from training import (
    TWO_RULES,
    averaging_sgd,
    loss_of_batch,
    model_with_batch_norm,
    same,
    small_model,
    values,
)

from averaging_optim import EMA
from averaging_optim.integrations.lightning import EvaluateAveraged


def saving_averaged(name: str | None = None, **arguments: Any) -> EvaluateAveraged:
    return EvaluateAveraged(name, save="averaged", **arguments)


def training_weights_in(path: Path) -> list[Tensor]:
    checkpoint = torch.load(path, weights_only=True)
    return list(checkpoint["averaging_optim"]["training_state_dict"].values())


class Both(Callback):
    """Saves a full checkpoint, and one of weights alone, when a hook runs for the last time."""

    def __init__(self, hook: str, folder: Path) -> None:
        self.full, self.alone = folder / "full.ckpt", folder / "alone.ckpt"
        setattr(self, hook, self.save)

    def save(self, trainer: Trainer, *_: Any) -> None:
        trainer.save_checkpoint(self.full)
        trainer.save_checkpoint(self.alone, weights_only=True)


HOOKS = [
    "on_train_batch_end",
    "on_validation_batch_end",
    "on_validation_epoch_end",
    "on_validation_end",
    "on_train_epoch_end",
    "on_fit_end",
]


class Normalized(Module):
    """Has batch statistics, which are averaged too."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.net = model_with_batch_norm()

    def configure_optimizers(self) -> Any:
        return averaging_sgd(self.net, self.rule, buffers=self.net)


class Hooked(Module):
    """Leaves a part out of its checkpoints and names the others in a way of its own."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.backbone = small_model().requires_grad_(False)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint["state_dict"]
        checkpoint["state_dict"] = {
            f"my_{key}": weights[key] for key in weights if key.startswith("net.")
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        weights = checkpoint.pop("state_dict")
        trained = {key.removeprefix("my_"): weights[key] for key in weights}
        frozen = {f"backbone.{key}": each for key, each in self.backbone.state_dict().items()}
        checkpoint["state_dict"] = {**trained, **frozen}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("names", [None, ["swa", "ema"]], ids=["one", "several"])
def test_a_checkpoint_holds_the_average_whenever_it_is_written(
    hook: str, names: list[str] | None, tmp_path: Path
) -> None:
    both, module = Both(hook, tmp_path), Module(TWO_RULES)
    trainer = trainer_with(both, saving_averaged("ema", names=names))
    fit(trainer, module)
    assert same(weights_in(both.full), all_averages(trainer))
    assert same(weights_in(both.alone), all_averages(trainer))
    assert same(averages_in(both.full), all_averages(trainer))
    assert same(training_weights_in(both.full), module.parameters())
    assert "training_state_dict" not in torch.load(both.alone)["averaging_optim"]
    assert same(all_there_is(module, trainer), uninterrupted(Module(TWO_RULES)))


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize("names", [None, ["swa", "ema"]], ids=["one", "several"])
def test_by_default_a_checkpoint_holds_the_training_weights_whenever_it_is_written(
    hook: str, names: list[str] | None, tmp_path: Path
) -> None:
    both, module = Both(hook, tmp_path), Module(TWO_RULES)
    fit(trainer_with(both, EvaluateAveraged("ema", names=names)), module)
    assert same(weights_in(both.full), module.parameters())
    assert same(weights_in(both.alone), module.parameters())


@pytest.mark.parametrize("weights_only", [False, True], ids=["full", "weights"])
def test_the_best_checkpoint_loads_as_the_model_that_was_evaluated(
    weights_only: bool, tmp_path: Path
) -> None:
    best = ModelCheckpoint(tmp_path, monitor="loss", save_weights_only=weights_only)
    trainer, module = trainer_with(best, saving_averaged()), Module()
    fit(trainer, module)
    loaded = Module.load_from_checkpoint(best.best_model_path)
    # The loss falls, so that the last of 4 validation steps saw the best weights.
    assert same(loaded.parameters(), module.seen[-1])
    assert best.best_model_path.endswith(f"epoch=1-step={2 * BATCHES}.ckpt")


def test_statistics_are_saved_as_they_are_averaged(tmp_path: Path) -> None:
    both, module = Both("on_fit_end", tmp_path), Normalized()
    trainer = trainer_with(both, saving_averaged())
    fit(trainer, module)
    loaded = Normalized.load_from_checkpoint(both.alone)
    (optimizer,) = averaging_optimizers(trainer)
    expected = optimizer.averaged_state_dict(module)
    assert same(loaded.state_dict().values(), expected.values())
    assert not same(loaded.state_dict().values(), module.state_dict().values())


def test_a_model_writes_each_of_its_weights_once_however_often_it_was_run(tmp_path: Path) -> None:
    class Counting(Module):
        written = 0

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            self.written += 1

    trainer, module = trainer_with(saving_averaged()), Counting()
    fit(trainer, module)
    trainer.validate(module, range(1), verbose=False)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert module.written == 2


def test_until_the_first_update_the_weights_are_saved(tmp_path: Path) -> None:
    both, module = Both("on_fit_end", tmp_path), Module(EMA(0.9, start=100))
    fit(trainer_with(both, saving_averaged()), module)
    assert same(weights_in(both.alone), module.parameters())
    assert same(weights_in(both.full), training_weights_in(both.full))


# Resuming without the ModelCheckpoint that wrote the checkpoint is meant.
@pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`")
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.parametrize("resumed", [EvaluateAveraged, saving_averaged])
@pytest.mark.parametrize("build", [Module, Normalized, Hooked])
def test_resuming_a_checkpoint_of_both_weights_equals_never_crashing(
    build: Callable[..., Module], resumed: Callable[[], Callback], precision: str, tmp_path: Path
) -> None:
    crashing = trainer_with(each_step(tmp_path), saving_averaged(), precision=precision)
    with pytest.raises(ArithmeticError, match="crashed on purpose"):
        fit(crashing, build(crash_at=("train", BATCHES + 3)))
    latest = tmp_path / f"step={BATCHES + 3}.ckpt"
    assert not same(weights_in(latest), training_weights_in(latest))

    module, trainer = build(), trainer_with(resumed(), precision=precision)
    fit(trainer, module, ckpt_path=latest)
    assert same(all_there_is(module, trainer), uninterrupted(build(), precision=precision))


def test_resuming_without_the_callback_is_warned_of_and_starts_at_the_average(
    tmp_path: Path,
) -> None:
    class First(Callback):
        def on_train_start(self, trainer: Trainer, *_: Any) -> None:
            first.extend(values(trainer.lightning_module.parameters()))

    first: list[Tensor] = []
    fit(trainer_with(each_epoch(tmp_path), saving_averaged()), Module())
    with pytest.warns(UserWarning, match=r"Please add the following callbacks: .*EvaluateAveraged"):
        fit(trainer_with(First()), Module(), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert same(first, averages_in(tmp_path / "epoch=0.ckpt"))


@pytest.mark.parametrize("evaluation", ["validate", "test", "predict"])
@pytest.mark.parametrize("weights_only", [False, True], ids=["full", "weights"])
@pytest.mark.parametrize("trained", [False, True], ids=["new", "trained"])
def test_an_evaluation_of_a_checkpoint_sees_the_average_in_it(
    trained: bool, weights_only: bool, evaluation: str, tmp_path: Path
) -> None:
    both, module = Both("on_train_epoch_end", tmp_path), Module()
    trainer = trainer_with(both, saving_averaged(), max_epochs=1)
    fit(trainer, module)
    expected = all_averages(trainer)
    if trained:
        trainer = trainer_with(saving_averaged())
        fit(trainer, module)
    else:
        trainer, module = trainer_with(saving_averaged()), Module()
    path = both.alone if weights_only else both.full
    getattr(trainer, evaluation)(module, range(1), ckpt_path=path)
    assert same(module.seen[-1], expected)
    held = expected if weights_only else training_weights_in(path)
    assert same(module.parameters(), held)


def test_the_best_checkpoint_of_weights_alone_is_tested_as_it_is(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="loss", mode="max", save_weights_only=True)
    trainer, module = trainer_with(best, saving_averaged()), Module()
    fit(trainer, module)
    trainer.test(module, range(1), ckpt_path="best")
    assert same(module.seen[-1], module.seen[0])
    assert not same(module.seen[-1], all_averages(trainer))


def test_weights_that_are_another_average_are_refused(tmp_path: Path) -> None:
    both = Both("on_fit_end", tmp_path)
    fit(trainer_with(both, saving_averaged("ema")), Module(TWO_RULES))
    trainer = trainer_with(EvaluateAveraged("swa"))
    with pytest.raises(
        ValueError, match=r"`ckpt_path` must hold the average 'swa', got .* with 'ema' alone"
    ):
        trainer.test(Module(TWO_RULES), range(1), ckpt_path=both.alone)


def test_without_an_averaging_optimizer_the_weights_are_saved(tmp_path: Path) -> None:
    trainer, module = trainer_with(saving_averaged()), Module()
    with pytest.warns(UserWarning, match="EvaluateAveraged found no AveragingOptimizer"):
        trainer.validate(module, range(1))
    trainer.save_checkpoint(tmp_path / "weights.ckpt", weights_only=True)
    assert same(weights_in(tmp_path / "weights.ckpt"), module.parameters())
    assert "averaging_optim" not in torch.load(tmp_path / "weights.ckpt")


def test_optimizers_are_saved_under_all_their_averages(tmp_path: Path) -> None:
    both, module = Both("on_fit_end", tmp_path), Adversaries()
    trainer = trainer_with(both, saving_averaged())
    fit(trainer, module)
    assert same(weights_in(both.alone), all_averages(trainer))
    assert same(weights_in(both.full), all_averages(trainer))


class Apart(Module):
    """Trains and validates on batches of its own in each process."""

    def training_step(self, batch: int) -> Tensor:
        self.crash("train", self.current_epoch * BATCHES + batch)
        return loss_of_batch(self.net, 2 * batch + self.global_rank)

    def validation_step(self, batch: int) -> None:
        loss = loss_of_batch(self.net, 1000 + self.global_rank)
        self.log("loss", loss, batch_size=1, sync_dist=True)


def crash_and_resume(folder: Path) -> list[tuple[list[Tensor], dict[str, Tensor]]]:
    """Return all there is, and the metrics, of a run that was resumed and of a whole one.

    It runs in each of several processes, which look as though torchrun had started them.
    """
    rank, count = dist.get_rank(), dist.get_world_size()
    os.environ.update(
        {name: str(rank) for name in ("RANK", "LOCAL_RANK")}
        | {name: str(count) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
        | {"GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "none"}
        | {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    )
    several = partial(saving_averaged, "ema", names=["ema", "swa"])
    in_both: dict[str, Any] = {"strategy": "ddp", "devices": count}
    crashing = Apart(TWO_RULES, crash_at=("train", BATCHES + 3))
    with suppress(ArithmeticError):
        fit(trainer_with(each_step(folder), several(), **in_both), crashing)
    ends = []
    for path in [folder / f"step={BATCHES + 3}.ckpt", None]:
        trainer, module = trainer_with(several(), **in_both), Apart(TWO_RULES)
        fit(trainer, module, ckpt_path=path)
        ends.append((all_there_is(module, trainer), dict(trainer.callback_metrics)))
    return ends


def test_two_processes_save_the_average_and_resume_as_though_they_never_crashed(
    tmp_path: Path,
) -> None:
    (resumed, whole), (_, of_the_other) = in_processes(2, crash_and_resume, tmp_path)
    latest = tmp_path / f"step={BATCHES + 3}.ckpt"
    assert same(weights_in(latest), averages_in(latest))
    assert not same(weights_in(latest), training_weights_in(latest))
    assert same(resumed[0], whole[0])
    assert resumed[1] == whole[1] == of_the_other[1]
    assert {"loss", "loss/ema", "loss/swa"} == set(whole[1])


def test_the_learning_rate_finder_leaves_the_training_weights(tmp_path: Path) -> None:
    class Tuned(Module):
        lr = 0.1

        def configure_optimizers(self) -> Any:
            optimizer = averaging_sgd(self.net, EMA(0.9))
            optimizer.param_groups[0]["lr"] = self.lr
            return optimizer

    trainer, module = trainer_with(saving_averaged(), default_root_dir=tmp_path), Tuned()
    Tuner(trainer).lr_find(module, range(BATCHES), range(2), num_training=5, update_attr=False)
    assert same(module.parameters(), small_model().parameters())
    fit(trainer, module)
    assert same(all_there_is(module, trainer), uninterrupted(Tuned()))


@pytest.mark.parametrize(
    ("arguments", "monitor", "message"),
    [
        pytest.param(
            {"name": "ema"},
            "loss",
            "the average 'ema' and saves the training weights. "
            "Use `EvaluateAveraged('ema', save=\"averaged\")`",
            id="average",
        ),
        pytest.param(
            {"names": ["ema", "swa"]},
            "loss/swa",
            "the average 'swa' and saves the training weights. "
            "Use `EvaluateAveraged('swa', save=\"averaged\")`",
            id="one_of_several",
        ),
        pytest.param(
            {"names": ["ema", "swa"], "name": "ema", "save": "averaged"},
            "loss/swa",
            "the average 'swa' and saves the average 'ema'. "
            "Use `EvaluateAveraged('swa', save=\"averaged\")`",
            id="another",
        ),
        pytest.param(
            {"names": ["ema", "swa"], "name": "ema", "save": "averaged"},
            "loss",
            "the training weights and saves the average 'ema'. "
            'Use `EvaluateAveraged(save="training")`',
            id="training",
        ),
    ],
)
def test_weights_chosen_by_a_metric_of_others_are_warned_of_once(
    arguments: dict[str, Any], monitor: str, message: str, tmp_path: Path
) -> None:
    best = ModelCheckpoint(tmp_path, monitor=monitor, save_weights_only=True)
    trainer = trainer_with(best, EvaluateAveraged(**arguments))
    with pytest.warns(UserWarning, match="chooses by") as warned:
        fit(trainer, Module(TWO_RULES))
    (told,) = [each.message for each in warned if "chooses by" in str(each.message)]
    assert f"monitor={monitor!r}, save_weights_only=True)` chooses by {message}" in str(told)


@pytest.mark.parametrize(
    ("arguments", "monitor", "weights_only"),
    [
        pytest.param({"name": "ema"}, "loss", False, id="full"),
        pytest.param({"name": "ema"}, None, True, id="unchosen"),
        pytest.param({"name": "ema"}, "train_loss", True, id="training_metric"),
        pytest.param({"name": "ema", "save": "averaged"}, "loss", True, id="averaged"),
        pytest.param({"names": ["ema"]}, "loss", True, id="training"),
        pytest.param(
            {"names": ["swa", "ema"], "name": "ema", "save": "averaged"},
            "loss/ema",
            True,
            id="named",
        ),
    ],
)
def test_other_choices_are_not_warned_of(
    arguments: dict[str, Any], monitor: str | None, weights_only: bool, tmp_path: Path
) -> None:
    class Logging(Module):
        def training_step(self, batch: int) -> Tensor:
            loss = super().training_step(batch)
            self.log("train_loss", loss, batch_size=1)
            return loss

    best = ModelCheckpoint(tmp_path, monitor=monitor, save_weights_only=weights_only)
    fit(trainer_with(best, EvaluateAveraged(**arguments)), Logging(TWO_RULES))


def test_the_only_average_needs_no_name_to_be_saved_and_monitored(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="loss/ema", save_weights_only=True)
    trainer = trainer_with(best, saving_averaged(names=["ema"]))
    fit(trainer, Module())
    assert same(weights_in(Path(best.best_model_path)), all_averages(trainer))


def test_what_to_save_must_be_one_of_two() -> None:
    with pytest.raises(ValueError, match="`save` must be 'training' or 'averaged', got 'ema'"):
        EvaluateAveraged(save="ema")  # type: ignore[arg-type]


@pytest.mark.parametrize("arguments", [{"save": "averaged"}, {"names": ["ema"]}])
def test_an_average_of_lightning_that_would_be_taken_for_ours_is_refused(
    arguments: dict[str, Any],
) -> None:
    trainer = trainer_with(EvaluateAveraged(**arguments), EMAWeightAveraging())
    with pytest.raises(ValueError, match=r"`names` and `save` must be left out beside .* got EMAW"):
        fit(trainer, Module())
    assert trainer.global_step == 0


def test_averages_are_not_saved_by_strategies_that_write_checkpoints_themselves(
    process_group: None,
) -> None:
    trainer = trainer_with(saving_averaged(), strategy=ModelParallelStrategy(), devices=1)
    with pytest.raises(ValueError, match="got 'averaged' with ModelParallelStrategy"):
        fit(trainer, Module())
    assert trainer.global_step == 0
