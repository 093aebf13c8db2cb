"""transformers.Trainer drives, saves and resumes the wrapper; the mixin evaluates its averages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.optimizer import AcceleratedOptimizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from training import TWO_RULES, averages, everything, same, values
from transformers import (
    EarlyStoppingCallback,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Trainer,
    TrainerCallback,
)
from transformers_runs import (
    DATA,
    Recording,
    arguments_for,
    averages_in,
    language_model,
    present_weights,
    weights_in,
)

from averaging_optim import EMA, SWA, AveragingOptimizer, Rule

EVALUATING: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}
SAVING: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
BOTH: dict[str, Any] = {"averaged_names": ["ema", "swa"]}
AVERAGED: dict[str, Any] = {"save": "averaged"}


class RecordingSeq2Seq(Recording, Seq2SeqTrainer):
    """The same over a subclass of Trainer that has its own `evaluate` and `predict`."""


class AveragingAdamW(AveragingOptimizer):
    """What `optimizer_cls_and_kwargs` can take."""

    def __init__(self, params: Any, rule: Rule, **arguments: Any) -> None:
        super().__init__(AdamW(params, **arguments), rule)


class Logging(Recording):
    """Adds a metric that has no prefix of an average, as trl's trainers do."""

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        logs["eval_first_weight"] = present_weights(self)[0][0, 0].item()
        super().log(logs, *args, **kwargs)


class Sharded(Recording):
    """Finds FSDP on, which transformers turns on only where there is an accelerator."""

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.is_fsdp_enabled = True


class MasterCopies(Optimizer):
    """Puts float32 copies of the weights into the groups of an optimizer, as DeepSpeed does."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        for group in optimizer.param_groups:
            group["params"] = [nn.Parameter(each.detach().float()) for each in group["params"]]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["optimizer"], name)


class Creating(Recording):
    """Wraps the optimizer that the Trainer would have made."""

    def create_optimizer(self, model: Any = None) -> Optimizer:
        if self.optimizer is None:
            self.optimizer = AveragingOptimizer(super().create_optimizer(model), EMA(0.9))
        return self.optimizer


def given(
    directory: Path,
    rule: Rule | dict[str, Rule] | None = None,
    *,
    kind: Callable[..., Any] = Recording,
    keywords: dict[str, Any] | None = None,
    **arguments: Any,
) -> Any:
    """Return a trainer that was given an averaging optimizer and a scheduler."""
    model = language_model()
    optimizer = AveragingOptimizer(AdamW(model.parameters(), lr=0.01), rule or EMA(0.9))
    scheduler = LambdaLR(optimizer, lambda step: 0.9**step)
    return kind(
        model,
        arguments_for(directory, **arguments),
        train_dataset=DATA,
        eval_dataset=DATA[:2],
        optimizers=(optimizer, scheduler),
        **(keywords or {}),
    )


def created(directory: Path, **arguments: Any) -> Creating:
    """Return a trainer that makes its averaging optimizer itself."""
    return Creating(
        language_model(),
        arguments_for(directory, **arguments),
        train_dataset=DATA,
        eval_dataset=DATA[:2],
    )


def optimizer_of(trainer: Trainer) -> AveragingOptimizer:
    accelerated: Any = trainer.optimizer
    assert isinstance(accelerated.optimizer, AveragingOptimizer)
    return accelerated.optimizer


def all_there_is(trainer: Trainer) -> list[Tensor]:
    """Return the weights and what the optimizer holds: averages, moments, counters."""
    assert isinstance(trainer.model, nn.Module)
    return everything(trainer.model, optimizer_of(trainer))


def loaded_from(checkpoint: Path) -> list[Tensor]:
    return values(GPT2LMHeadModel.from_pretrained(checkpoint).parameters())


def scores(*given: float) -> Callable[[Any], dict[str, float]]:
    """Return a function that gives these scores, one a call."""
    left = iter(given)
    return lambda _: {"score": next(left)}


@pytest.mark.parametrize("precision", [{}, {"bf16": True}], ids=["float32", "bf16"])
@pytest.mark.parametrize("build", [given, created])
def test_resuming_from_a_checkpoint_equals_never_stopping(
    build: Callable[..., Trainer], precision: dict[str, bool], tmp_path: Path
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2, **precision}
    uninterrupted = build(tmp_path, **saving)
    uninterrupted.train()
    resumed = build(tmp_path / "resumed", **precision)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(all_there_is(resumed), all_there_is(uninterrupted))
    assert optimizer_of(resumed).param_groups[0]["n_averaged_ema"] == 6


def test_the_weights_train_as_with_the_plain_optimizer(tmp_path: Path) -> None:
    plain = given(tmp_path, kind=Trainer)
    plain.optimizer = plain.optimizer.wrapped
    plain.lr_scheduler = LambdaLR(plain.optimizer, lambda step: 0.9**step)
    plain.train()
    averaging = given(tmp_path)
    averaging.train()
    assert same(present_weights(averaging), present_weights(plain))
    assert not same(present_weights(averaging), averages(optimizer_of(averaging), "ema"))


def test_only_real_steps_count_when_gradients_are_accumulated(tmp_path: Path) -> None:
    trainer = given(tmp_path, SWA(), gradient_accumulation_steps=3, max_steps=2)
    trainer.train()
    group = optimizer_of(trainer).param_groups[0]
    assert (group["averaging_steps"], group["n_averaged_swa"]) == (2, 2)


@pytest.mark.parametrize("kind", [Recording, RecordingSeq2Seq])
@pytest.mark.parametrize("evaluation", ["evaluate", "predict"])
def test_an_evaluation_after_training_sees_the_average_and_restores(
    evaluation: str, kind: type[Trainer], tmp_path: Path
) -> None:
    trainer = given(tmp_path, kind=kind)
    trainer.train()
    before = all_there_is(trainer)
    getattr(trainer, evaluation)(DATA[:2])
    assert same(trainer.seen[-1], averages(optimizer_of(trainer), "ema"))
    assert same(all_there_is(trainer), before)


def test_each_of_several_evaluation_sets_is_evaluated_under_the_average(tmp_path: Path) -> None:
    trainer = given(tmp_path)
    trainer.train()
    metrics = trainer.evaluate({"first": DATA[:2], "second": DATA[2:4]})
    assert {"eval_first_loss", "eval_second_loss"} <= set(metrics)
    assert same(trainer.seen[0], averages(optimizer_of(trainer), "ema"))
    assert same(trainer.seen[1], averages(optimizer_of(trainer), "ema"))


def test_evaluation_during_training_sees_the_average_and_checkpoints_hold_the_weights(
    tmp_path: Path,
) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, **EVALUATING}
    plain = given(tmp_path / "plain", kind=Trainer, **saving)
    plain.train()
    trainer = given(tmp_path, **saving)
    trainer.train()
    assert len(trainer.seen) == 3
    assert same(trainer.seen[0], averages_in(tmp_path / "checkpoint-2"))
    assert same(trainer.seen[1], averages_in(tmp_path / "checkpoint-4"))
    expected = weights_in(tmp_path / "plain" / "checkpoint-4")
    assert same(weights_in(tmp_path / "checkpoint-4").values(), expected.values())
    assert same(all_there_is(trainer), all_there_is(plain))


@pytest.mark.parametrize("evaluation", ["evaluate", "predict"])
def test_an_evaluation_that_raises_leaves_the_training_weights(
    evaluation: str, tmp_path: Path
) -> None:
    trainer = given(tmp_path)
    trainer.train()
    before = all_there_is(trainer)
    trainer.crash_at = 1
    with pytest.raises(ArithmeticError, match="crashed on purpose"):
        getattr(trainer, evaluation)(DATA[:2])
    assert same(all_there_is(trainer), before)
    optimizer_of(trainer).update_averages()


@pytest.mark.parametrize("build", [given, created])
def test_before_training_the_weights_are_evaluated_as_they_are(
    build: Callable[..., Recording], tmp_path: Path
) -> None:
    trainer = build(tmp_path)
    trainer.evaluate()
    assert same(trainer.seen[0], language_model().parameters())


def test_the_name_chooses_the_average(tmp_path: Path) -> None:
    trainer = given(tmp_path, TWO_RULES, keywords={"averaged_name": "swa"})
    trainer.train()
    trainer.evaluate()
    assert same(trainer.seen[0], averages(optimizer_of(trainer), "swa"))
    trainer.averaged_name = "ema"
    trainer.evaluate()
    assert same(trainer.seen[1], averages(optimizer_of(trainer), "ema"))


def test_several_averages_and_no_name_are_refused(tmp_path: Path) -> None:
    trainer = given(tmp_path, TWO_RULES)
    with pytest.raises(ValueError, match=r"`name` must be one of 'ema', 'swa', got None\."):
        trainer.evaluate()


@pytest.mark.parametrize("name", ["ema", "swa"])
def test_what_save_averaged_writes_is_loaded_by_from_pretrained(name: str, tmp_path: Path) -> None:
    trainer = given(tmp_path, TWO_RULES, keywords={"averaged_name": name})
    trainer.train()
    before = all_there_is(trainer)
    trainer.save_averaged(tmp_path / "averaged")
    loaded = GPT2LMHeadModel.from_pretrained(tmp_path / "averaged")
    assert same(loaded.parameters(), averages(optimizer_of(trainer), name))
    assert same(all_there_is(trainer), before)


def test_save_averaged_without_an_averaging_optimizer_is_refused(tmp_path: Path) -> None:
    message = r"`save_averaged` is not allowed without an AveragingOptimizer\. Train first\."
    with pytest.raises(RuntimeError, match=message):
        created(tmp_path).save_averaged(tmp_path / "averaged")
    assert not (tmp_path / "averaged").exists()


@pytest.mark.parametrize("keywords", [{}, AVERAGED], ids=["training", "averaged"])
def test_the_best_model_comes_back_with_its_averages(
    keywords: dict[str, Any], tmp_path: Path
) -> None:
    # Worse at each evaluation, so that the first is the best.
    trainer = given(
        tmp_path,
        keywords={"compute_metrics": scores(3, 2, 1, 0), **keywords},
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        **SAVING,
        **EVALUATING,
    )
    trainer.train()
    assert same(trainer.seen[0], averages_in(tmp_path / "checkpoint-2"))
    trainer.evaluate()
    assert same(trainer.seen[-1], trainer.seen[0])
    best = weights_in(tmp_path / "checkpoint-2")
    assert same([trainer.model.state_dict()[key] for key in best], best.values())


@pytest.mark.parametrize("only_model", [False, True])
def test_the_best_checkpoint_and_the_model_in_the_end_are_what_was_evaluated(
    only_model: bool, tmp_path: Path
) -> None:
    trainer = given(
        tmp_path,
        keywords={"compute_metrics": scores(1, 2, 0, 2), **AVERAGED},
        save_only_model=only_model,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        **SAVING,
        **EVALUATING,
    )
    trainer.train()
    evaluated = trainer.seen[1]
    assert same(loaded_from(tmp_path / "checkpoint-4"), evaluated)
    assert same(present_weights(trainer), evaluated)
    trainer.evaluate()
    assert same(trainer.seen[-1], evaluated)
    trainer.save_model(tmp_path / "best")
    assert same(loaded_from(tmp_path / "best"), evaluated)


@pytest.mark.parametrize("resuming", [{}, AVERAGED], ids=["training", "averaged"])
def test_checkpoints_that_hold_the_average_resume_from_the_training_weights(
    resuming: dict[str, Any], tmp_path: Path
) -> None:
    uninterrupted = given(tmp_path, keywords=AVERAGED, **SAVING)
    uninterrupted.train()
    resumed = given(tmp_path / "resumed", keywords=resuming)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(all_there_is(resumed), all_there_is(uninterrupted))


def test_checkpoints_hold_the_average_by_name_beside_the_training_weights(tmp_path: Path) -> None:
    plain = given(tmp_path / "plain", TWO_RULES, kind=Trainer, **SAVING)
    plain.train()
    keywords = {"averaged_name": "swa", **AVERAGED}
    trainer = given(tmp_path, TWO_RULES, keywords=keywords, **SAVING)
    trainer.train()
    assert same(all_there_is(trainer), all_there_is(plain))
    checkpoint = tmp_path / "checkpoint-4"
    assert same(loaded_from(checkpoint), averages_in(checkpoint, "swa"))
    expected = weights_in(tmp_path / "plain" / "checkpoint-4")
    assert same(weights_in(checkpoint / "training_weights").values(), expected.values())


def test_checkpoints_of_the_model_alone_hold_the_average_alone(tmp_path: Path) -> None:
    trainer = given(tmp_path, keywords=AVERAGED, save_only_model=True, **SAVING)
    trainer.train()
    assert same(loaded_from(tmp_path / "checkpoint-6"), averages(optimizer_of(trainer), "ema"))
    assert not (tmp_path / "checkpoint-6" / "training_weights").exists()


def test_a_model_saved_before_training_holds_its_weights(tmp_path: Path) -> None:
    trainer = Recording(language_model(), arguments_for(tmp_path), save="averaged")
    trainer.save_model(str(tmp_path / "model"))
    assert same(loaded_from(tmp_path / "model"), language_model().parameters())


def test_models_of_an_optimizer_that_does_not_average_are_saved_as_they_are(
    tmp_path: Path,
) -> None:
    trainer = given(
        tmp_path,
        keywords=AVERAGED,
        save_only_model=True,
        load_best_model_at_end=True,
        **SAVING,
        **EVALUATING,
    )
    trainer.optimizer = trainer.optimizer.wrapped
    trainer.lr_scheduler = LambdaLR(trainer.optimizer, lambda step: 0.9**step)
    with pytest.warns(UserWarning, match=r"^The Trainer has no AveragingOptimizer: its model"):
        trainer.train()
    assert same(loaded_from(Path(trainer.state.best_model_checkpoint)), present_weights(trainer))


BEST: dict[str, Any] = {"load_best_model_at_end": True, **SAVING, **EVALUATING}
REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "best_without_averages": (
        {"save_only_model": True, **BEST},
        {},
        r"`save_only_model` must be False with `load_best_model_at_end`, got True\.",
    ),
    "best_by_the_weights": (
        BEST,
        {**AVERAGED, **BOTH},
        r"`metric_for_best_model` must be a metric of the average that is saved, got 'loss'\. "
        r"Choose one such as 'eval_ema_loss'",
    ),
    "best_by_another_average": (
        {"metric_for_best_model": "eval_swa_loss", "save_strategy": "best", **EVALUATING},
        {**AVERAGED, **BOTH},
        r"`metric_for_best_model` must be .* got 'eval_swa_loss'\.",
    ),
    "nothing_to_save": ({}, {"save": "ema"}, r"`save` must be 'training' or 'averaged', got 'ema'"),
    "no_names": ({}, {"averaged_names": []}, r"`averaged_names` must be a list of .* got \[\]\."),
    "one_name": ({}, {"averaged_names": "ema"}, r"`averaged_names` must be a list of .* got 'ema'"),
    "a_name_twice": (
        {},
        {"averaged_names": ["ema", "ema"]},
        r"`averaged_names` must be a list of different names, got \['ema', 'ema'\]\.",
    ),
}


@pytest.mark.parametrize(("arguments", "keywords", "message"), REFUSED.values(), ids=REFUSED)
def test_arguments_that_do_not_fit_are_refused_before_training(
    arguments: dict[str, Any], keywords: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        given(tmp_path, TWO_RULES, keywords=keywords, **arguments)


def test_saving_averages_of_a_sharded_model_is_refused(tmp_path: Path) -> None:
    message = r"`save` must be 'training' with FSDP or DeepSpeed, got 'averaged'\."
    with pytest.raises(ValueError, match=message):
        Sharded(language_model(), arguments_for(tmp_path), save="averaged")


def test_saving_the_weights_alone_while_averages_are_evaluated_warns(tmp_path: Path) -> None:
    message = r"^`save_only_model` saves training weights without their averages, but averages are"
    with pytest.warns(UserWarning, match=message):
        given(tmp_path, save_only_model=True, **SAVING, **EVALUATING)


@pytest.mark.parametrize("keywords", [{}, {"averaged_names": ["ema", "slow"]}])
def test_a_wrong_name_is_refused_before_training(keywords: dict[str, Any], tmp_path: Path) -> None:
    trainer = given(tmp_path, TWO_RULES, keywords=keywords, **EVALUATING)
    with pytest.raises(ValueError, match=r"`name` must be one of 'ema', 'swa', got"):
        trainer.train()
    assert same(present_weights(trainer), language_model().parameters())


@pytest.mark.parametrize("kind", [Recording, RecordingSeq2Seq])
def test_one_evaluation_is_of_the_weights_and_of_each_average_by_name(
    kind: type[Trainer], tmp_path: Path
) -> None:
    trainer = given(tmp_path, TWO_RULES, kind=kind, keywords=BOTH)
    trainer.train()
    before = all_there_is(trainer)
    together = trainer.evaluate(DATA[:2])
    assert same(trainer.seen[0], averages(optimizer_of(trainer), "ema"))
    assert same(trainer.seen[1], averages(optimizer_of(trainer), "swa"))
    assert same(trainer.seen[2], present_weights(trainer))
    assert same(all_there_is(trainer), before)
    losses = {key: loss for key, loss in together.items() if key.endswith("loss")}
    trainer.averaged_names, trainer.averaged_name = None, "swa"
    assert losses.keys() == {"eval_loss", "eval_ema_loss", "eval_swa_loss"}
    assert losses["eval_swa_loss"] == trainer.evaluate()["eval_loss"] != losses["eval_loss"]


def test_each_of_several_averages_is_evaluated_on_each_of_several_sets(tmp_path: Path) -> None:
    trainer = given(tmp_path, TWO_RULES, keywords=BOTH)
    trainer.train()
    metrics = trainer.evaluate({"first": DATA[:2], "second": DATA[2:4]}, metric_key_prefix="last")
    prefixes = ["last", "last_ema", "last_swa"]
    names = [f"{prefix}_{name}_loss" for prefix in prefixes for name in ("first", "second")]
    assert set(names) == {key for key in metrics if key.endswith("loss")}
    assert len(trainer.seen) == 6
    assert same(trainer.seen[1], averages(optimizer_of(trainer), "ema"))
    assert same(trainer.seen[3], averages(optimizer_of(trainer), "swa"))
    assert same(trainer.seen[5], present_weights(trainer))


def test_a_metric_without_a_prefix_is_of_the_training_weights(tmp_path: Path) -> None:
    trainer = given(tmp_path, TWO_RULES, kind=Logging, keywords=BOTH)
    trainer.train()
    metrics = trainer.evaluate()
    assert metrics["eval_first_weight"] == present_weights(trainer)[0][0, 0].item()
    assert metrics["eval_first_weight"] != trainer.seen[0][0][0, 0].item()


def test_metrics_of_each_average_are_logged_once_at_their_step(tmp_path: Path) -> None:
    trainer = given(tmp_path, TWO_RULES, keywords=BOTH, **EVALUATING)
    trainer.train()
    logged = [
        (entry["step"], key)
        for entry in trainer.state.log_history
        for key in entry
        if key.startswith("eval") and key.endswith("loss")
    ]
    keys = ["eval_ema_loss", "eval_swa_loss", "eval_loss"]
    assert logged == [(step, key) for step in (2, 4, 6) for key in keys]


def test_evaluating_several_averages_leaves_training_as_it_is(tmp_path: Path) -> None:
    plain = given(tmp_path, TWO_RULES, kind=Trainer, **EVALUATING)
    plain.train()
    trainer = given(tmp_path, TWO_RULES, keywords=BOTH, **EVALUATING)
    trainer.train()
    assert same(all_there_is(trainer), all_there_is(plain))


@pytest.mark.parametrize("metric", ["eval_swa_score", "swa_score"])
def test_the_best_model_and_early_stopping_go_by_the_metric_of_an_average(
    metric: str, tmp_path: Path
) -> None:
    # Of ema, swa and the weights at each evaluation: only those of swa rise and fall.
    metrics = scores(0, 1, 9, 0, 2, 8, 0, 1, 9, 0, 0, 9)
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = given(
        tmp_path,
        TWO_RULES,
        keywords={
            "compute_metrics": metrics,
            "callbacks": [stopping],
            "averaged_name": "swa",
            **BOTH,
            **AVERAGED,
        },
        metric_for_best_model=metric,
        greater_is_better=True,
        **{**BEST, "max_steps": 12},
    )
    trainer.train()
    assert trainer.state.best_metric == 2
    assert trainer.state.global_step == 8
    assert same(present_weights(trainer), averages_in(tmp_path / "checkpoint-4", "swa"))


def test_predictions_are_by_the_first_of_several_averages(tmp_path: Path) -> None:
    trainer = given(tmp_path, TWO_RULES, keywords={"averaged_names": ["swa", "ema"]})
    trainer.train()
    trainer.predict(DATA[:2])
    assert len(trainer.seen) == 1
    assert same(trainer.seen[0], averages(optimizer_of(trainer), "swa"))


def test_an_evaluation_that_raises_leaves_several_averages_to_evaluate(tmp_path: Path) -> None:
    trainer = given(tmp_path, TWO_RULES, keywords=BOTH)
    trainer.train()
    before = all_there_is(trainer)
    trainer.crash_at = 2
    with pytest.raises(ArithmeticError, match="crashed on purpose"):
        trainer.evaluate()
    assert same(all_there_is(trainer), before)
    assert {"eval_loss", "eval_ema_loss", "eval_swa_loss"} <= set(trainer.evaluate())


@pytest.mark.parametrize(
    ("flag", "dtype"), [("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)]
)
def test_evaluating_in_16_bits_rounds_the_weights_and_not_the_averages(
    flag: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    full_eval: dict[str, Any] = {flag: True}
    trainer = given(tmp_path, **full_eval)
    trainer.train()
    weights, kept = present_weights(trainer), averages(optimizer_of(trainer), "ema")
    trainer.evaluate()
    assert same(trainer.seen[-1], [average.to(dtype) for average in kept])
    assert same(present_weights(trainer), [weight.to(dtype) for weight in weights])
    assert same(averages(optimizer_of(trainer), "ema"), kept)


def test_evaluating_in_16_bits_during_training_leaves_it_as_it_is(tmp_path: Path) -> None:
    plain = given(tmp_path, kind=Trainer, bf16_full_eval=True, **EVALUATING)
    plain.train()
    trainer = given(tmp_path, bf16_full_eval=True, **EVALUATING)
    trainer.train()
    assert same(all_there_is(trainer), all_there_is(plain))


def test_a_trainer_whose_optimizer_does_not_average_warns(tmp_path: Path) -> None:
    trainer = given(tmp_path)
    trainer.optimizer = trainer.optimizer.wrapped
    with pytest.warns(UserWarning, match=r"^The Trainer has no AveragingOptimizer: its model"):
        trainer.evaluate()
    assert same(trainer.seen[0], language_model().parameters())


@pytest.mark.parametrize("depth", [0, 1, 2])
def test_the_averages_are_found_however_often_the_optimizer_is_wrapped(
    depth: int, tmp_path: Path
) -> None:
    trainer = given(tmp_path)
    averaging = trainer.optimizer
    for _ in range(depth):
        trainer.optimizer = AcceleratedOptimizer(trainer.optimizer)
    trainer.train()
    trainer.evaluate()
    assert trainer.averaging_optimizer() is averaging
    assert same(trainer.seen[-1], averages(averaging, "ema"))


@pytest.mark.parametrize("arguments", [EVALUATING, {}], ids=["train", "evaluate"])
def test_averages_of_copies_of_the_weights_are_refused(
    arguments: dict[str, Any], tmp_path: Path
) -> None:
    trainer = given(tmp_path, **arguments)
    trainer.optimizer = MasterCopies(trainer.optimizer)
    message = r"got a GPT2LMHeadModel with none\..* use `AveragingOptimizer\.of\(model, rule\)`\."
    with pytest.raises(ValueError, match=message):
        trainer.train() if arguments else trainer.evaluate()


class Naming(Recording):
    """Evaluates averages that the optimizer that trains doesn't keep."""

    averages: AveragingOptimizer

    def averaging_optimizer(self) -> AveragingOptimizer:
        return self.averages


class StepAverages(TrainerCallback):
    def __init__(self, averages: AveragingOptimizer) -> None:
        self.averages = averages

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.averages.step()


def test_averages_beside_the_optimizer_that_trains_are_used_if_they_are_named(
    tmp_path: Path,
) -> None:
    trainer = given(tmp_path, EMA(0.9), kind=Naming)
    trainer.averages = AveragingOptimizer.of(trainer.model, EMA(0.5))
    trainer.add_callback(StepAverages(trainer.averages))
    trainer.train()
    trainer.evaluate()
    expected = values(trainer.averages.averaged_model(trainer.model).parameters())
    assert same(trainer.seen[0], expected)
    assert trainer.averages.n_averaged() == 6
    trainer.save_averaged(tmp_path / "averaged")
    assert same(loaded_from(tmp_path / "averaged"), expected)


def classes() -> dict[str, Any]:
    """Return what `optimizer_cls_and_kwargs` may be to make an averaging optimizer."""

    def make(model: nn.Module, **arguments: Any) -> Optimizer:
        return AveragingOptimizer(AdamW(model.parameters(), **arguments), EMA(0.9))

    return {
        "class": (AveragingAdamW, {"rule": EMA(0.9), "lr": 0.01}),
        "factory": (lambda: make, {"lr": 0.01, "weight_decay": 0.0}),
    }


@pytest.mark.parametrize("kind", classes())
def test_a_class_or_a_factory_makes_the_averaging_optimizer(kind: str, tmp_path: Path) -> None:
    def start(optimizer: Any, directory: Path, **arguments: Any) -> Any:
        return Recording(
            language_model(),
            arguments_for(directory, **arguments),
            train_dataset=DATA,
            eval_dataset=DATA[:2],
            optimizer_cls_and_kwargs=optimizer,
        )

    plain = start((AdamW, {"lr": 0.01}), tmp_path)
    plain.train()
    trainer = start(classes()[kind], tmp_path, **SAVING)
    trainer.train()
    assert same(present_weights(trainer), present_weights(plain))
    trainer.evaluate()
    averaged = optimizer_of(trainer).averaged_model(trainer.model)
    assert same(trainer.seen[-1], averaged.parameters())
    resumed = start(classes()[kind], tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert same(all_there_is(resumed), all_there_is(trainer))
