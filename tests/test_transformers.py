"""transformers.Trainer drives, saves and resumes the wrapper; the mixin evaluates its averages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from training import averages, everything, same, values
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
)

from averaging_optim import EMA, SWA, AveragingOptimizer, Rule
from averaging_optim.integrations.transformers import AveragedEvaluationMixin

TWO_RULES: dict[str, Rule] = {"ema": EMA(0.9), "swa": SWA()}
TEXTS = torch.randint(8, (12, 5), generator=torch.Generator().manual_seed(0))
EVALUATING: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 2}
DATA = [{"input_ids": text, "labels": text} for text in TEXTS]


def language_model() -> GPT2LMHeadModel:
    """Return the same GPT-2 of about 1,000 weights, with dropout, at each call."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=8,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


class Recording(AveragedEvaluationMixin, Trainer):
    """Keeps the weights that each evaluation step sees."""

    seen: list[list[Tensor]]
    crash_at: int = 0

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = [*getattr(self, "seen", []), weights_of(self)]
        if len(self.seen) == self.crash_at:
            raise ArithmeticError("crashed on purpose")
        return super().prediction_step(*args, **kwargs)


class RecordingSeq2Seq(Recording, Seq2SeqTrainer):
    """The same over a subclass of Trainer that has its own `evaluate` and `predict`."""


class Creating(Recording):
    """Wraps the optimizer that the Trainer would have made."""

    def create_optimizer(self, model: Any = None) -> Optimizer:
        if self.optimizer is None:
            self.optimizer = AveragingOptimizer(super().create_optimizer(model), EMA(0.9))
        return self.optimizer


def arguments_for(directory: Path, **arguments: Any) -> Seq2SeqTrainingArguments:
    chosen: dict[str, Any] = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "max_steps": 6,
    }
    return Seq2SeqTrainingArguments(str(directory), **{**chosen, **arguments})


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


def weights_of(trainer: Trainer) -> list[Tensor]:
    assert isinstance(trainer.model, nn.Module)
    return values(trainer.model.parameters())


def all_there_is(trainer: Trainer) -> list[Tensor]:
    """Return the weights and what the optimizer holds: averages, moments, counters."""
    assert isinstance(trainer.model, nn.Module)
    return everything(trainer.model, optimizer_of(trainer))


def averages_in(checkpoint: Path) -> list[Tensor]:
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    return [state[index]["averaged_ema"] for index in sorted(state)]


def weights_in(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")


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
    assert same(weights_of(averaging), weights_of(plain))
    assert not same(weights_of(averaging), averages(optimizer_of(averaging), "ema"))


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


def test_the_best_model_comes_back_with_its_averages(tmp_path: Path) -> None:
    # Worse at each evaluation, so that the first is the best.
    scores = iter([3.0, 2.0, 1.0, 0.0])
    trainer = given(
        tmp_path,
        keywords={"compute_metrics": lambda _: {"score": next(scores)}},
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
        **EVALUATING,
    )
    trainer.train()
    assert same(trainer.seen[0], averages_in(tmp_path / "checkpoint-2"))
    trainer.evaluate()
    assert same(trainer.seen[-1], trainer.seen[0])
    best = weights_in(tmp_path / "checkpoint-2")
    assert same([trainer.model.state_dict()[key] for key in best], best.values())


def test_the_best_model_without_its_averages_is_refused_before_training(tmp_path: Path) -> None:
    saving: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    with pytest.raises(ValueError, match=r"`save_only_model` must be False with `load_best_model"):
        given(tmp_path, load_best_model_at_end=True, **saving, **EVALUATING)


@pytest.mark.parametrize(
    ("flag", "dtype"), [("bf16_full_eval", torch.bfloat16), ("fp16_full_eval", torch.float16)]
)
def test_evaluating_in_16_bits_rounds_the_weights_and_not_the_averages(
    flag: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    full_eval: dict[str, Any] = {flag: True}
    trainer = given(tmp_path, **full_eval)
    trainer.train()
    weights, kept = weights_of(trainer), averages(optimizer_of(trainer), "ema")
    trainer.evaluate()
    assert same(trainer.seen[-1], [average.to(dtype) for average in kept])
    assert same(weights_of(trainer), [weight.to(dtype) for weight in weights])
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
