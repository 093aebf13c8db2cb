"""Lightning's evaluation loop, which passes over the data several times in one evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple, TypeVar

from lightning.pytorch import Trainer
from lightning.pytorch.loops.evaluation_loop import _EvaluationLoop
from lightning.pytorch.trainer.connectors.logger_connector.result import (
    _METRICS,
    _OUT_DICT,
    _ResultCollection,
)
from lightning.pytorch.utilities.seed import isolate_rng

_Value = TypeVar("_Value")


class Pass(NamedTuple):
    """What an evaluation does once: log under a suffix, if there is one, with these weights."""

    suffix: str | None
    weights: AbstractContextManager[None]


def evaluate_in_passes(trainer: Trainer, passes: Callable[[], list[Pass]]) -> None:
    """Have the trainer validate and test in passes, which it asks for at each evaluation.

    Together they are one evaluation: it starts and ends once, and its metrics are logged
    together. The hooks of epochs and batches run in each pass.
    """
    loops = trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop
    for loop in loops:
        # Lightning has no hook to choose a loop, and these are already set up.
        loop.__class__ = _LoopInPasses
        vars(loop).update(passes=passes, in_passes=False, following=0, logged_before=[])


class _LoopInPasses(_EvaluationLoop):
    """Runs Lightning's loop for each pass, and starts and ends the evaluation only once."""

    passes: Callable[[], list[Pass]]
    in_passes: bool
    following: int
    logged_before: list[list[_OUT_DICT]]

    def run(self) -> list[_OUT_DICT]:
        self.setup_data()
        self.logged_before = []
        self.in_passes = True
        try:
            *others, last = self.passes()
            for self.following, each in zip(range(len(others), 0, -1), others, strict=True):
                with each.weights, self._logging_under(each.suffix), self._forgotten():
                    super().run()
            self.following = 0
            with last.weights, self._logging_under(last.suffix):
                logged: list[_OUT_DICT] = super().run()
            return logged
        finally:
            self.in_passes = False

    def setup_data(self) -> None:
        if not self.in_passes:
            super().setup_data()

    def on_run_start(self) -> None:
        if self.logged_before:
            self._on_evaluation_epoch_start()
        else:
            super().on_run_start()

    def on_run_end(self) -> list[_OUT_DICT]:
        if self.following:
            self.logged_before.append(self._end_pass())
            return []
        for logged in self.logged_before:
            for outputs, before in zip(self._logged_outputs, logged, strict=True):
                outputs.update(before)
        return super().on_run_end()

    def _end_pass(self) -> list[_OUT_DICT]:
        """End the epoch without the evaluation, and return what it logged, by dataloader."""
        connector = self.trainer._logger_connector
        connector.epoch_end_reached()
        connector._evaluation_epoch_end()
        self._on_evaluation_epoch_end()
        at_end = connector.update_eval_epoch_metrics()
        # Metrics that are objects of the model begin the next pass empty.
        connector.reset_results()
        return [{**outputs, **at_end} for outputs in self._logged_outputs]

    @contextmanager
    def _logging_under(self, suffix: str | None) -> Iterator[None]:
        results = self._results
        self._results = results if suffix is None else _SuffixedResults(suffix)
        try:
            yield
        finally:
            self._results = results

    @contextmanager
    def _forgotten(self) -> Iterator[None]:
        """Let the next pass draw the same random numbers and log at the same steps as this one."""
        seen = self._seen_batches_per_dataloader
        self._seen_batches_per_dataloader = seen.copy()
        try:
            with isolate_rng():
                yield
        finally:
            self._seen_batches_per_dataloader = seen


class _SuffixedResults(_ResultCollection):
    """Metrics whose names end in a suffix: "val_loss/ema", "val_loss/ema/dataloader_idx_0"."""

    def __init__(self, suffix: str) -> None:
        super().__init__(training=False)
        self.suffix = suffix

    def metrics(self, on_step: bool) -> _METRICS:
        metrics = super().metrics(on_step)
        return _METRICS(
            # A hook that reads `callback_metrics["val_loss"]` finds that of its pass.
            callback={**metrics["callback"], **self._suffixed(metrics["callback"])},
            log=self._suffixed(metrics["log"]),
            pbar=self._suffixed(metrics["pbar"]),
        )

    def _suffixed(self, metrics: dict[str, _Value]) -> dict[str, _Value]:
        mark = self.DATALOADER_SUFFIX.format("")
        parts = {name: name.partition(mark) for name in metrics}
        return {
            f"{stem}/{self.suffix}{mark}{index}": metrics[name]
            for name, (stem, mark, index) in parts.items()
        }
