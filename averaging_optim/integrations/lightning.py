"""Evaluation under averaged weights in Lightning."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Final, Literal, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, callbacks
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from averaging_optim import AveragingOptimizer, together
from averaging_optim._checks import check_either, check_names
from averaging_optim.integrations._lightning_passes import Pass, evaluate_in_passes

_Checkpoint: TypeAlias = dict[str, Any]

# Shown in place of an average, whose name it cannot be.
_TRAINING: Final = "the training weights"
# Of a checkpoint's averaged weights: which average, and in a full one the training weights.
_KEY: Final = "averaging_optim"


class EvaluateAveraged(Callback):
    """Validate, test and predict with the averages of every AveragingOptimizer.

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

    The training weights come back at the end of each evaluation, before checkpoints are written,
    and if the evaluation raises. The sanity check before training uses them too.

    After `fit`, the same trainer evaluates its last averages, or those of the checkpoint that you
    pass as `ckpt_path`, which may be "best". Lightning takes "best" if you pass no model. A new
    trainer needs a `ckpt_path`: it calls `configure_optimizers` and loads the averages. Without
    averages, it warns and evaluates the training weights.

    With `names`, each validation and test runs once with each of these averages, and then with the
    training weights. "val_loss" is for the training weights, "val_loss/ema" for the average "ema".
    Every run draws the same random numbers, and training continues as after a single one.

    With `save="averaged"`, `load_from_checkpoint` returns the averaged model. A checkpoint of
    weights only (`save_weights_only`) holds just the average. A full one also holds the training
    weights, in `checkpoint["averaging_optim"]["training_state_dict"]`. If you resume with this
    callback, whatever its `save`, training continues from them. Without the callback it continues
    from the average, and Lightning warns that EvaluateAveraged is missing.

    Args:
        name: which average. You may leave it out if each optimizer has only one. With `names`, it
            is the average to predict with and to save.
        names: which averages to validate and test, each with its own metrics.
        save: "training" or "averaged": the weights in a checkpoint's `state_dict`, even if it is
            written during an evaluation. Until the average's first update, they are the same.

    Raises:
        ValueError: from `fit`: an optimizer has no average of a name, or several and no name; the
            model has parameters that are trained and neither averaged nor left out by
            `average=False` or `exclude`; `save="averaged"` is used with a strategy that reads and
            writes checkpoints itself (FSDP, ModelParallel, DeepSpeed); or `save="averaged"` or
            `names` is used with Lightning's WeightAveraging. From an evaluation: `ckpt_path` holds
            neither optimizer states nor the average.
    """

    def __init__(
        self,
        name: str | None = None,
        *,
        names: Sequence[str] | None = None,
        save: Literal["training", "averaged"] = "training",
    ) -> None:
        check_either("save", save, "training", "averaged")
        if names is not None:
            check_names("names", names)
        self.name = name
        self.names = names
        self.save = save
        self._shown: str | None = _TRAINING
        self._swaps = ExitStack()
        self._loaded: _Checkpoint = {}
        self._metrics_before: dict[str, Tensor] = {}
        self._warned = False

    def state_dict(self) -> dict[str, Any]:
        # Of a callback with a state Lightning says that it is missing when training resumes.
        return {"save": self.save} if self.save == "averaged" else {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = {}
        if self.save == "averaged":
            _check_strategy(trainer)
        if self.save == "averaged" or self.names is not None:
            _check_other_callbacks(trainer)
        # Lightning calls no callback's hook for checkpoints of weights alone.
        _put_around(trainer._checkpoint_connector, "dump_checkpoint", self._dump, trainer)
        _put_around(trainer.strategy, "load_checkpoint", self._load, trainer)
        if self.names is not None:
            evaluate_in_passes(trainer, partial(self._passes, trainer, self.names))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Refuses a wrong name before training rather than after its first epoch.
        for average in self._used_in_fit():
            with self._showing(trainer, average):
                pass

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._metrics_before = dict(trainer.callback_metrics)
        if self.names is None and not trainer.sanity_checking:
            self._start(trainer)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.names is None:
            self._start(trainer)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning calls checkpoint callbacks after all others, so they save what was trained.
        self._restore()
        if trainer.state.fn == TrainerFn.FITTING:
            self._warn_of_choices_by_other_weights(trainer)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._restore()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _used_in_fit(self) -> list[str | None]:
        evaluated = [self.name] if self.names is None else self.names
        saved = [self.name] if self.save == "averaged" else []
        return list(dict.fromkeys([*evaluated, *saved]))

    def _start(self, trainer: Trainer) -> None:
        wanted = [] if self.name is None else [self.name]
        if self._load_averages(trainer, wanted) is None:
            self._show(trainer, self.name)

    def _passes(self, trainer: Trainer, names: Sequence[str]) -> list[Pass]:
        held = self._load_averages(trainer, names)
        if held is not None:
            return [Pass(held, self._showing(trainer, _TRAINING))]
        if trainer.sanity_checking or not _found_averaging_optimizers(trainer):
            names = []
        averages = [Pass(name, self._showing(trainer, name)) for name in names]
        return [*averages, Pass(None, self._showing(trainer, _TRAINING))]

    def _load_averages(self, trainer: Trainer, wanted: Sequence[str]) -> str | None:
        """Load what Lightning loads for `fit` only: the optimizers' state.

        Without any, return which average of those wanted the weights in the checkpoint are.
        """
        if trainer.ckpt_path is None or trainer.state.fn == TrainerFn.FITTING:
            return None
        loaded, self._loaded = self._loaded, {}
        if "optimizer_states" not in loaded:
            return _held_average(loaded, wanted, trainer.ckpt_path)
        # Lightning evaluates in inference mode, whose tensors cannot be written to outside.
        with torch.inference_mode(mode=False):
            if not _averaging_optimizers(trainer):
                trainer.strategy.setup_optimizers(trainer)
            trainer.strategy.load_optimizer_state_dict(loaded)
        return None

    def _dump(
        self, trainer: Trainer, dump: Callable[..., _Checkpoint], weights_only: bool | None = None
    ) -> _Checkpoint:
        """Make a checkpoint that holds what `save` says.

        For averaged weights two are made, of either weights, so that the model's own hook
        filters or renames both.
        """
        copied = self._shown is not _TRAINING
        with self._showing(trainer, _TRAINING):
            checkpoint = dump(weights_only)
            if copied:
                checkpoint["state_dict"] = copy.deepcopy(checkpoint["state_dict"])
        if self.save == "training" or not _averaging_optimizers(trainer):
            return checkpoint
        with self._showing(trainer, self.name):
            averaged = copy.deepcopy(dump(weights_only=True))
        kept = {"average": self.name or next(iter(_averaging_optimizers(trainer)[0].rules))}
        if weights_only:
            return {**averaged, _KEY: kept}
        kept["training_state_dict"] = checkpoint["state_dict"]
        return {**checkpoint, "state_dict": averaged["state_dict"], _KEY: kept}

    def _load(
        self, trainer: Trainer, load: Callable[..., _Checkpoint], *args: Any, **kwargs: Any
    ) -> _Checkpoint:
        """Load a checkpoint as one of the training weights, if it has them."""
        checkpoint = load(*args, **kwargs)
        kept = checkpoint.get(_KEY, {})
        if "training_state_dict" in kept:
            checkpoint["state_dict"] = kept.pop("training_state_dict")
        if trainer.state.fn != TrainerFn.FITTING:
            self._loaded = checkpoint
        return checkpoint

    def _warn_of_choices_by_other_weights(self, trainer: Trainer) -> None:
        """Warn once if files of weights alone are chosen by a metric of other weights."""
        for monitor in self._monitors_of_weights(trainer):
            evaluated, saved = self._evaluated_for(monitor), self._saved()
            if evaluated != saved and not self._warned:
                self._warned = True
                rank_zero_warn(
                    f"`ModelCheckpoint(monitor={monitor!r}, save_weights_only=True)` chooses by "
                    f"{_described(evaluated)} and saves {_described(saved)}. Use "
                    f"`EvaluateAveraged({_arguments(evaluated)})` to save what was evaluated."
                )

    def _monitors_of_weights(self, trainer: Trainer) -> list[str]:
        """Return the metrics of this validation by which weights alone are saved."""
        if not _averaging_optimizers(trainer):
            return []
        before, metrics = self._metrics_before, trainer.callback_metrics
        logged = {name for name in metrics if metrics[name] is not before.get(name)}
        return [
            each.monitor
            for each in trainer.checkpoint_callbacks
            if isinstance(each, ModelCheckpoint)
            and each.save_weights_only
            and each.monitor in logged
        ]

    def _evaluated_for(self, metric: str) -> str | None:
        if self.names is None:
            return self.name
        suffix = metric.partition("/dataloader_idx_")[0].rpartition("/")[2]
        return suffix if suffix in self.names else _TRAINING

    def _saved(self) -> str | None:
        if self.save == "training":
            return _TRAINING
        # With `names` and no name there is one average only.
        return self.name or (self.names[0] if self.names else None)

    @contextmanager
    def _showing(self, trainer: Trainer, average: str | None) -> Iterator[None]:
        """Have the model hold an average, or the training weights, until the block is left."""
        before = self._shown
        self._show(trainer, average)
        try:
            yield
        finally:
            self._show(trainer, before)

    def _show(self, trainer: Trainer, average: str | None) -> None:
        self._restore()
        if average is _TRAINING:
            return
        optimizers = _found_averaging_optimizers(trainer)
        if optimizers:
            averaged = together(*optimizers)
            averaged.check_model(trainer.lightning_module)
            self._swaps.enter_context(averaged.swap_to_averaged(average))
            self._shown = average

    def _restore(self) -> None:
        self._shown = _TRAINING
        self._swaps.close()


def _check_strategy(trainer: Trainer) -> None:
    if trainer.strategy.restore_checkpoint_after_setup:
        raise ValueError(
            "`save` must be 'training' with a strategy that reads and writes checkpoints itself, "
            f"got 'averaged' with {type(trainer.strategy).__name__}. Export the average with "
            "`averaged_state_dict`."
        )


def _check_other_callbacks(trainer: Any) -> None:
    # Lightning has it from 2.6 on.
    others = getattr(callbacks, "WeightAveraging", ())
    for each in trainer.callbacks:
        if isinstance(each, others):
            raise ValueError(
                "`names` and `save` must be left out beside Lightning's WeightAveraging, got "
                f"{type(each).__name__}. Remove it: it evaluates and saves its own average."
            )


def _put_around(owner: Any, method: str, function: Callable[..., Any], *arguments: Any) -> None:
    """Have a method of an object call `function(*arguments, method, ...)`, unless it does."""
    inner = getattr(owner, method)
    if getattr(inner, "func", None) != function:
        setattr(owner, method, partial(function, *arguments, inner))


def _held_average(checkpoint: _Checkpoint, wanted: Sequence[str], path: Any) -> str:
    """Return the average that the weights in a checkpoint of weights alone are."""
    held: str | None = checkpoint.get(_KEY, {}).get("average")
    if held is None:
        raise ValueError(
            f"`ckpt_path` must hold optimizer states to evaluate averages, got {path!r}. Save it "
            'without `save_weights_only`, or with `EvaluateAveraged(save="averaged")`.'
        )
    if wanted and held not in wanted:
        raise ValueError(
            f"`ckpt_path` must hold the average {' or '.join(map(repr, wanted))}, got {path!r} "
            f"with {held!r} alone. Save it without `save_weights_only`."
        )
    return held


def _described(average: str | None) -> str:
    if average is _TRAINING:
        return _TRAINING
    return "the average" if average is None else f"the average {average!r}"


def _arguments(average: str | None) -> str:
    """Return the arguments of a callback that saves these weights."""
    if average is _TRAINING:
        return 'save="training"'
    return 'save="averaged"' if average is None else f'{average!r}, save="averaged"'


def _found_averaging_optimizers(trainer: Trainer) -> list[AveragingOptimizer]:
    optimizers = _averaging_optimizers(trainer)
    if not optimizers:
        rank_zero_warn(
            "EvaluateAveraged found no AveragingOptimizer of this model: it is evaluated as it is."
        )
    return optimizers


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
