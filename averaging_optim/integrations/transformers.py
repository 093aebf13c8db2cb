"""Evaluation under averaged weights in transformers."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, cast

import torch
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PredictionOutput

from averaging_optim import AveragingOptimizer
from averaging_optim._checks import check_either, check_names
from averaging_optim._warnings import warn_user

# Folder for them in a checkpoint whose own model files hold the average.
_TRAINING_WEIGHTS = "training_weights"


class AveragedEvaluationMixin(Trainer):
    """A Trainer that evaluates and predicts under the average of its AveragingOptimizer.

    Example:
        >>> import torch
        >>> from transformers import Trainer, TrainingArguments
        >>> from averaging_optim import EMA, AveragingOptimizer
        >>> class AveragingTrainer(AveragedEvaluationMixin, Trainer):
        ...     def create_optimizer(self, model=None):
        ...         if self.optimizer is None:
        ...             adam = super().create_optimizer(model)
        ...             self.optimizer = AveragingOptimizer(adam, EMA(decay=0.99))
        ...         return self.optimizer
        >>> class Model(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return {"loss": super().forward(x).square().mean()}
        >>> data = [{"x": torch.ones(2)}] * 8
        >>> arguments = TrainingArguments(
        ...     use_cpu=True, max_steps=2, save_strategy="no", report_to="none"
        ... )
        >>> trainer = AveragingTrainer(Model(2, 1), arguments, train_dataset=data)
        >>> training = trainer.train()  # doctest: +ELLIPSIS
        {'train_runtime'...}
        >>> metrics = trainer.evaluate(data)

    List it before `Trainer` (or your subclass) in the bases. Before training there is no average,
    and the training weights are evaluated.

    Args:
        args: for the Trainer.
        averaged_name: which average to evaluate, predict with and save. You may leave it out if
            there is only one. By default the first of `averaged_names`, if you pass these.
        averaged_names: evaluate the training weights and each of these averages. An average's name
            is part of its metrics' names: `eval_loss`, `eval_ema_loss`. Each evaluation is logged
            and passed to the callbacks, as for several evaluation sets.
        save: "training" or "averaged": the weights that the Trainer writes, in checkpoints, by
            `save_model` and on the Hub. With "averaged" these are the evaluated ones. A checkpoint
            then has the training weights in its folder `training_weights`, from which this class
            resumes, and `load_best_model_at_end` leaves the best average in the model.
        kwargs: for the Trainer.

    You may set the attributes `averaged_name` and `averaged_names` at any time.

    Raises:
        ValueError: an argument has a wrong value, or contradicts the Trainer's: the best model
            would be saved without its average, or chosen by another average than the saved one, or
            `save="averaged"` is used with FSDP or DeepSpeed. From `train` or an evaluation: there
            is no average of a name, or the model has parameters that are trained and neither
            averaged nor left out by `average=False` or `exclude`.
    """

    def __init__(
        self,
        *args: Any,
        averaged_name: str | None = None,
        averaged_names: Sequence[str] | None = None,
        save: Literal["training", "averaged"] = "training",
        **kwargs: Any,
    ) -> None:
        if averaged_names is not None:
            check_names("averaged_names", averaged_names)
        check_either("save", save, "training", "averaged")
        super().__init__(*args, **kwargs)
        self.averaged_name = averaged_name or (averaged_names[0] if averaged_names else None)
        self.averaged_names = averaged_names
        self._saves_averages = save == "averaged"
        self._is_evaluating_each = False
        self._check_saving()
        self.add_callback(_BeforeTraining(self._check_averages))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the average, or the training weights and each of `averaged_names`.

        Args:
            args, kwargs: for `Trainer.evaluate`. With `averaged_names`, pass `metric_key_prefix` by
                keyword.
        """
        if self._is_evaluating_each:  # `Trainer.evaluate` calls this for each of several sets
            return super().evaluate(*args, **kwargs)
        self._cast_for_evaluation()
        if self.averaged_names:
            return self._evaluate_each(partial(super().evaluate, *args), **kwargs)
        with self._averaged(self.averaged_name):
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predict with the averaged weights, as `Trainer.predict` does with the weights."""
        self._cast_for_evaluation()
        with self._averaged(self.averaged_name):
            return super().predict(*args, **kwargs)

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """Write the model, as `Trainer.save_model` does; the average with `save="averaged"`."""
        with self._averaged(self.averaged_name) if self._saves_averages else nullcontext():
            super().save_model(*args, **kwargs)

    def save_averaged(self, output_dir: str | os.PathLike[str]) -> None:
        """Write a directory with the averaged weights, which `from_pretrained` loads.

        Args:
            output_dir: created if it doesn't exist. Nothing is pushed to the Hub.

        Raises:
            RuntimeError: there is no AveragingOptimizer, as before training.
            ValueError: there is no average of this name, or several and no name.
        """
        optimizer = self.averaging_optimizer()
        if optimizer is None:
            raise RuntimeError(
                "`save_averaged` is not allowed without an AveragingOptimizer. Train first."
            )
        with self._swap(optimizer, self.averaged_name):
            # As the call of a user it would push the directory of the training weights.
            self.save_model(os.fspath(output_dir), _internal_call=True)

    def averaging_optimizer(self) -> AveragingOptimizer | None:
        """Return the optimizer whose averages are used, if there is one.

        It is the Trainer's, or inside it: Accelerate and others wrap it again. Override this to use
        another one, such as `AveragingOptimizer.of(model, rule)`.
        """
        optimizer: Any = self.optimizer
        while optimizer is not None and not isinstance(optimizer, AveragingOptimizer):
            optimizer = getattr(optimizer, "optimizer", None)
        return optimizer

    def _check_saving(self) -> None:
        arguments = self.args
        chooses_best = arguments.load_best_model_at_end or arguments.save_strategy == "best"
        if self._saves_averages:
            self._check_saving_averages(chooses_best)
        elif arguments.save_only_model and arguments.load_best_model_at_end:
            raise ValueError(
                "`save_only_model` must be False with `load_best_model_at_end`, got True. "
                "The averages of the best model are in the state of its optimizer. "
                "To save averages as models, pass `save='averaged'`."
            )
        elif arguments.save_only_model and arguments.eval_strategy != "no":
            warn_user(
                "`save_only_model` saves training weights without their averages, but averages are "
                "evaluated. To save these as models, pass `save='averaged'`."
            )

    def _check_saving_averages(self, chooses_best: bool) -> None:
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise ValueError(
                "`save` must be 'training' with FSDP or DeepSpeed, got 'averaged'. "
                "Call `save_averaged` for a model that holds the average."
            )
        metric, prefix = str(self.args.metric_for_best_model), f"eval_{self.averaged_name}_"
        is_of_saved = f"eval_{metric.removeprefix('eval_')}".startswith(prefix)
        if chooses_best and self.averaged_names and not is_of_saved:
            raise ValueError(
                "`metric_for_best_model` must be a metric of the average that is saved, got "
                f"{metric!r}. Choose one such as '{prefix}loss', or another `averaged_name`."
            )

    def _check_averages(self) -> None:
        """Refuse a wrong name or model before training rather than when it is first evaluated."""
        if self._saves_averages or self.args.eval_strategy != "no":
            for name in (*(self.averaged_names or ()), self.averaged_name):
                self._averaged(name)

    def _evaluate_each(
        self,
        evaluate: Callable[..., dict[str, float]],
        *,
        metric_key_prefix: str = "eval",
        **kwargs: Any,
    ) -> dict[str, float]:
        """Return the metrics of each average, by its prefix, and of the training weights.

        These come last, and draw the same random numbers, so that training goes on as if they alone
        had been evaluated, and so that a metric without an average's prefix is theirs.
        """
        metrics: dict[str, float] = {}
        self._is_evaluating_each = True
        try:
            for name in self.averaged_names or ():
                with self._averaged(name), self._random_numbers_restored():
                    metrics |= evaluate(metric_key_prefix=f"{metric_key_prefix}_{name}", **kwargs)
            return metrics | evaluate(metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self._is_evaluating_each = False

    def _random_numbers_restored(self) -> AbstractContextManager[None]:
        device = self.args.device
        return torch.random.fork_rng([device] if device.type == "cuda" else [])

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if self._saves_averages:
            folder = os.path.join(output_dir, _TRAINING_WEIGHTS)
            super().save_model(folder, _internal_call=True)
        super()._save_optimizer_and_scheduler(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, *args: Any, **kwargs: Any) -> None:
        folder = os.path.join(resume_from_checkpoint, _TRAINING_WEIGHTS)
        found = folder if os.path.isdir(folder) else resume_from_checkpoint
        super()._load_from_checkpoint(found, *args, **kwargs)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        optimizer = self.averaging_optimizer()
        if not self.args.save_only_model:
            self._load_optimizer_and_scheduler(self.state.best_model_checkpoint)
        elif optimizer is not None:
            model, name = cast("nn.Module", self.model), self.averaged_name
            optimizer.load_averaged_state_dict(
                model,
                model.state_dict(),
                name,
                n_averaged=max(1, optimizer.n_averaged(name)),  # the best one's is not known
                strict=False,  # buffers that are not saved stay what they are
            )

    def _cast_for_evaluation(self) -> None:
        """Do the Trainer's cast before the swap: leaving would not reach tensors made inside."""
        arguments, model = self.args, cast("nn.Module", self.model)
        if (arguments.fp16_full_eval or arguments.bf16_full_eval) and not self.is_in_train:
            model.to(torch.float16 if arguments.fp16_full_eval else torch.bfloat16)

    def _averaged(self, name: str | None) -> AbstractContextManager[None]:
        optimizer = self.averaging_optimizer()
        if optimizer is not None:
            return self._swap(optimizer, name)
        if self.optimizer is not None:
            warn_user("The Trainer has no AveragingOptimizer: its model is used as it is.")
        return nullcontext()

    def _swap(
        self, optimizer: AveragingOptimizer, name: str | None
    ) -> AbstractContextManager[None]:
        optimizer.check_model(cast("nn.Module", self.model))
        return optimizer.swap_to_averaged(name)


class _BeforeTraining(TrainerCallback):
    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self._check()
