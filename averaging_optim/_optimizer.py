"""The optimizer wrapper: step and average, swap, save and load."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, TypeVar, overload
from weakref import ReferenceType, WeakKeyDictionary, ref

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
from averaging_optim._averages.average import Average
from averaging_optim._averages.averages import Averages
from averaging_optim._averages.moving import detached_copy
from averaging_optim._averages.steps import is_init_step, share_scaler_state, took_no_step
from averaging_optim._averages.store import copy_if_aliased
from averaging_optim._averages.swap import Swap
from averaging_optim._checkpoints.exports import read_exported
from averaging_optim._checkpoints.format import (
    load_or_roll_back,
    read_checkpoint,
    write_checkpoint,
)
from averaging_optim._checks import check_bool, check_integer
from averaging_optim._compiling import uncompiled
from averaging_optim._rules import Rule
from averaging_optim._signatures import shows_signature_of_wrapped
from averaging_optim._warnings import warn_user

_Model = TypeVar("_Model", bound=nn.Module)
_Result = TypeVar("_Result")

# Set by GradScaler, also on an optimizer that has no such attributes yet, and read by fused
# kernels (torch/amp/grad_scaler.py, `step`).
_SET_BY_GRAD_SCALER = frozenset({"grad_scale", "found_inf"})

# Wrapped optimizer → its wrapper.
_wrappers: WeakKeyDictionary[Any, ReferenceType[AveragingOptimizer]] = WeakKeyDictionary()


class AveragingOptimizer(Optimizer):
    """A torch optimizer that keeps averages of the weights it trains.

    average ← average + wₙ · (weights − average)

    after each step at which a rule is due, n being the updates averaged so far and wₙ
    the rule's share. The weights train exactly as without the wrapper, unless a rule
    (`Lookahead`, `SwitchEMA`) writes its average into them; with several rules these are
    averaged first, and the others average what training goes on with. The averages are
    saved, loaded, sharded and moved with the optimizer's state.

    A parameter group with `average=False` is neither averaged nor swapped. Averages are
    made after the first step, beside the weights as they are then.

    Only steps that are taken count: not those that GradScaler skips (with `fused=True`
    finding that out waits for the device), nor calls by which Accelerate, opacus or optimi
    accumulate gradients, nor a step at lr 0 with all gradients 0, by which
    torch.distributed.checkpoint initialises the state. If weights are trained past `step`,
    you are warned once, when you first use an average that lacks them.

    Attributes that aren't listed here are those of the wrapped optimizer, to read and to
    write. `state` is torch's `defaultdict(dict)` with `averaged_<name>` in each entry: an
    entry that you move to another parameter takes its averages along, and removing entries
    resets what the wrapped optimizer keeps, while averages go on.

    An average stands still where share · (weights − average) is below half an ulp of it.
    In float32 it is off by at most 6e-8 / (1 − decay) of the largest weight for EMA, and
    3e-8 · n for SWA after n updates; weights that only drift reach half of that. In
    float64 (`dtype`) these bounds are 5e8 times lower.

    Args:
        optimizer: any torch optimizer, or what has its methods and `param_groups`; it is
            used, not copied. Wrapping it again begins anew, and ends the former wrapper.
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
        RuntimeError: the optimizer is wrapped, and inside a `swap_to_averaged`.

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

    _wrapped: Optimizer
    _averages: Averages

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
        if former := _former_averages(optimizer):
            former.swap.refuse("AveragingOptimizer(...)")
        rules = checked_rules(rule)
        unique_buffers = checked_buffers(buffers, optimizer)
        dtype, device = checked_dtype(dtype), checked_device(device)
        check_bool("skip_nonfinite", skip_nonfinite)
        averages = Averages(rules, optimizer, unique_buffers, dtype, device, skip_nonfinite)
        if former:
            former.swap.is_superseded = True
        # `Optimizer.__init__` would make parameter groups; this makes hooks and nothing else.
        self.__setstate__({"_wrapped": optimizer, "_averages": averages})

    @property
    def wrapped(self) -> Optimizer:
        """The optimizer that is wrapped."""
        return self._wrapped

    @property
    def rules(self) -> Mapping[str, Rule]:
        """Name → rule."""
        return self._averages.rules

    @property
    def buffers(self) -> tuple[Tensor, ...]:
        """The buffers that are averaged along."""
        return self._averages.buffers

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @overload
    def step(self, *args: Any, **kwargs: Any) -> Any: ...

    @shows_signature_of_wrapped
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step of the wrapped optimizer, then average by each rule that is due.

        Args:
            args, kwargs: of the wrapped optimizer's `step`, such as `closure`.

        Returns:
            what the wrapped optimizer returns.

        Raises:
            RuntimeError: inside `swap_to_averaged`.
            ValueError: a rule gives a weight outside [0, 1]; no step has been taken.
        """
        self._averages.swap.refuse("step")
        if self._optimizer_step_pre_hooks:
            args, kwargs = self._with_pre_hooks(args, kwargs)
        try:
            shares = self._before_step(kwargs)
            result = self._wrapped.step(*args, **kwargs)
            self._after_step(shares, kwargs)
        finally:
            self._averages.is_stepping = False
        # The wrapped step has run those that are global, and the profiler's range.
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, args, kwargs)
        return result

    @shows_signature_of_wrapped
    def zero_grad(self, *args: Any, **kwargs: Any) -> None:
        """Reset the gradients, as the wrapped optimizer does.

        Args:
            args, kwargs: of the wrapped optimizer's `zero_grad`, such as `set_to_none`.
        """
        self._wrapped.zero_grad(*args, **kwargs)

    def swap_to_averaged(self, name: str | None = None, *, in_place: bool = False) -> Swap:
        """Evaluate with averaged weights: they are in the model until the block is left.

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

        On leaving, weights and buffers are bit for bit what they were on entering, also after
        an exception and whatever has been written into them inside, as by
        `torch.optim.swa_utils.update_bn`, by `Embedding(max_norm=...)` or by adapters that
        merge in `eval()`. Casting or moving the model inside is fine: the training weights
        come back in the new dtype and place. Averages are only read.

        Values move, tensors stay where they are. The weights are backed up where the averages
        are, which takes their memory once more. Ctrl-C and other signals with a handler in
        Python wait while values move.

        Until a rule's first update, swapping to it has no effect. Swaps to the same average
        may overlap, nested or not, in one thread or several: the weights come back when the
        last of them is left.

        Args:
            name: which average; may be left out if there is only one.
            in_place: exchange weights and averages, through a scratch of a few MiB, instead
                of backing the weights up. Then nothing inside may write into the weights, or
                it is in the average for good; what was handed out of the averages before
                (a state dict, `averaged_model`) holds the weights inside; and leaving a swap
                must not fail. Only for averages of the dtype and device of their weights;
                others are backed up all the same.

        Raises:
            ValueError: there is no average of this name, or several and no name.
            RuntimeError: inside a swap to another average, while `step` runs, inside a
                function that torch.func transforms, or if what is returned is entered or
                left twice.
            torch.OutOfMemoryError: there is no room for the backup; nothing has changed.
        """
        check_bool("in_place", in_place)
        average = self._average(name)
        self._averages.swap.refuse_if_superseded("swap_to_averaged")
        self._tell_if_trained_past(average)
        return self._averages.swap_to(average, in_place=in_place)

    def evaluate_averages(self, evaluate: Callable[[], _Result]) -> dict[str, _Result]:
        """Return what `evaluate` returns of the weights as they are, and under each average.

        An average that has no updates yet, as before its `start`, is the weights.

        Args:
            evaluate: called once for each; under the average as in `swap_to_averaged`. Tensors
                that it returns must be copies: `model.state_dict` would return the weights
                that are there afterwards.

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
        self._averages.swap.refuse("evaluate_averages")
        if "weights" in self.rules:
            raise ValueError("`rules` must name no average 'weights', the key of the weights.")
        results = {"weights": evaluate()}
        for name in self.rules:
            with self.swap_to_averaged(name):
                results[name] = evaluate()
        return results

    @uncompiled
    def update_averages(self, name: str | None = None) -> None:
        """Average the present weights now, whether or not a rule is due.

        A rule that writes back does so here too.

        Args:
            name: which average; all if left out.

        Raises:
            ValueError: there is no average of this name.
            RuntimeError: inside `swap_to_averaged`.
        """
        with self._averages.writing("update_averages"):
            averages = self._averages.values() if name is None else [self._average(name)]
            self._averages.update({average: average.share() for average in averages})
            self._averages.note_update()

    def averaged_model(self, model: _Model, name: str | None = None) -> _Model:
        """Return a copy of the model whose parameters are the averages.

        They are the same memory, without gradients: always up to date, for teachers and
        for evaluating beside training. Averaged buffers are shared too; everything else
        is copied. Parameters have the dtype and device of the averages. Until its first
        update, an average holds the weights at the time it was made.

        Not for use inside `swap_to_averaged(in_place=True)`, where their memory holds the weights.

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
        average = self._average(name)
        self._refuse_foreign(model)
        self._tell_if_trained_past(average)
        self._averages.make()
        memo: dict[int, Any] = {
            id(source): nn.Parameter(kept, requires_grad=False)
            if isinstance(source, nn.Parameter)
            else kept
            for source, kept in average.tensors.tensors.items()
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
                key: detached_copy(value).contiguous()
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
        with self._averages.writing("load_averaged_state_dict"):
            average = self._average(name)
            check_integer("n_averaged", n_averaged, at_least=1)
            weights, buffers = self._averages.weights(), self._averages.buffers
            values = read_exported(model, state_dict, weights, buffers)
            for store in average.stores.values():
                store.load(store.load_targets(values), values)
            average.n_averaged.value = int(n_averaged)

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
        with self._averages.writing("add_param_group"):
            check_group(param_group)
            self._wrapped.add_param_group(param_group)
            self._averages.spread_counters()
            if any(store.tensors for store in self._averages.stores.values()):
                self._averages.make()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, averages and counters, in torch's format.

        `state[i]["averaged_<name>"]` is the average of parameter i, beside the snapshots
        that `LAWA` takes; every parameter group holds `averaging_steps` and an
        `n_averaged_<name>` for each rule. Averaged buffers are in
        `averaged_buffers[<name>]`, in the order they were given. Tensors are referenced,
        not copied, but for averages inside of `swap_to_averaged(in_place=True)`.
        If the wrapped optimizer's state dict has a format of its own, it is saved as it is,
        with averages and counters under "averaging_optim".
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._averages.swap.refuse_if_superseded("state_dict")
        self._averages.make(only_begun=True)
        self._averages.spread_counters()
        groups, stores = self._wrapped.param_groups, self._averages.stores
        state_dict = write_checkpoint(self._wrapped.state_dict(), groups, self.buffers, stores)
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
        with self._averages.writing("load_state_dict"):
            state_dict = copy.copy(state_dict)
            for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = pre_hook(self, state_dict) or state_dict
            stores = self._averages.stores
            keys = {name: list(average.stores) for name, average in self._averages.items()}
            checkpoint = read_checkpoint(state_dict, self._wrapped.param_groups, self.buffers, keys)
            targets = {
                key: stores[key].load_targets(averages)
                for key, averages in checkpoint.averages.items()
            }
            averages = copy_if_aliased(checkpoint.averages, targets, stores.values())
            load_or_roll_back(self._wrapped, checkpoint.wrapped)
            for key, values in averages.items():
                stores[key].load(targets[key], values)
            for counter in self._averages.counters():
                counter.value = checkpoint.counters[counter.key]
            for average in self._averages.values():
                if average.name not in checkpoint.averages:
                    average.start_afresh()
            self._averages.note_state()
            if checkpoint.missing:
                missing = ", ".join(checkpoint.missing)
                warn_user(f"The state dict has no average for {missing}: averaging starts afresh.")
            for post_hook in self._optimizer_load_state_dict_post_hooks.values():
                post_hook(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__} (\nrules: {self.rules}\n{self._wrapped!r}\n)"

    if not TYPE_CHECKING:  # so that mypy knows a mistyped name

        @property
        def state(self) -> Any:
            return self._averages.state

        @state.setter
        def state(self, value: Any) -> None:
            self._averages.state = value

        def __getattr__(self, name: str) -> Any:
            # Copying and unpickling ask for attributes before there are any.
            if name.startswith("__") or "_wrapped" not in self.__dict__:
                raise AttributeError(_no_attribute(self, name), name=name, obj=self)
            try:
                value = getattr(self._wrapped, name)
            except AttributeError as error:
                if hasattr(type(self._wrapped), name):  # a property that raises
                    raise
                raise AttributeError(_no_attribute(self, name), name=name, obj=self) from error
            self._averages.note_use(name, value)
            return value

        def __setattr__(self, name: str, value: Any) -> None:
            if self._is_of_wrapped(name):
                setattr(self._wrapped, name, value)
            else:
                super().__setattr__(name, value)

        def __delattr__(self, name: str) -> None:
            if self._is_of_wrapped(name):
                delattr(self._wrapped, name)
            else:
                super().__delattr__(name)

    def _is_of_wrapped(self, name: str) -> bool:
        """Return whether an attribute is one of the wrapped optimizer alone."""
        # torch sets the last, where hooks are kept, when an optimizer is made or copied.
        if name in self.__dict__ or hasattr(type(self), name) or name.startswith("_optimizer_"):
            return False
        return name in _SET_BY_GRAD_SCALER or hasattr(self._wrapped, name)

    def __getstate__(self) -> dict[str, Any]:
        # A copy would take the weights for averages. Hooks are left out, as torch does.
        self._averages.swap.refuse("copy or pickle")
        return {"_wrapped": self._wrapped, "_averages": self._averages}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if not hasattr(self._wrapped, "defaults"):  # which torch asks for next
            self.__dict__["defaults"] = {}
        super().__setstate__(state)
        self._averages.watch_steps()
        with suppress(TypeError):  # an optimizer that cannot be referred to weakly, or hashed
            _wrappers[self._wrapped] = ref(self)

    def _patch_step_function(self) -> None:
        # torch would run global hooks and the profiler's range here, and in the wrapped step too.
        pass

    def _with_pre_hooks(self, args: Any, kwargs: Any) -> tuple[Any, Any]:
        for pre_hook in self._optimizer_step_pre_hooks.values():
            result = pre_hook(self, args, kwargs)
            if result is None:
                continue
            if not isinstance(result, tuple) or len(result) != 2:
                raise RuntimeError(
                    f"A pre-hook of `step` must return None or (args, kwargs), got {result!r}."
                )
            args, kwargs = result
        return args, kwargs

    @uncompiled
    def _before_step(self, kwargs: Mapping[str, Any]) -> dict[Average, float]:
        """Return the share of each average that the coming step makes due."""
        averages, grad_scaler = self._averages, kwargs.get("grad_scaler")
        with averages.swap.lock:
            averages.swap.refuse("step")
            averages.is_stepping = True
        if averages.steps.value == 0 and not is_init_step(self._wrapped.param_groups):
            averages.begin()
        if grad_scaler is not None:
            share_scaler_state(grad_scaler, self, self._wrapped)
        step = averages.steps.value + 1
        return {each: each.share() for each in averages.each if each.rule.is_due(step)}

    @uncompiled
    def _after_step(self, shares: Mapping[Average, float], kwargs: Mapping[str, Any]) -> None:
        averages = self._averages
        if took_no_step(self._wrapped, kwargs):
            return
        averages.state.list_averages()
        if is_init_step(self._wrapped.param_groups):
            # So that a new optimizer has the entries that distributed loading fills.
            averages.make()
            averages.note_state()
        else:
            averages.steps.value += 1
            averages.update(shares)

    def _tell_if_trained_past(self, average: Average) -> None:
        if told := self._averages.trained_past(average):
            warn_user(told)

    def _average(self, name: str | None) -> Average:
        chosen = next(iter(self.rules)) if name is None and len(self.rules) == 1 else name
        if chosen is None or chosen not in self.rules:
            names = ", ".join(map(repr, self.rules))
            raise ValueError(f"`name` must be one of {names}, got {name!r}.")
        return self._averages[chosen]

    def _refuse_foreign(self, model: nn.Module) -> None:
        averaged = set(self._averages.sources())
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {model!r}.")
        if averaged.isdisjoint([*model.parameters(), *model.buffers()]):
            raise ValueError(
                "`model` must have parameters that this optimizer averages, got a "
                f"{type(model).__name__} with none. Pass the model it was made for."
            )


def _former_averages(optimizer: object) -> Averages | None:
    """Return the averages of the AveragingOptimizer that has wrapped the optimizer before."""
    with suppress(TypeError):  # see `__setstate__`
        if (wrapper := _wrappers.get(optimizer, lambda: None)()) is not None:
            return wrapper._averages
    return None


def _no_attribute(optimizer: AveragingOptimizer, name: str) -> str:
    names = [*dir(type(optimizer)), *dir(optimizer.__dict__.get("_wrapped"))]
    # Classes and what is private are seldom meant.
    similar = get_close_matches(name, [each for each in names if each[0].islower()], n=1)
    hint = f". Did you mean {similar[0]!r}?" if similar else ""
    return f"{type(optimizer).__name__!r} object has no attribute {name!r}{hint}"
