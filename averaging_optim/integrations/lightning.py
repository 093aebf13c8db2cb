"""Evaluation under averaged weights in Lightning."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from averaging_optim import AveragingOptimizer, together


class EvaluateAveraged(Callback):
    """Validate, test and predict under the average of every AveragingOptimizer.

    The training weights are back before checkpoints are written, in the hooks that end an
    evaluation, and when it raises. A checkpoint written while one is under way, by another
    callback or a signal handler, holds them all the same; only one of weights alone
    (`save_weights_only`) holds what the model holds. The sanity check before training
    sees the training weights.

    After `fit`, the same trainer evaluates the last averages, or those of the checkpoint
    given as `ckpt_path`, which may be "best". Lightning takes "best" if no model is passed.
    A new trainer has averages from a `ckpt_path` only, and calls `configure_optimizers` to
    load them. Without any, it warns and evaluates the weights as they are.

    Args:
        name: which average; may be left out if each optimizer has only one.

    Raises:
        ValueError: from `fit`, an optimizer has no average of this name, or several and
            no name, or the model has parameters that are trained and neither averaged nor left
            out by `average=False` or `exclude`; from an evaluation, `ckpt_path` holds no
            optimizer states.

    Example:
        >>> import torch
        >>> from lightning.pytorch import LightningModule, Trainer
        >>> from averaging_optim import EMA, AveragingOptimizer
        >>> class Model(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.layer = torch.nn.Linear(1, 1)
        ...     def training_step(self, batch):
        ...         return self.layer(batch).square().mean()
        ...     def validation_step(self, batch):
        ...         self.log("loss", self.layer(batch).square().mean())
        ...     def configure_optimizers(self):
        ...         return AveragingOptimizer(torch.optim.Adam(self.parameters()), EMA(0.99))
        >>> trainer = Trainer(
        ...     callbacks=[EvaluateAveraged()],
        ...     max_steps=4,
        ...     logger=False,
        ...     enable_checkpointing=False,
        ...     enable_progress_bar=False,
        ...     enable_model_summary=False,
        ... )
        >>> trainer.fit(Model(), torch.ones(4, 2, 1), torch.ones(1, 2, 1))
    """

    def __init__(self, name: str | None = None) -> None:
        self.name = name
        self._swaps: ExitStack | None = None
        self._checkpoint: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._checkpoint = {}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Refuses a wrong name before training rather than after its first epoch.
        self._swap(trainer)
        self._restore()

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if trainer.state.fn != TrainerFn.FITTING:
            self._checkpoint = checkpoint

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._start(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning calls checkpoint callbacks after all others, so they save what was trained.
        self._restore()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._swaps is not None:
            self._restore()
            weights = trainer.strategy.lightning_module_state_dict()
            checkpoint["state_dict"] = copy.deepcopy(weights)
            self._swap(trainer)

    def _start(self, trainer: Trainer) -> None:
        if trainer.ckpt_path is not None and trainer.state.fn != TrainerFn.FITTING:
            self._load_averages(trainer)
        self._swap(trainer)

    def _load_averages(self, trainer: Trainer) -> None:
        """Load what Lightning loads for `fit` only: the optimizers' state."""
        if "optimizer_states" not in self._checkpoint:
            raise ValueError(
                "`ckpt_path` must hold optimizer states to evaluate averages, got "
                f"{trainer.ckpt_path!r}. Save it without `save_weights_only`."
            )
        # Lightning evaluates in inference mode, whose tensors cannot be written to outside.
        with torch.inference_mode(mode=False):
            if not _averaging_optimizers(trainer):
                trainer.strategy.setup_optimizers(trainer)
            trainer.strategy.load_optimizer_state_dict(self._checkpoint)
        self._checkpoint = {}

    def _swap(self, trainer: Trainer) -> None:
        optimizers = _averaging_optimizers(trainer)
        if not optimizers:
            rank_zero_warn(
                "EvaluateAveraged found no AveragingOptimizer of this model: it is evaluated "
                "as it is."
            )
        with ExitStack() as swaps:
            if optimizers:
                averaged = together(*optimizers)
                averaged.check_model(trainer.lightning_module)
                swaps.enter_context(averaged.swap_to_averaged(self.name))
            self._swaps = swaps.pop_all()

    def _restore(self) -> None:
        swaps, self._swaps = self._swaps, None
        if swaps is not None:
            swaps.close()


def _averaging_optimizers(trainer: Trainer) -> list[AveragingOptimizer]:
    """Return those that train the present model: a trainer keeps its optimizers after `fit`."""
    weights = set(trainer.lightning_module.parameters())
    optimizers = (
        each.optimizer if isinstance(each, LightningOptimizer) else each
        for each in trainer.optimizers
    )
    return [
        optimizer
        for optimizer in optimizers
        if isinstance(optimizer, AveragingOptimizer)
        and any(not weights.isdisjoint(group["params"]) for group in optimizer.param_groups)
    ]
