"""One evaluation in Lightning gives the metrics of the training weights and of several averages."""

from __future__ import annotations

import csv
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    ModelCheckpoint,
    RichProgressBar,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from lightning_runs import (
    Adversaries,
    Module,
    Numbers,
    all_averages,
    all_there_is,
    averaging_optimizers,
    each_epoch,
    fit,
    trainer_with,
    uninterrupted,
    weights_in,
)
from torch import Tensor
from torchmetrics import MeanMetric
from training import TWO_RULES, averaging_sgd, first_layer, loss_of_batch, same, small_model

from averaging_optim import Rule, together
from averaging_optim.integrations.lightning import EvaluateAveraged

NAMES = ["ema", "swa"]


def of_several(name: str | None = None, **arguments: Any) -> EvaluateAveraged:
    return EvaluateAveraged(name, names=NAMES, **arguments)


def losses_of(trainer: Trainer, module: Module, batch: int = 1000) -> dict[str, float]:
    """Return the losses of the training weights, "", and of each average."""
    averaged = together(*averaging_optimizers(trainer))
    losses = averaged.evaluate_averages(lambda: loss_of_batch(module.net, batch).item())
    return {"" if name == "weights" else f"/{name}": losses[name] for name in losses}


def floats(metrics: dict[str, Tensor]) -> dict[str, float]:
    return {name: metrics[name].item() for name in metrics}


def rows_in(folder: Path) -> list[dict[str, str]]:
    """Return what a CSVLogger wrote, without cells that are empty."""
    with open(folder / "lightning_logs" / "version_0" / "metrics.csv") as file:
        return [{key: row[key] for key in row if row[key]} for row in csv.DictReader(file)]


class WithTests(Module):
    """Tests as it validates."""

    def test_step(self, batch: int) -> None:
        self.validation_step(batch)


class Pair(Adversaries):
    """Trains two networks, each of which has all averages."""

    def __init__(self, rule: dict[str, Rule]) -> None:
        super().__init__()
        self.rule = rule

    def configure_optimizers(self) -> Any:
        return [averaging_sgd(self.net, self.rule), averaging_sgd(self.other, self.rule)]


class OfTwoLoaders(Module):
    """Validates on two sets of data."""

    def validation_step(self, batch: int, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        self.log("loss", loss_of_batch(self.net, 1000 + dataloader_idx), batch_size=1)


class Measuring(Module):
    """Logs an object of torchmetrics, which gathers the losses of the steps."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.mean = MeanMetric()

    def validation_step(self, batch: int) -> None:
        self.mean.update(loss_of_batch(self.net, 1000 + batch))
        self.log("mean", self.mean, batch_size=1)


class AtTheEnd(Module):
    """Gathers the losses of the steps itself, and logs at the end of the epoch."""

    def on_validation_epoch_start(self) -> None:
        self.losses: list[Tensor] = []

    def validation_step(self, batch: int) -> None:
        super().validation_step(batch)
        self.losses.append(loss_of_batch(self.net, 1000 + batch))

    def on_validation_epoch_end(self) -> None:
        self.log("mean", torch.stack(self.losses).mean())
        self.log("same", self.trainer.callback_metrics["loss"])


class Stepwise(Module):
    """Logs at each step and each epoch, also on the progress bar."""

    def validation_step(self, batch: int) -> None:
        loss = loss_of_batch(self.net, 1000 + batch)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=1)


class Drawing(Module):
    """Validates on noise, whose numbers it keeps."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.drawn: list[float] = []

    def training_step(self, batch: int) -> Tensor:
        return super().training_step(batch) + torch.rand(()) * first_layer(self.net).weight.sum()

    def validation_step(self, batch: int) -> None:
        self.drawn.append(torch.rand(()).item())


@pytest.mark.parametrize("build", [Module, Pair])
def test_a_validation_gives_the_metrics_of_all_weights(
    build: Callable[[dict[str, Rule]], Module],
) -> None:
    trainer, module = trainer_with(of_several()), build(TWO_RULES)
    fit(trainer, module)
    losses = losses_of(trainer, module)
    assert floats(trainer.callback_metrics) == {f"loss{each}": losses[each] for each in losses}
    assert floats(trainer.logged_metrics) == floats(trainer.callback_metrics)
    assert len(set(losses.values())) == 3
    assert same(all_there_is(module, trainer), uninterrupted(build(TWO_RULES)))


def test_each_pass_sees_its_weights_and_the_last_the_training_weights() -> None:
    trainer, module = trainer_with(of_several()), Module(TWO_RULES)
    fit(trainer, module)
    ema, again, swa, _, weights, _ = module.seen[-6:]
    assert same(ema, all_averages(trainer, "ema"))
    assert same(again, ema)
    assert same(swa, all_averages(trainer, "swa"))
    assert same(weights, module.parameters())


@pytest.mark.parametrize("evaluation", ["validate", "test"])
@pytest.mark.parametrize("source", ["trained", "checkpoint", "new"])
def test_an_evaluation_returns_and_prints_the_metrics_of_all_weights(
    source: str, evaluation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer, module = trainer_with(of_several(), each_epoch(tmp_path)), WithTests(TWO_RULES)
    fit(trainer, module)
    losses = losses_of(trainer, module)
    path = None if source == "trained" else tmp_path / "epoch=1.ckpt"
    if source == "new":
        trainer, module = trainer_with(of_several(), each_epoch(tmp_path)), WithTests(TWO_RULES)
    results = getattr(trainer, evaluation)(module, range(2), ckpt_path=path)
    assert results == [{f"loss{each}": losses[each] for each in losses}]
    assert capsys.readouterr().out.count("loss/swa") == 1
    assert same(module.parameters(), weights_in(tmp_path / "epoch=1.ckpt"))


def test_weights_alone_are_evaluated_under_the_name_of_their_average(tmp_path: Path) -> None:
    best = ModelCheckpoint(tmp_path, monitor="loss/swa", save_weights_only=True)
    trainer, module = trainer_with(of_several("swa", save="averaged"), best), WithTests(TWO_RULES)
    fit(trainer, module)
    loss = losses_of(trainer, module)["/swa"]
    assert trainer.test(module, range(2), ckpt_path="best") == [{"loss/swa": loss}]


@pytest.mark.parametrize(("name", "expected"), [("swa", "swa"), ("ema", "ema")])
def test_predictions_are_made_under_the_name(name: str, expected: str) -> None:
    trainer, module = trainer_with(of_several(name)), Module(TWO_RULES)
    fit(trainer, module)
    trainer.predict(module, range(1))
    assert same(module.seen[-1], all_averages(trainer, expected))


def test_predictions_need_a_name() -> None:
    trainer, module = trainer_with(of_several()), Module(TWO_RULES)
    fit(trainer, module)
    with pytest.raises(ValueError, match=r"`name` must be one of 'ema', 'swa', got None\."):
        trainer.predict(module, range(1))


def test_callbacks_choose_by_an_average_wherever_they_stand(tmp_path: Path) -> None:
    stopping = EarlyStopping("loss/ema", mode="max", patience=1)
    best = ModelCheckpoint(tmp_path, monitor="loss/swa", save_top_k=-1)
    trainer, module = trainer_with(stopping, best, of_several(), max_epochs=9), Module(TWO_RULES)
    fit(trainer, module)
    losses = losses_of(trainer, module)
    assert trainer.current_epoch == 2  # the loss falls, so that the first was the highest
    assert stopping.best_score > losses["/ema"]
    assert best.best_model_score == losses["/swa"]


def test_each_dataloader_has_the_metrics_of_all_weights() -> None:
    trainer, module = trainer_with(of_several()), OfTwoLoaders(TWO_RULES)
    trainer.fit(module, Numbers(), [range(2), range(3)])
    (first, second) = trainer.validate(module, [range(2), range(3)], verbose=False)
    of_first, of_second = losses_of(trainer, module), losses_of(trainer, module, batch=1001)
    assert first == {f"loss{each}/dataloader_idx_0": of_first[each] for each in of_first}
    # Three times the same number, added and divided, is not always that number.
    assert second == pytest.approx(
        {f"loss{each}/dataloader_idx_1": of_second[each] for each in of_second}
    )
    assert {*first, *second} == set(trainer.callback_metrics)


@pytest.mark.parametrize("build", [Measuring, AtTheEnd])
def test_what_gathers_in_a_pass_begins_the_next_one_empty(build: type[Module]) -> None:
    trainer, module = trainer_with(of_several()), build(TWO_RULES)
    fit(trainer, module)
    first, second = (losses_of(trainer, module, batch=1000 + number) for number in range(2))
    (metrics,) = trainer.validate(module, range(2), verbose=False)
    # torch and torchmetrics need not add in the order of this line.
    assert {each: metrics[f"mean{each}"] for each in first} == pytest.approx(
        {each: (first[each] + second[each]) / 2 for each in first}
    )


def test_a_hook_reads_the_metrics_of_its_own_pass() -> None:
    trainer, module = trainer_with(of_several()), AtTheEnd(TWO_RULES)
    fit(trainer, module)
    metrics = floats(trainer.callback_metrics)
    losses = losses_of(trainer, module)
    assert {each: metrics[f"same{each}"] for each in losses} == losses


def rows_logged_with(callback: Callback, folder: Path) -> list[dict[str, str]]:
    trainer = trainer_with(
        callback, logger=CSVLogger(folder), log_every_n_steps=1, val_check_interval=3
    )
    fit(trainer, Module(TWO_RULES))
    return rows_in(folder)


def test_a_logger_has_all_metrics_of_a_validation_in_one_row_at_the_usual_step(
    tmp_path: Path,
) -> None:
    several = rows_logged_with(of_several(), tmp_path / "several")
    one = rows_logged_with(EvaluateAveraged("ema"), tmp_path / "one")
    assert [row["step"] for row in several] == [row["step"] for row in one]
    assert [set(row) for row in several] == [{"step", "epoch", "loss", "loss/ema", "loss/swa"}] * 4


def test_steps_of_all_passes_are_logged_at_the_steps_of_a_single_one(tmp_path: Path) -> None:
    names = ["loss_step", "loss_step/ema", "loss_step/swa"]
    logging: dict[str, Any] = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 1}
    trainer_with(of_several(), **logging).fit(Stepwise(TWO_RULES), Numbers(), range(3))
    rows = rows_in(tmp_path)
    steps = {name: [row["step"] for row in rows if name in row] for name in names}
    assert steps == {name: ["0", "1", "2", "3", "4", "5"] for name in names}
    assert "loss_epoch/ema" in rows[-1]
    assert "loss_epoch" in rows[-1]


def test_the_sanity_check_sees_the_training_weights_alone() -> None:
    trainer, module = trainer_with(of_several(), num_sanity_val_steps=1), Module(TWO_RULES)
    fit(trainer, module)
    assert len(module.seen) == 1 + 2 * 3 * 2
    assert same(module.seen[0], small_model().parameters())


def test_all_passes_draw_the_same_numbers_and_training_draws_as_after_one() -> None:
    several = Drawing(TWO_RULES)
    fit(trainer_with(of_several()), several)
    one = Drawing(TWO_RULES)
    fit(trainer_with(EvaluateAveraged("ema")), one)
    assert several.drawn == [*one.drawn[:2] * 3, *one.drawn[2:] * 3]
    assert same(several.parameters(), one.parameters())


def test_an_evaluation_starts_and_ends_once_and_its_epochs_with_each_pass() -> None:
    class Counting(Callback):
        def __init__(self) -> None:
            for hook in ("start", "epoch_start", "epoch_end", "end"):
                setattr(self, f"on_validation_{hook}", lambda *_, hook=hook: seen.append(hook))

    seen: list[str] = []
    fit(trainer_with(Counting(), of_several(), max_epochs=1), Module(TWO_RULES))
    assert seen == ["start", *["epoch_start", "epoch_end"] * 3, "end"]


def test_data_is_loaded_once_for_all_passes() -> None:
    class Loading(Module):
        loaded = 0

        def train_dataloader(self) -> Iterable[int]:
            return Numbers()

        def val_dataloader(self) -> Iterable[int]:
            self.loaded += 1
            return range(2)

    trainer, module = trainer_with(of_several()), Loading(TWO_RULES)
    trainer.fit(module)
    trainer.validate(module)
    assert module.loaded == 2


def test_an_evaluation_without_data_is_skipped() -> None:
    trainer, module = trainer_with(of_several(), limit_val_batches=0), Module(TWO_RULES)
    fit(trainer, module)
    assert not module.seen
    assert trainer.validate(module, range(2)) == []


@pytest.mark.parametrize("step", [1, 2, 3, 4, 5, 6])
def test_a_pass_that_raises_leaves_the_training_weights(step: int) -> None:
    trainer = trainer_with(of_several(), max_epochs=1)
    module = Module(TWO_RULES, crash_at=("validate", step))
    with pytest.raises(ArithmeticError, match="crashed on purpose"):
        fit(trainer, module)
    assert same(all_there_is(module, trainer), uninterrupted(Module(TWO_RULES), max_epochs=1))
    module.crash_at = None
    assert len(trainer.validate(module, range(2))[0]) == 3


@pytest.mark.parametrize("bar", [TQDMProgressBar, RichProgressBar])
def test_progress_bars_show_the_metrics_of_all_weights(bar: type[Callback]) -> None:
    trainer = trainer_with(bar(), of_several(), enable_progress_bar=True)
    fit(trainer, Stepwise(TWO_RULES))
    assert {"loss_epoch", "loss_epoch/ema", "loss_epoch/swa"} <= set(trainer.progress_bar_metrics)


def test_without_an_averaging_optimizer_the_weights_alone_are_evaluated() -> None:
    trainer = trainer_with(of_several())
    with pytest.warns(UserWarning, match="EvaluateAveraged found no AveragingOptimizer"):
        (results,) = trainer.validate(Module(TWO_RULES), range(1))
    assert set(results) == {"loss"}


@pytest.mark.parametrize("names", ["ema", [], ["ema", "ema"]], ids=["text", "none", "twice"])
def test_names_must_be_a_list_of_different_names(names: Any) -> None:
    with pytest.raises(ValueError, match="`names` must be a list of different names, got "):
        EvaluateAveraged(names=names)


@pytest.mark.parametrize(
    "callback",
    [EvaluateAveraged(names=["ema", "typo"]), of_several("typo", save="averaged")],
    ids=["evaluated", "saved"],
)
def test_a_name_of_no_average_is_refused_before_training(callback: EvaluateAveraged) -> None:
    trainer = trainer_with(callback)
    with pytest.raises(ValueError, match=r"`name` must be one of 'ema', 'swa', got 'typo'\."):
        fit(trainer, Module(TWO_RULES))
    assert trainer.global_step == 0


def test_several_averages_cannot_be_saved_without_a_name() -> None:
    trainer = trainer_with(of_several(save="averaged"))
    with pytest.raises(ValueError, match=r"`name` must be one of 'ema', 'swa', got None\."):
        fit(trainer, Module(TWO_RULES))
    assert trainer.global_step == 0
