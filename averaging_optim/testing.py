"""Does a trainer drive the wrapper rightly? Run it with and without, and compare."""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from averaging_optim import EMA, AveragingOptimizer, together
from averaging_optim._averages.sharding import local_parts
from averaging_optim._averages.steps import took_no_step
from averaging_optim._checks import check_integer, short_repr

__all__ = ["check_trainer"]

_Wrap = Callable[[Optimizer], Optimizer]
_Train = Callable[..., tuple[nn.Module, Any]]

_ALIKE = "Two runs without averages are alike."
_CALLED_ONCE = "`step()` is called once for each step."
_SAME_WEIGHTS = "Weights train as without averages."
_KEPT = "Weights stay what `step()` makes them."
_AVERAGED = "Every step is averaged."
_SWAPPED = "A swap puts the averages into the model."
_SAME_RESUMED_WEIGHTS = "Resumed weights train as without averages."
_CONTINUED = "Resumed averages continue."
_RESUMED = "Resuming equals never stopping."

# What to do.
_SEED = "Build the model inside `train`, and seed there what is random: `torch.manual_seed(0)`."
_CALL_ONCE = "Call `step()` of what `wrap` returns, once all gradients of a step are there."
_LOOK_FOR_CLASSES = "Look where the trainer asks which class its optimizer is of, or what it has."
_CALL_STEP = "Call `step()` of what `wrap` returns, not of the optimizer inside."
_LEAVE_TO_STEP = "Leave updates to `step()`: something else makes some."
_SAVE = "Save the state dict of what `wrap` returns, and load it into what `wrap` returns."
_LEAVE_TO_LOADING = "Leave its state to `load_state_dict()`: something else writes into it."
_CONSTRAIN = (
    "Averages are of the weights before that. Clamp weights, say, in a hook of the optimizer's "
    "step: call `optimizer.register_step_post_hook(clamp)` before `wrap(optimizer)`."
)
_AVERAGE_THE_MODEL = (
    "The trainer has put other weights into `param_groups`, such as flat copies in float32, which "
    "are averaged in place of the model's. Average the model itself: use "
    "`AveragingOptimizer.of(model, rule)`, and call its `step()` after each step of the trainer's."
)
_RETURN_THE_MODEL = "Let `train` return the model that is trained."
_MOVE = (
    "Weights equal their averages without it. Train at a learning rate at which they move, and "
    "leave them in the model."
)
_RESUME_ALIKE = (
    "So it is without averages. Something is not saved or depends on `steps`: the optimizer's "
    "state, the order of the data, random numbers, a schedule."
)


def check_trainer(train: _Train, steps: int = 6) -> str:
    """Run a trainer with and without averages, compare, and say what differs.

    Example:
        >>> import torch
        >>> from averaging_optim.testing import check_trainer
        >>> def train(wrap, steps, checkpoint=None):
        ...     torch.manual_seed(0)
        ...     model = torch.nn.Linear(3, 1)
        ...     optimizer = wrap(torch.optim.Adam(model.parameters(), lr=0.1))
        ...     first = 0
        ...     if checkpoint is not None:
        ...         model.load_state_dict(checkpoint["model"])
        ...         optimizer.load_state_dict(checkpoint["optimizer"])
        ...         first = checkpoint["step"]
        ...     for step in range(first, steps):
        ...         batch = torch.full((3,), float(step))
        ...         optimizer.zero_grad()
        ...         model(batch).square().sum().backward()
        ...         optimizer.step()
        ...     saved = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        ...     return model, {**saved, "step": steps}
        >>> print(check_trainer(train))
        ok            Two runs without averages are alike.
        ok            `step()` is called once for each step.
        ok            Weights train as without averages.
        ok            Weights stay what `step()` makes them.
        ok            Every step is averaged.
        ok            A swap puts the averages into the model.
        ok            Resumed weights train as without averages.
        ok            Resumed averages continue.
        ok            Resuming equals never stopping.

    `train(wrap, steps, checkpoint)` is your function. It builds a small model from a fixed seed,
    hands `wrap(optimizer)` to the trainer as its optimizer, and trains until `steps` steps have
    been taken since the beginning of the run, resuming from `checkpoint` if there is one. It
    returns the model that was trained, and a checkpoint in whatever form the trainer saves and
    resumes. `wrap` returns the optimizer as it is in some runs and an `AveragingOptimizer` in
    others; a trainer with several optimizers calls it for each. Given parameters, or groups of
    them, it makes an SGD with momentum.

    Return None as the checkpoint if your trainer has none, and resuming is not compared. If two
    runs without averages differ, as they do without a seed, only averages are compared.

    Args:
        train: called up to seven times. `checkpoint` is left out for runs that start at the
            beginning.
        steps: at least 2. Half of them are taken before a checkpoint.

    Returns:
        the report, one claim a line, each "ok", or "not compared" with the reason.

    Raises:
        AssertionError: a claim does not hold. The message is the report, which says what differs
            and what to do. Or `train` raises with an `AveragingOptimizer` and not without.
        TypeError: `train` does not return a module and a checkpoint, or calls `wrap` with
            something other than a bare torch optimizer.
        ValueError: `train` does not call `wrap`, or `steps` is less than 2.
    """
    check_integer("steps", steps, at_least=2)
    report = _Report()
    bare = _compare_training(report, train, steps)
    _compare_resuming(report, train, steps, bare)
    if report.differs:
        raise AssertionError(f"Some claims do not hold of this trainer:\n{report}")
    return str(report)


class _Report:
    """Claims, and what differs."""

    def __init__(self) -> None:
        self.differs = False
        self._holding: set[str] = set()
        self._lines: list[str] = []

    def __str__(self) -> str:
        return "\n".join(self._lines)

    def compare(
        self, claim: str, difference: str | None, *, needs: str | None = None, is_fault: bool = True
    ) -> None:
        """Take in what differs, unless the claim needs another one, which does not hold."""
        if needs is not None and needs not in self._holding:
            self._write("not compared", claim, f"This must hold first: {needs}")
        elif difference is None:
            self._holding.add(claim)
            self._write("ok", claim)
        else:
            self.differs |= is_fault
            self._write("differs" if is_fault else "not compared", claim, difference)

    def _write(self, verdict: str, claim: str, words: str = "") -> None:
        indent = " " * 14
        self._lines.append(f"{verdict:<14}{claim}")
        self._lines += textwrap.wrap(
            words, 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )


def _compare_training(report: _Report, train: _Train, steps: int) -> _Run:
    bare, again, averaged = (
        _run(train, wrap, steps) for wrap in (_as_it_is, _as_it_is, _averaging)
    )
    report.compare(_ALIKE, _difference(again, bare, _SEED))
    report.compare(_CALLED_ONCE, _wrong_number(bare, steps))
    report.compare(_SAME_WEIGHTS, _difference(averaged, bare, _LOOK_FOR_CLASSES), needs=_ALIKE)
    report.compare(_KEPT, _change_after_step(averaged))
    report.compare(_AVERAGED, _wrong_average(averaged, _CALL_STEP))
    report.compare(_SWAPPED, _failing_swap(averaged), needs=_AVERAGED)
    return bare


def _compare_resuming(report: _Report, train: _Train, steps: int, whole: _Run) -> None:
    bare, averaged = (_resumed(train, wrap, steps) for wrap in (_as_it_is, _averaging))
    if bare is None or averaged is None:
        report.compare(_RESUMED, "`train` returns no checkpoint.", is_fault=False)
        return
    difference = _difference(averaged, bare, _LOOK_FOR_CLASSES)
    report.compare(_SAME_RESUMED_WEIGHTS, difference, needs=_SAME_WEIGHTS)
    report.compare(_CONTINUED, _wrong_average(averaged, _SAVE), needs=_AVERAGED)
    # Many trainers do not resume exactly, whatever their optimizer.
    inexact = _difference(bare, whole, _RESUME_ALIKE)
    report.compare(_RESUMED, inexact, needs=_ALIKE, is_fault=False)


def _as_it_is(optimizer: Optimizer) -> Optimizer:
    return optimizer


def _averaging(optimizer: Optimizer) -> AveragingOptimizer:
    # In float32, each of the last twenty steps and more shows in the bits of this average.
    return AveragingOptimizer(optimizer, EMA(decay=0.5))


class _Driven:
    """An optimizer that a trainer drives, and its weights after each step."""

    def __init__(self, given: Any, wrap: _Wrap) -> None:
        bare = SGD(given, lr=0.01, momentum=0.9) if isinstance(given, Iterable) else given
        if not isinstance(bare, Optimizer) or isinstance(bare, AveragingOptimizer):
            raise TypeError(f"`wrap` must be given a bare torch.optim.Optimizer, got {bare!r}.")
        self.bare = bare
        self.handed_out: Any = wrap(bare)
        self.weights_at_first = self.weights()
        self.after_step: list[list[Tensor]] = []
        self.changed_after: list[int] = []
        bare.register_step_pre_hook(self._before_step)
        self._hook = bare.register_step_post_hook(self._after_step)

    def weights(self) -> list[Tensor]:
        """Return those that are averaged."""
        groups = (group for group in self.bare.param_groups if group.get("average", True))
        return [weight for group in groups for weight in group["params"]]

    def _before_step(self, *_: Any) -> None:
        if self.after_step:
            last = self.after_step[-1]
            if not _same(_copies(self.weights())[: len(last)], last):
                self.changed_after.append(len(self.after_step))
        # Comes after hooks that were registered since, for they may change the weights.
        self._hook.remove()
        self._hook = self.bare.register_step_post_hook(self._after_step)

    def _after_step(self, optimizer: Optimizer, _: Any, arguments: dict[str, Any]) -> None:
        if not took_no_step(optimizer, arguments):
            self.after_step.append(_copies(self.weights()))


@dataclass
class _Run:
    """What a call of `train` returned, and the optimizers that it drove."""

    model: nn.Module
    checkpoint: Any
    driven: list[_Driven]


def _run(train: _Train, wrap: _Wrap, steps: int, *checkpoint: Any) -> _Run:
    driven: list[_Driven] = []

    def hand_out(given: Any) -> Any:
        new = _Driven(given, wrap)
        # Some trainers make the optimizer again, as after looking for a learning rate.
        driven[:] = [each for each in driven if not _share_weights(each, new)] + [new]
        return new.handed_out

    try:
        returned = train(hand_out, steps, *checkpoint)
    except Exception as error:
        if wrap is _as_it_is:
            raise
        raise AssertionError(
            f"`train` raises with an AveragingOptimizer only: {error!r}"
        ) from error
    if not driven:
        raise ValueError("`train` must call `wrap` with its optimizer, and did not.")
    return _Run(*_checked(returned), driven)


def _resumed(train: _Train, wrap: _Wrap, steps: int) -> _Run | None:
    """Stop halfway and resume. Of both parts, the steps are in what is returned."""
    first = _run(train, wrap, steps // 2)
    if first.checkpoint is None:
        return None
    second = _run(train, wrap, steps, first.checkpoint)
    for before, after in zip(first.driven, second.driven, strict=False):
        after.after_step = before.after_step + after.after_step
    return second


def _checked(returned: object) -> tuple[nn.Module, Any]:
    match returned:
        case (nn.Module() as model, checkpoint):
            return model, checkpoint
    raise TypeError(
        f"`train` must return the model and a checkpoint or None, got {short_repr(returned)}."
    )


def _difference(run: _Run, other: _Run, what_to_do: str) -> str | None:
    difference = next(_differences(run, other), None)
    return difference and f"{difference} {what_to_do}"


def _differences(run: _Run, other: _Run) -> Iterator[str]:
    """Say where the weights of two runs part."""
    if len(run.driven) != len(other.driven):
        yield f"Optimizers: {len(run.driven)} instead of {len(other.driven)}."
    for its, others in zip(run.driven, other.driven, strict=True):
        pairs = zip(its.after_step, others.after_step, strict=False)
        for step, (weights, expected) in enumerate(pairs, 1):
            if not _same(weights, expected):
                yield f"The weights differ after step {step}."
        if len(its.after_step) != len(others.after_step):
            yield f"Steps taken: {len(its.after_step)} instead of {len(others.after_step)}."
    if not _same(_tensors(run.model), _tensors(other.model)):
        yield "The weights differ after training, though not after each step."


def _wrong_number(run: _Run, steps: int) -> str | None:
    taken = [len(each.after_step) for each in run.driven]
    # One of several may be stepped more often, as the discriminator of a GAN.
    if steps in taken and 0 not in taken:
        return None
    numbers = " and ".join(map(str, taken))
    return f"Steps taken: {numbers} instead of {steps}. {_CALL_ONCE}"


def _change_after_step(run: _Run) -> str | None:
    steps = [step for each in run.driven for step in each.changed_after]
    return f"Something changes them after step {steps[0]}. {_CONSTRAIN}" if steps else None


def _wrong_average(run: _Run, what_to_do: str) -> str | None:
    for each in run.driven:
        n_averaged, taken = each.handed_out.n_averaged(), len(each.after_step)
        if n_averaged != taken or taken == 0:
            what_to_do = _LEAVE_TO_STEP if n_averaged > taken else what_to_do
            return f"`n_averaged()` is {n_averaged} after {taken} steps. {what_to_do}"
        # Those that are added during training start at values that no step has left.
        expected = _averages_of(each.after_step)
        if not _same(_averages(each)[: len(expected)], expected):
            return f"The number of updates is right, their values are not. {_LEAVE_TO_LOADING}"
    return None


def _averages(driven: _Driven) -> list[Tensor]:
    with _quietly(), driven.handed_out.swap_to_averaged():
        return _copies(driven.weights())


def _averages_of(steps: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """Return the averages of these weights, made without a trainer."""
    number = min(map(len, steps))
    weights = [nn.Parameter(each.detach().clone()) for each in steps[0][:number]]
    optimizer = _averaging(SGD(weights))
    for values in steps:
        for weight, value in zip(weights, values, strict=False):
            weight.data.copy_(value.detach())
            weight.requires_grad_(value.requires_grad)
        optimizer.update_averages()
    with optimizer.swap_to_averaged():
        return _copies(weights)


def _failing_swap(run: _Run) -> str | None:
    averaged = together(*(each.handed_out for each in run.driven))
    with _quietly():
        try:
            averaged.check_model(run.model)
        except ValueError as error:
            replaced = any(set(each.weights()) - set(each.weights_at_first) for each in run.driven)
            return _AVERAGE_THE_MODEL if replaced else f"{error} {_RETURN_THE_MODEL}"
        before = _copies(_tensors(run.model))
        with averaged.swap_to_averaged():
            is_reached = not _same(_tensors(run.model), before)
    return None if is_reached else _MOVE


def _share_weights(first: _Driven, second: _Driven) -> bool:
    return not set(first.weights()).isdisjoint(second.weights())


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies that require a gradient if their originals do."""
    return [each.detach().clone().requires_grad_(each.requires_grad) for each in tensors]


def _same(first: Sequence[Tensor], second: Sequence[Tensor]) -> bool:
    """Return whether all are equal bit for bit, NaN included, in this process."""
    return len(first) == len(second) and all(
        torch.equal(_bits(a), _bits(b))
        for a, b in zip(local_parts(first), local_parts(second), strict=True)
    )


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


@contextmanager
def _quietly() -> Iterator[None]:
    """Ignore warnings about what the report says."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
