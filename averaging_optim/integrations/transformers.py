"""Evaluation under averaged weights in transformers."""

from __future__ import annotations

import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import PredictionOutput

from averaging_optim import AveragingOptimizer


class AveragedEvaluationMixin(Trainer):
    """A Trainer that evaluates and predicts under the average of its AveragingOptimizer.

    To be named before the Trainer, or a subclass of it, that it is for. Checkpoints hold
    the training weights, and the averages with the optimizer's state. Before training
    there is no average, and the weights are evaluated as they are.

    `load_best_model_at_end` brings back the averages of the best checkpoint too, by
    loading the optimizer's and the scheduler's state.

    Args:
        args: of the Trainer.
        averaged_name: which average; may be left out if there is only one. Kept as an
            attribute of this name, which may be set at any time.
        kwargs: of the Trainer.

    Raises:
        ValueError: `save_only_model` is set with `load_best_model_at_end`, which would
            leave the best model without its averages. From an evaluation, the model has
            parameters that are trained and neither averaged nor left out by `average=False` or
            `exclude`.

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
    """

    def __init__(self, *args: Any, averaged_name: str | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.averaged_name = averaged_name
        if self.args.load_best_model_at_end and self.args.save_only_model:
            raise ValueError(
                "`save_only_model` must be False with `load_best_model_at_end`, got True. "
                "The averages of the best model are in the state of its optimizer."
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate the averaged weights, as `Trainer.evaluate` does the weights."""
        self._cast_for_evaluation()
        with self._averaged():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> PredictionOutput:
        """Predict with the averaged weights, as `Trainer.predict` does with the weights."""
        self._cast_for_evaluation()
        with self._averaged():
            return super().predict(*args, **kwargs)

    def save_averaged(self, output_dir: str | os.PathLike[str]) -> None:
        """Write a directory with the averaged weights, which `from_pretrained` loads.

        Args:
            output_dir: made if it is not there. Nothing is pushed to the Hub.

        Raises:
            RuntimeError: there is no AveragingOptimizer, as before training.
            ValueError: there is no average of the name chosen, or several and no name.
        """
        optimizer = self._averaging_optimizer()
        if optimizer is None:
            raise RuntimeError(
                "`save_averaged` is not allowed without an AveragingOptimizer. Train first."
            )
        with self._swap(optimizer):
            # As the call of a user it would push the directory of the training weights.
            self.save_model(os.fspath(output_dir), _internal_call=True)

    def _load_best_model(self) -> None:
        super()._load_best_model()
        self._load_optimizer_and_scheduler(self.state.best_model_checkpoint)

    def _cast_for_evaluation(self) -> None:
        """Do the Trainer's cast before the swap: leaving would not reach tensors made inside."""
        arguments, model = self.args, cast("nn.Module", self.model)
        if (arguments.fp16_full_eval or arguments.bf16_full_eval) and not self.is_in_train:
            model.to(torch.float16 if arguments.fp16_full_eval else torch.bfloat16)

    def _averaged(self) -> AbstractContextManager[None]:
        if self.optimizer is None:
            return nullcontext()
        optimizer = self._averaging_optimizer()
        if optimizer is None:
            warnings.warn(
                "The Trainer has no AveragingOptimizer: its model is evaluated as it is.",
                stacklevel=3,
            )
            return nullcontext()
        return self._swap(optimizer)

    def _swap(self, optimizer: AveragingOptimizer) -> AbstractContextManager[None]:
        optimizer.check_model(cast("nn.Module", self.model))
        return optimizer.swap_to_averaged(self.averaged_name)

    def _averaging_optimizer(self) -> AveragingOptimizer | None:
        # Once training has begun, Accelerate's optimizer is around the one that was given.
        for optimizer in (self.optimizer, getattr(self.optimizer, "optimizer", None)):
            if isinstance(optimizer, AveragingOptimizer):
                return optimizer
        return None
