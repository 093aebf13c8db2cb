"""Signs that weights are trained past `AveragingOptimizer.step`, which averages none of them."""

from __future__ import annotations

from averaging_optim._averages.average import Average


class TrainedPast:
    """What was seen of training that does not go through `step`, told once.

    step: whether the wrapped optimizer's `step` was called by somebody else.
    method: a method of the wrapped optimizer by which it may have been trained.
    has_state: whether the wrapped optimizer has had a state from the start, or loaded one.
    """

    def __init__(self) -> None:
        self.step = False
        self.method = ""
        self.has_state = False
        self._is_told = False

    def message(self, average: Average, steps: int, has_state: bool) -> str:
        """Return what to tell before the average is used; nothing if all is well or was told.

        Args:
            steps: that went through `AveragingOptimizer.step`.
            has_state: whether the wrapped optimizer has a state now.
        """
        n_averaged, is_manual = average.n_averaged.value, average.rule.every is None
        if self._is_told or (is_manual and n_averaged > 0):
            return ""
        if is_manual and steps > 0:
            reason = (
                f"its rule has `every=None`, and `update_averages` was not called in {steps} steps"
            )
        elif self.step:
            reason = "the `step` of the wrapped optimizer was called instead of this one's"
        elif steps == n_averaged == 0 and self.method:
            reason = f"the weights were trained by `{self.method}` of the wrapped optimizer"
        elif steps == n_averaged == 0 and has_state and not self.has_state:
            reason = "the wrapped optimizer was trained, and not by this one's `step`"
        else:
            return ""
        self._is_told = True
        return (
            f"The average {average.name!r} misses training steps: {reason}. Call "
            "`update_averages()` after each step that isn't taken by `AveragingOptimizer.step`."
        )


def trains(name: str, value: object) -> bool:
    """Return whether to call this attribute of an optimizer may train weights."""
    is_such = "step" in name or "backward" in name
    return callable(value) and is_such and not any(part in name for part in ("hook", "skip", "__"))
