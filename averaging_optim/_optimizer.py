"""The optimizer wrapper: step and average, swap, save and load."""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, TypeVar, overload

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from averaging_optim._arguments import (
    AnyRule,
    check_group,
    check_optimizer,
    checked_buffers,
    checked_device,
    checked_dtype,
    checked_rules,
)
from averaging_optim._average import Average, Gathered, copied_from_elsewhere
from averaging_optim._checkpoint import (
    AVERAGE,
    COUNT,
    SKIPPED,
    STEPS,
    check_average,
    kept_by,
    load_or_keep,
    read_checkpoint,
    read_exported,
    write_checkpoint,
)
from averaging_optim._interrupts import in_one_piece
from averaging_optim._rules import Rule, check_bool, check_integer, check_real
from averaging_optim._state import StateView
from averaging_optim._tensors import has_infinity, independent, is_known_zero, move_toward

_Model = TypeVar("_Model", bound=nn.Module)
_Result = TypeVar("_Result")
_Function = TypeVar("_Function", bound=Callable[..., Any])

# Counters change with every step, and a compiled graph would hold them as constants.
_uncompiled: Callable[[_Function], _Function] = torch.compiler.disable

# Kept by the wrapped optimizer, whoever sets them. GradScaler hands the last two to the
# optimizer it is given (torch/amp/grad_scaler.py, `step`), fused kernels read their own.
_FORWARDED = frozenset({"defaults", "param_groups", "grad_scale", "found_inf"})


class AveragingOptimizer(Optimizer):
    """A torch optimizer that keeps averages of the weights it trains.

    average ← average + wₙ · (weights − average)

    after each step at which a rule is due, n being the updates averaged so far and wₙ
    the rule's share. The weights train exactly as without the wrapper, unless a rule
    (`Lookahead`, `SwitchEMA`) writes its average into them; with several rules these are
    averaged first, and the others average what training goes on with. The averages are
    saved, loaded, sharded and moved with the optimizer's state.

    A parameter group with `average=False` is neither averaged nor swapped. Averages are
    made after the first step, beside the weights as they are then. While nothing has
    been averaged, a step in which the `lr` of every group is 0 does not count:
    torch.distributed.checkpoint takes one to initialise the state. Nor does a step
    that GradScaler skips; with `fused=True` finding that out waits for the device.

    An average stands still where share · (weights − average) is below half an ulp of it.
    In float32 it is off by at most 6e-8 / (1 − decay) of the largest weight for EMA, and
    3e-8 · n for SWA after n updates; weights that only drift reach half of that. In
    float64 (`dtype`) these bounds are 5e8 times lower.

    Args:
        optimizer: any torch optimizer; it is used, not copied.
        rule: what to average, or a mapping name → rule to keep several averages. A
            rule alone is named after its class in lower case. A function of the number
            of updates so far is a rule too (see `Formula`), named as it is.
        buffers: e.g. `model.buffers()`, statistics such as BatchNorm's that go with
            the weights: floating-point ones are averaged, integer ones copied, and so
            are those with an infinity in them now, such as attention masks. Give them
            when the model is on its device, for `Module.to` replaces buffers.
        dtype: floating-point dtype of the averages. By default that of each tensor,
            but float32 for 16 bits or fewer, in which an average stands still.
            Complex tensors use the complex dtype of that precision.
        device: where averages are kept. By default beside each tensor.
        skip_nonfinite: leave out an update that could bring a NaN or an infinity into an
            average: when a weight or buffer is not finite, or above a quarter of the
            largest number of the average's dtype. No average of the model is updated
            then, and `param_groups[j]["n_skipped"]` counts it. Costs one more reading
            of the weights, and waits for the device, at each update.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has the right type and a wrong value.

    Example:
        >>> import torch
        >>> from averaging_optim import EMA, AveragingOptimizer
        >>> model = torch.nn.Linear(1, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = AveragingOptimizer(sgd, EMA(decay=0.9))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1)).square().sum().backward()
        ...     optimizer.step()
        >>> with optimizer.swap_to_averaged():
        ...     prediction = model(torch.ones(1))
    """

    #: Name → rule.
    rules: Mapping[str, Rule]
    _wrapped: Optimizer
    _buffers: tuple[Tensor, ...]
    _statistics: tuple[Tensor, ...]
    _masks: tuple[Tensor, ...]
    _averages: dict[str, Average]
    _gathered: dict[tuple[str, ...], Gathered]
    _skip_nonfinite: bool

    def __init__(
        self,
        optimizer: Optimizer,
        rule: AnyRule | Mapping[str, AnyRule],
        *,
        buffers: Iterable[Tensor] = (),
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        skip_nonfinite: bool = False,
    ) -> None:
        if isinstance(optimizer, AveragingOptimizer):
            raise TypeError("`optimizer` must not be an AveragingOptimizer. Pass it all rules.")
        check_optimizer(optimizer)
        rules = checked_rules(rule)
        kept = kept_by(rules)
        averaged_buffers = checked_buffers(buffers, optimizer)
        dtype, home = checked_dtype(dtype), checked_device(device)
        check_bool("skip_nonfinite", skip_nonfinite)
        parts = {
            "rules": rules,
            "_wrapped": optimizer,
            "_buffers": averaged_buffers,
            # The difference of two infinities is NaN.
            "_masks": tuple(filter(has_infinity, averaged_buffers)),
            "_statistics": tuple(itertools.filterfalse(has_infinity, averaged_buffers)),
            "_averages": {key: Average(dtype, home) for keys in kept.values() for key in keys},
            "_gathered": {},
            "_skip_nonfinite": skip_nonfinite,
        }
        # `Optimizer.__init__` would make parameter groups; this makes hooks and nothing else.
        self.__setstate__(parts)
        for key in self._counters():
            self._set_count(key, 0)

    @property
    def optimizer(self) -> Optimizer:
        """The optimizer that is wrapped."""
        return self._wrapped

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The buffers that are averaged along."""
        return self._buffers

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step of the wrapped optimizer, then average by each rule that is due.

        Args:
            closure: reevaluates the model and returns the loss.

        Raises:
            RuntimeError: inside `swap_to_averaged`.
            ValueError: a rule gives a weight outside [0, 1]; no step has been taken.
        """
        self._refuse_inside_swap("step")
        shares = self._shares_due()
        loss = self._wrapped.step(closure) if closure else self._wrapped.step()
        self._average_after_step(shares)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients, as the wrapped optimizer does."""
        self._wrapped.zero_grad(set_to_none)

    @contextmanager
    def swap_to_averaged(self, name: str | None = None) -> Iterator[None]:
        """Put an average into the model until the block is left.

        Weights, averages and averaged buffers are exactly as before on leaving, also
        after an exception. Values move, tensors stay where they are. Averages alike in
        dtype and device change places with the weights, through a scratch of a few
        MiB; others are copied in, and need a backup of their weights. Buffers that
        were given as `buffers` may be changed inside, as by
        `torch.optim.swa_utils.update_bn`; the weights must not be, but may be cast or
        moved, and are the training weights there on leaving. Ctrl-C and other signals
        with a handler in Python wait while values move.

        No effect before the first average, and inside a swap to the same average.

        Args:
            name: which average; may be left out if there is only one.

        Raises:
            ValueError: there is no average of this name, or several and no name.
            RuntimeError: inside a swap to another average.

        Example:
            >>> import torch
            >>> from averaging_optim import SWA, AveragingOptimizer
            >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
            >>> optimizer = AveragingOptimizer(torch.optim.SGD([weight], lr=1.0), SWA())
            >>> optimizer.update_averages()
            >>> _ = weight.data.fill_(4.0)
            >>> with optimizer.swap_to_averaged():
            ...     weight.item()
            2.0
            >>> weight.item()
            4.0
        """
        name = self._one_name(name)
        average = self._averages[name]
        if average.is_swapped:
            yield
            return
        self._refuse_inside_swap(f"swap_to_averaged({name!r})")
        average.is_swapped = True
        try:
            with in_one_piece(self._averaged(name)):
                yield
        finally:
            average.is_swapped = False

    def evaluate_averages(self, evaluate: Callable[[], _Result]) -> dict[str, _Result]:
        """Return what `evaluate` returns of the weights as they are, and under each average.

        An average that has no updates yet, as before its `start`, is the weights.

        Args:
            evaluate: called once for each; under the average as in `swap_to_averaged`.

        Returns:
            name of the rule → result, with that of the training weights under "weights",
            the first.

        Raises:
            RuntimeError: inside `swap_to_averaged`.
            ValueError: a rule is named "weights".

        Example:
            >>> import torch
            >>> from averaging_optim import EMA, SWA, AveragingOptimizer
            >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
            >>> sgd = torch.optim.SGD([weight], lr=1.0)
            >>> optimizer = AveragingOptimizer(sgd, {"fast": EMA(0.5), "mean": SWA()})
            >>> optimizer.update_averages()
            >>> _ = weight.data.fill_(4.0)
            >>> optimizer.evaluate_averages(weight.item)
            {'weights': 4.0, 'fast': 2.0, 'mean': 2.0}
        """
        self._refuse_inside_swap("evaluate_averages")
        if "weights" in self.rules:
            raise ValueError("`rules` must name no average 'weights', the key of the weights.")
        results = {"weights": evaluate()}
        for name in self.rules:
            with self.swap_to_averaged(name):
                results[name] = evaluate()
        return results

    @_uncompiled
    def update_averages(self, name: str | None = None) -> None:
        """Average the present weights now, whether or not a rule is due.

        A rule that writes back does so here too.

        Args:
            name: which average; all if left out.

        Raises:
            ValueError: there is no average of this name.
            RuntimeError: inside `swap_to_averaged`.
        """
        self._refuse_inside_swap("update_averages")
        names = self.rules if name is None else [self._one_name(name)]
        shares = {each: self._share(each) for each in names}
        self._make_averages()
        self._update(shares)

    def averaged_model(self, model: _Model, name: str | None = None) -> _Model:
        """Return a copy of the model whose parameters are the averages.

        They are the same memory, without gradients: always up to date, for teachers and
        for evaluating beside training. Averaged buffers are shared too; everything else
        is copied. Parameters have the dtype and device of the averages. Until its first
        update, an average holds the weights at the time it was made.

        Not for use inside `swap_to_averaged`: the averages' memory may hold the weights.

        Args:
            model: a module with parameters that are averaged.
            name: which average; may be left out if there is only one.

        Raises:
            ValueError: there is no such average, or none of this model's parameters.

        Example:
            >>> import torch
            >>> from averaging_optim import EMA, AveragingOptimizer
            >>> model = torch.nn.Linear(1, 1)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> optimizer = AveragingOptimizer(sgd, EMA(decay=0.99))
            >>> teacher = optimizer.averaged_model(model)
            >>> teacher.weight.requires_grad
            False
        """
        name = self._one_name(name)
        self._refuse_foreign(model)
        self._make_averages()
        memo: dict[int, Any] = {
            id(tensor): nn.Parameter(average, requires_grad=False)
            if isinstance(tensor, nn.Parameter)
            else average
            for tensor, average in self._averages[name].tensors.items()
        }
        return copy.deepcopy(model, memo)

    def averaged_state_dict(self, model: nn.Module, name: str | None = None) -> dict[str, Any]:
        """Return `model.state_dict()` under the average, as independent tensors.

        Args:
            model: a module with parameters that are averaged.
            name: which average; may be left out if there is only one.

        Raises:
            ValueError: there is no such average, or none of this model's parameters.
            RuntimeError: inside a swap to another average.

        Example:
            >>> import torch
            >>> from averaging_optim import EMA, AveragingOptimizer
            >>> model = torch.nn.Linear(2, 1)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> optimizer = AveragingOptimizer(sgd, EMA(decay=0.99))
            >>> list(optimizer.averaged_state_dict(model))
            ['weight', 'bias']
        """
        self._refuse_foreign(model)
        with self.swap_to_averaged(name):
            return {
                key: independent(value).contiguous()
                if isinstance(value, Tensor)
                else copy.deepcopy(value)
                for key, value in model.state_dict().items()
            }

    def load_averaged_state_dict(
        self,
        model: nn.Module,
        state_dict: Mapping[str, Any],
        name: str | None = None,
        *,
        n_averaged: int = 1,
    ) -> None:
        """Start an average from exported weights. Inverse of `averaged_state_dict`.

        Entries of tensors that are not averaged are passed over.

        Args:
            model: a module with all parameters and buffers that are averaged.
            state_dict: what `averaged_state_dict` returned; left as it is.
            name: which average; may be left out if there is only one.
            n_averaged: updates the average stands for, at least 1, so that the next
                update does not copy over it.

        Raises:
            ValueError: an argument or an entry does not fit; nothing has changed.
            TypeError: `n_averaged` is not an integer.
            RuntimeError: inside `swap_to_averaged`.

        Example:
            >>> import torch
            >>> from averaging_optim import EMA, AveragingOptimizer
            >>> model = torch.nn.Linear(2, 1)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> optimizer = AveragingOptimizer(sgd, EMA(decay=0.99))
            >>> exported = {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}
            >>> optimizer.load_averaged_state_dict(model, exported, n_averaged=1000)
            >>> optimizer.averaged_state_dict(model)["weight"]
            tensor([[1., 1.]])
        """
        self._refuse_inside_swap("load_averaged_state_dict")
        name = self._one_name(name)
        check_integer("n_averaged", n_averaged, at_least=1)
        values = read_exported(model, state_dict, self._averaged_weights(), self._buffers)
        for average in [self._averages[name], *self._snapshots(name)]:
            average.load(average.homes(values), values)
        self._set_count(COUNT + name, int(n_averaged))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch.optim does.

        Once averages have been made, the new parameters' averages start at their present
        values, as though they had always had them.

        Args:
            param_group: may hold `average=False` to keep the group out of averaging.

        Raises:
            RuntimeError: inside `swap_to_averaged`.
            TypeError: `average` is not a bool, or torch refuses the group.
            ValueError: torch refuses the group.
        """
        self._refuse_inside_swap("add_param_group")
        check_group(param_group)
        self._wrapped.add_param_group(param_group)
        for key in self._counters():
            self._set_count(key, self._count(key))
        if any(average.tensors for average in self._averages.values()):
            self._make_averages()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, averages and counters, in torch's format.

        `state[i]["averaged_<name>"]` is the average of parameter i, beside the snapshots
        that `LAWA` takes; every parameter group holds `averaging_steps` and an
        `n_averaged_<name>` for each rule. Averaged buffers are in
        `averaged_buffers[<name>]`, in the order they were given. Tensors are referenced,
        not copied; averages that change places inside `swap_to_averaged` are copied there.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = write_checkpoint(
            self._wrapped.state_dict(), self._wrapped.param_groups, self._buffers, self._averages
        )
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this or of the plain optimizer. Inverse of `state_dict`.

        Everything is checked before anything changes. Averages keep their dtype, device
        and memory. Warns of averages, or averaged buffers, that the state dict has no
        entry for at all; they start afresh.

        Args:
            state_dict: left as it is.

        Raises:
            ValueError: an entry does not fit; the message names it.
            RuntimeError: inside `swap_to_averaged`.
        """
        self._refuse_inside_swap("load_state_dict")
        state_dict = copy.copy(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            state_dict = pre_hook(self, state_dict) or state_dict
        kept = kept_by(self.rules)
        checkpoint = read_checkpoint(state_dict, self._wrapped.param_groups, self._buffers, kept)
        homes = {
            name: self._averages[name].homes(averages)
            for name, averages in checkpoint.averages.items()
        }
        averages = copied_from_elsewhere(checkpoint.averages, homes, self._averages.values())
        load_or_keep(self._wrapped, checkpoint.wrapped)
        for name, values in averages.items():
            self._averages[name].load(homes[name], values)
        for key, count in checkpoint.counters.items():
            self._set_count(key, count)
        if checkpoint.missing:
            missing = ", ".join(checkpoint.missing)
            warnings.warn(
                f"The state dict has no average for {missing}: averaging starts afresh.",
                stacklevel=2,
            )
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__} (\nrules: {self.rules}\n{self._wrapped!r}\n)"

    def __getattr__(self, name: str) -> Any:
        # Copying and unpickling ask for attributes before there are any.
        if name.startswith("__") or "_wrapped" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return self._state_view() if name == "state" else getattr(self._wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "state":
            entries = {
                key: dict(entry) if isinstance(key, Tensor) else entry
                for key, entry in value.items()
            }
            self.state.clear()
            self.state.update(entries)
        elif name in _FORWARDED:
            setattr(self._wrapped, name, value)
        else:
            super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        if name in _FORWARDED:
            delattr(self._wrapped, name)
        else:
            super().__delattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy would take the weights for averages. Hooks are left out, as torch does.
        self._refuse_inside_swap("copy or pickle")
        return {name: self.__dict__[name] for name in AveragingOptimizer.__annotations__}

    def _counters(self) -> list[str]:
        return [STEPS, SKIPPED, *(COUNT + name for name in self.rules)]

    def _count(self, key: str) -> int:
        count: int = self._wrapped.param_groups[0][key]
        return count

    def _set_count(self, key: str, count: int) -> None:
        for group in self._wrapped.param_groups:
            group[key] = count

    def _add_one(self, key: str) -> None:
        self._set_count(key, self._count(key) + 1)

    def _begin(self) -> None:
        """Average by the rules that begin with the weights before the first step."""
        if self._count(STEPS) > 0 or self._is_rehearsal():
            return
        names = [name for name, rule in self.rules.items() if rule.is_due(0)]
        shares = {name: 1.0 for name in names if self._count(COUNT + name) == 0}
        if shares:
            self._make_averages()
            self._update(shares)

    @_uncompiled
    def _shares_due(self) -> dict[str, float]:
        """Return the share for each rule that is due after the coming step."""
        self._begin()
        step = self._count(STEPS) + 1
        return {name: self._share(name) for name, rule in self.rules.items() if rule.is_due(step)}

    def _share(self, name: str) -> float:
        n_averaged, snapshots = self._count(COUNT + name), self.rules[name].snapshots
        return self._share_after(name, min(n_averaged, snapshots) if snapshots else n_averaged)

    def _share_after(self, name: str, n_averaged: int) -> float:
        if n_averaged == 0:
            return 1.0
        share = self.rules[name].weight(n_averaged)
        check_real(f"rules[{name!r}].weight({n_averaged})", share, "[0, 1]")
        return float(share)

    @_uncompiled
    def _average_after_step(self, shares: Mapping[str, float]) -> None:
        if self._was_skipped():
            return
        # After any step, so that a new optimizer has the entries that distributed loading fills.
        self._make_averages()
        if not self._is_rehearsal():
            self._add_one(STEPS)
            self._update(shares)

    def _was_skipped(self) -> bool:
        found_inf = getattr(self._wrapped, "found_inf", None)
        return found_inf is not None and bool(found_inf)

    def _is_rehearsal(self) -> bool:
        """Return whether the step was one to initialise the state, at lr 0."""
        return all(self._count(COUNT + name) == 0 for name in self.rules) and all(
            is_known_zero(group.get("lr")) for group in self._wrapped.param_groups
        )

    def _update(self, shares: Mapping[str, float]) -> None:
        if not shares:
            return
        tensors = [*self._averaged_weights(), *self._statistics]
        if self._skip_nonfinite and not self._stay_finite(tensors):
            self._add_one(SKIPPED)
            return
        writing = [name for name in shares if self._writes_back(name)]
        for name in writing:  # first, for the others to average what training goes on with
            self._move(tensors, {name: shares[name]})
            self._averages[name].write_back(tensors)
        self._move(tensors, {name: shares[name] for name in shares if name not in writing})
        if self._masks:
            for name in shares:
                self._averages[name].take(self._masks)

    def _writes_back(self, name: str) -> bool:
        return self.rules[name].writes_back(self._count(COUNT + name) + 1)

    def _move(self, tensors: Sequence[Tensor], shares: Mapping[str, float]) -> None:
        if not shares:
            return
        for name in shares:
            self._forget(name, tensors)
        gathered = self._gathered.setdefault(tuple(shares), Gathered())
        kinds = gathered.kinds(tensors, [self._averages[name] for name in shares])
        move_toward(kinds, list(shares.values()))
        for name in shares:
            self._remember(name, tensors)
            self._add_one(COUNT + name)

    def _forget(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Let the average be of the snapshots alone, if it is of as many weights as may be."""
        snapshots = self._snapshots(name)
        if not snapshots or (n_averaged := self._count(COUNT + name)) <= len(snapshots):
            return
        for i in range(len(snapshots)):
            # Snapshot j lies at j % len, so that the oldest is the one to come next.
            snapshot = snapshots[(n_averaged + i) % len(snapshots)]
            self._averages[name].follow(snapshot, tensors, self._share_after(name, i))

    def _remember(self, name: str, tensors: Sequence[Tensor]) -> None:
        """Put the present weights in place of the oldest snapshot."""
        if snapshots := self._snapshots(name):
            snapshots[self._count(COUNT + name) % len(snapshots)].take(tensors)

    def _snapshots(self, name: str) -> list[Average]:
        """Return the snapshots of a rule, snapshot j at j modulo their number."""
        if self.rules[name].snapshots == 0:
            return []
        return [self._averages[key] for key in kept_by(self.rules)[name][1:]]

    def _stay_finite(self, tensors: Sequence[Tensor]) -> bool:
        # All averages are of the same dtypes, so that the first speaks for the others.
        return next(iter(self._averages.values())).stays_finite(tensors)

    def _make_averages(self) -> None:
        tensors = self._averaged_tensors()
        for average in self._averages.values():
            average.make(tensors)

    def _averaged_tensors(self) -> list[Tensor]:
        return [*self._averaged_weights(), *self._buffers]

    def _averaged_weights(self) -> list[Tensor]:
        groups = (group for group in self._wrapped.param_groups if group.get("average", True))
        return [weight for group in groups for weight in group["params"]]

    def _averaged(self, name: str) -> AbstractContextManager[None]:
        if self._count(COUNT + name) == 0:
            return nullcontext()
        return self._averages[name].swapped(self._averaged_weights(), self._buffers)

    def _state_view(self) -> StateView:
        return StateView(
            wrapped=self._wrapped.state,
            averages={AVERAGE + name: each.tensors for name, each in self._averages.items()},
            hidden=frozenset(self._buffers),
            read=self._read_entry,
            write=self._write_entry,
        )

    def _read_entry(self, key: str, weight: Tensor) -> Tensor:
        return self._averages[key.removeprefix(AVERAGE)].read(weight)

    def _write_entry(self, key: str, weight: Tensor, value: Tensor | None) -> None:
        self._refuse_inside_swap(f"state[...][{key!r}] = ...")
        average = self._averages[key.removeprefix(AVERAGE)]
        if value is None:
            average.drop(weight)
        else:
            check_average(f"state[...][{key!r}]", value, weight)
            average.load(average.homes([weight]), {weight: value})

    def _one_name(self, name: str | None) -> str:
        chosen = next(iter(self.rules)) if name is None and len(self.rules) == 1 else name
        if chosen is None or chosen not in self.rules:
            names = ", ".join(map(repr, self.rules))
            raise ValueError(f"`name` must be one of {names}, got {name!r}.")
        return chosen

    def _refuse_foreign(self, model: nn.Module) -> None:
        averaged = set(self._averaged_tensors())
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {model!r}.")
        if averaged.isdisjoint([*model.parameters(), *model.buffers()]):
            raise ValueError(
                "`model` must have parameters that this optimizer averages, got a "
                f"{type(model).__name__} with none. Pass the model it was made for."
            )

    def _refuse_inside_swap(self, call: str) -> None:
        for name, average in self._averages.items():
            if average.is_swapped:
                raise RuntimeError(
                    f"`{call}` is not allowed inside `swap_to_averaged({name!r})`. "
                    "Leave its block first."
                )
