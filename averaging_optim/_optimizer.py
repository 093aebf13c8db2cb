"""The optimizer wrapper: step and average, swap, save and load."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, overload
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
    checked_exclude,
    checked_parameters,
    checked_rules,
    rounds_at_random,
)
from averaging_optim._averaged import Averaged
from averaging_optim._averages.average import Average
from averaging_optim._averages.averages import Averages
from averaging_optim._averages.steps import is_init_step, share_scaler_state, took_no_step
from averaging_optim._averages.store import copy_if_aliased
from averaging_optim._checkpoints.buffers import AveragedBuffers
from averaging_optim._checkpoints.reading import load_or_roll_back, read_checkpoint
from averaging_optim._checkpoints.writing import write_checkpoint
from averaging_optim._checks import check_bool
from averaging_optim._compiling import uncompiled
from averaging_optim._idle import Idle
from averaging_optim._rules import Rule
from averaging_optim._signatures import shows_signature_of_wrapped
from averaging_optim._warnings import warn_user

# Set by GradScaler, also on an optimizer that has no such attributes yet, and read by fused
# kernels (torch/amp/grad_scaler.py, `step`).
_SET_BY_GRAD_SCALER = frozenset({"grad_scale", "found_inf"})

# Wrapped optimizer → its wrapper.
_wrappers: WeakKeyDictionary[Any, ReferenceType[AveragingOptimizer]] = WeakKeyDictionary()


class AveragingOptimizer(Averaged, Optimizer):
    """Wrap a torch optimizer to keep averages of the weights it trains.

    Example:
        >>> import torch
        >>> from averaging_optim import EMA, AveragingOptimizer
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.25)
        >>> optimizer = AveragingOptimizer(sgd, EMA(decay=0.5))
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(1)).square().sum().backward()
        ...     optimizer.step()
        >>> model.weight.item()
        0.125
        >>> with optimizer.swap_to_averaged():
        ...     model.weight.item()
        0.25

    After each step at which a rule is due,

        average ← average + wₙ · (weights − average)

    where n counts the updates so far and wₙ is the rule's share. The weights train exactly as
    without the wrapper, unless a rule (`Lookahead`, `SwitchEMA`) writes its average into them. With
    several rules, those that write come first, and the others average the result. Averages are
    saved, loaded, sharded and moved with the optimizer's state.

    You can use it wherever you use the wrapped optimizer. Attributes that this page doesn't list
    are the wrapped optimizer's, for reading and writing. `state` is torch's `defaultdict(dict)`
    with `averaged_<name>` in each entry. An entry that you move to another parameter takes its
    averages along. Removing entries resets the wrapped optimizer's state; averages continue.

    These are not averaged: parameter groups with `average=False`, parameters in `exclude`, and
    parameters that require no gradient. When you unfreeze a parameter, its average starts at its
    present values.

    Only steps that are taken count. These do not: a step that GradScaler skips (with `fused=True`,
    finding out waits for the device), a call with which Accelerate, opacus or optimi accumulate
    gradients, and the step at learning rate 0 and zero gradients with which
    torch.distributed.checkpoint initializes the state. If anything other than `step` trains the
    weights, you are warned once, when you first use an average that lacks them.

    Args:
        optimizer: any torch optimizer, or an object with its methods and `param_groups`. It is
            used, not copied. Wrapping it again starts over and disables the first wrapper.
        rule: what to average, or a mapping name → rule to keep several averages. A single rule is
            named after its class in lower case. A function of the number of updates so far is a
            rule too (see `Formula`), with the function's name.
        buffers: the model, to average its buffers (such as BatchNorm's statistics) with the
            weights. They are looked up by name at each update, so replaced ones are followed. Or
            an iterable of tensors, which are not followed.
        use_buffers: average floating-point buffers (True), or copy them at each update (False), as
            `torch.optim.swa_utils.AveragedModel` does by default. Integer buffers, masks that
            contain an infinity when first seen, and spectral norm's u and v are always copied.
        exclude: parameters to leave out, or a function of a parameter that returns True to leave it
            out.
        dtype: floating-point dtype of the averages. By default that of each tensor, or float32 if
            it has 16 bits or fewer, in which averages hardly move. Complex tensors use the complex
            dtype of the same precision.
        device: where averages are kept. By default beside each tensor.
        rounding: "nearest", or "stochastic" for averages of 16 bits (`dtype`): they are rounded
            up or down at random, so that they move, on average, as exact ones do. The first
            update copies the weights, rounded to the nearest. All ranks draw the same random
            numbers, and so does a run that is resumed on as many ranks.
        skip_nonfinite: skip an update if it could put a NaN or an infinity into an average: if a
            weight or buffer is not finite, or above a quarter of the largest number of the
            average's dtype. Then no average is updated, and `param_groups[j]["n_skipped"]` counts
            it. Each update reads the weights once more and waits for the device.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value.
        RuntimeError: the optimizer is already wrapped, and inside a `swap_to_averaged`.
    """

    _wrapped: Optimizer
    _averages: Averages
    _own_defaults: dict[str, Any]

    def __init__(
        self,
        optimizer: Optimizer,
        rule: AnyRule | Mapping[str, AnyRule],
        *,
        buffers: nn.Module | Iterable[Tensor] = (),
        use_buffers: bool = True,
        exclude: Iterable[Tensor] | Callable[[Tensor], bool] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        rounding: str = "nearest",
        skip_nonfinite: bool = False,
    ) -> None:
        if isinstance(optimizer, AveragingOptimizer):
            raise TypeError("`optimizer` must not be an AveragingOptimizer. Pass all rules to one.")
        check_optimizer(optimizer)
        if former := _former_averages(optimizer):
            former.swap.refuse("AveragingOptimizer(...)")
        rules = checked_rules(rule)
        found_buffers = checked_buffers(buffers, use_buffers, optimizer)
        is_excluded = checked_exclude(exclude, optimizer)
        dtype, device = checked_dtype(dtype), checked_device(device)
        at_random = rounds_at_random(rounding, dtype)
        check_bool("skip_nonfinite", skip_nonfinite)
        averages = Averages(
            rules, optimizer, found_buffers, is_excluded, dtype, device, at_random, skip_nonfinite
        )
        if former:
            former.swap.is_superseded = True
        # `Optimizer.__init__` would make parameter groups; this makes hooks and nothing else.
        self.__setstate__({"_wrapped": optimizer, "_averages": averages})

    @classmethod
    def of(
        cls,
        model: nn.Module,
        rule: AnyRule | Mapping[str, AnyRule],
        *,
        use_buffers: bool = True,
        exclude: Iterable[Tensor] | Callable[[Tensor], bool] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        rounding: str = "nearest",
        skip_nonfinite: bool = False,
    ) -> AveragingOptimizer:
        """Average a model that something else trains, such as DeepSpeed.

        Example:
            >>> import torch
            >>> from averaging_optim import EMA, AveragingOptimizer
            >>> model = torch.nn.Linear(1, 1, bias=False)
            >>> averaged = AveragingOptimizer.of(model, EMA(decay=0.5))
            >>> for value in (2.0, 4.0):
            ...     _ = model.weight.data.fill_(value)  # whatever trains the model takes a step
            ...     averaged.step()
            >>> with averaged.swap_to_averaged():
            ...     model.weight.item()
            3.0

        Call `step()` after each training step: it averages the weights and changes nothing else.
        Save and load the result as you would an optimizer.

        You need this if the optimizer trains copies of the weights (master weights) and writes them
        into the model after each step. Wrapped, such an optimizer would average the copies, and a
        swap would not change the model. Rules that write into the weights (`Lookahead`,
        `SwitchEMA`) have no effect there: the next step overwrites what they wrote.

        Args:
            model: its parameters and buffers are averaged. Each rank must hold them in full, so
                DeepSpeed's ZeRO-3 is not supported.
            rule, use_buffers, exclude, dtype, device, rounding, skip_nonfinite: see
                `AveragingOptimizer`.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: an argument has a wrong value.
        """
        return cls(
            Idle(checked_parameters(model)),
            rule,
            buffers=model,
            use_buffers=use_buffers,
            exclude=exclude,
            dtype=dtype,
            device=device,
            rounding=rounding,
            skip_nonfinite=skip_nonfinite,
        )

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
        """The buffers that are averaged or copied along with the weights."""
        return tuple(self._averages.look_up().buffers.by_key.values())

    @property
    def averaged_buffers(self) -> AveragedBuffers:
        """The averages of `buffers`, to save in a distributed checkpoint.

        `torch.distributed.checkpoint` saves optimizer states of parameters only. Save and load this
        object under a key of its own, in the same call as the optimizer's state::

            dcp.save({"optimizer": state, "buffers": optimizer.averaged_buffers}, ...)
        """
        return AveragedBuffers(self._averages)

    @property
    def _each(self) -> Sequence[Averages]:
        return (self._averages,)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @overload
    def step(self, *args: Any, **kwargs: Any) -> Any: ...

    @shows_signature_of_wrapped
    def step(self, *args: Any, **kwargs: Any) -> Any:
        """Take a step of the wrapped optimizer, then update the averages that are due.

        Args:
            args, kwargs: for the wrapped optimizer's `step`, such as `closure`.

        Returns:
            what the wrapped optimizer returns.

        Raises:
            RuntimeError: inside `swap_to_averaged`.
            ValueError: a rule returned a share outside [0, 1]. No step was taken.
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
            args, kwargs: for the wrapped optimizer's `zero_grad`, such as `set_to_none`.
        """
        self._wrapped.zero_grad(*args, **kwargs)

    @uncompiled
    def update_averages(self, name: str | None = None) -> None:
        """Update averages with the present weights now, whether or not a rule is due.

        Example:
            >>> import torch
            >>> from averaging_optim import SWA, AveragingOptimizer
            >>> weight = torch.nn.Parameter(torch.tensor(1.0))
            >>> optimizer = AveragingOptimizer(torch.optim.SGD([weight]), SWA(every=None))
            >>> for epoch in range(3):
            ...     _ = weight.data.fill_(epoch)  # an epoch of training
            ...     optimizer.update_averages()
            >>> with optimizer.swap_to_averaged():
            ...     weight.item()
            1.0

        Rules that write into the weights do so here too. `SwitchEMA(every=None)` only writes.

        Args:
            name: which average. All if you leave it out.

        Raises:
            ValueError: there is no average of this name.
            RuntimeError: inside `swap_to_averaged`.
        """
        with self._averages.writing("update_averages"):
            averages = self._averages.values() if name is None else [self._averages.named(name)]
            self._averages.update_when_asked(averages)
            self._averages.note_update()

    def n_averaged(self, name: str | None = None) -> int:
        """Return how many updates an average has had.

        Example:
            >>> import torch
            >>> from averaging_optim import SWA, AveragingOptimizer
            >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
            >>> optimizer = AveragingOptimizer(sgd, SWA())
            >>> optimizer.update_averages()
            >>> optimizer.n_averaged()
            1

        Args:
            name: which average. You may leave it out if there is only one.

        Raises:
            ValueError: there is no average of this name, or several and no name.
        """
        return self._averages.named(name).n_averaged.value

    def restart(self, name: str | None = None) -> None:
        """Start an average over: the next update copies the weights, as the first one did.

        Example:
            >>> import torch
            >>> from averaging_optim import SWA, AveragingOptimizer
            >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
            >>> optimizer = AveragingOptimizer(sgd, SWA())
            >>> optimizer.update_averages()
            >>> optimizer.restart()
            >>> optimizer.n_averaged()
            0

        Until that update, swapping to it has no effect. `start` and `every` still count steps from
        the beginning of the run.

        Args:
            name: which average. All if you leave it out.

        Raises:
            ValueError: there is no average of this name.
            RuntimeError: inside `swap_to_averaged`.
        """
        with self._averages.writing("restart"):
            averages = self._averages.values() if name is None else [self._averages.named(name)]
            for average in averages:
                self._averages.restart(average)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a parameter group, as torch.optim does.

        If averages exist already, those of the new parameters start at the present values.

        Args:
            param_group: may contain `average=False` to leave the group out.

        Raises:
            RuntimeError: inside `swap_to_averaged`.
            TypeError: `average` is not a bool, or torch refuses the group.
            ValueError: torch refuses the group.
        """
        with self._averages.writing("add_param_group"):
            check_group(param_group)
            self._wrapped.add_param_group(param_group)
            self._averages.given.add(self._wrapped.param_groups[-1]["params"])
            self._averages.spread_counters()
            if any(store.tensors for store in self._averages.stores.values()):
                self._averages.make()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, averages and counts, in torch's format.

        - `state[i]["averaged_<name>"]` is the average of parameter i, next to the snapshots of
          `LAWA`. If the wrapped optimizer has state, but none of parameter i (it has had no
          gradient yet), the average is in `averaged_parameters[i]`.
        - Each parameter group contains `averaging_steps` and an `n_averaged_<name>` for each rule.
        - `averaged_buffers[<name>]` maps names in the model to averages of buffers, or lists them
          in the order in which you gave them.

        Tensors are referenced, not copied, except for averages inside
        `swap_to_averaged(in_place=True)`. If the wrapped optimizer's state dict has a format of its
        own, it is kept, with averages and counts under "averaging_optim".
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        self._averages.swap.refuse_if_superseded("state_dict")
        self._averages.make(only_begun=True)
        self._averages.tell_if_left_out()
        self._averages.spread_counters()
        state_dict = write_checkpoint(
            self._wrapped.state_dict(),
            self._averages.sources,
            self._averages.stores,
            is_stateless=not self._averages.state.kept,
        )
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            state_dict = post_hook(self, state_dict) or state_dict
        return state_dict

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of this or of the plain optimizer. Inverse of `state_dict`.

        Everything is checked first: if something doesn't match, nothing is modified. Averages keep
        their dtype, device and memory. An average that the state dict has no entry for starts at
        the present weights, and you are warned.

        Args:
            state_dict: is not modified.

        Raises:
            ValueError: an entry doesn't match. The message names it.
            RuntimeError: inside `swap_to_averaged`.
        """
        with self._averages.writing("load_state_dict"):
            state_dict = copy.copy(state_dict)
            for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
                state_dict = pre_hook(self, state_dict) or state_dict
            stores = self._averages.stores
            keys = {name: list(average.stores) for name, average in self._averages.items()}
            checkpoint = read_checkpoint(
                state_dict, self._averages.look_up(), keys, self._averages.kept_buffers
            )
            targets = {
                key: stores[key].load_targets(averages)
                for key, averages in checkpoint.averages.items()
            }
            averages = copy_if_aliased(checkpoint.averages, targets, stores.values())
            load_or_roll_back(self._wrapped, checkpoint.wrapped)
            for key, values in averages.items():
                stores[key].load(targets[key], values)
            self._averages.let_go(checkpoint.without)
            # An optimizer with a format of its own loads those that it has saved.
            self._averages.drop_counts_of_others()
            for counter in self._averages.counters():
                counter.value = checkpoint.counters[counter.key]
            for average in self._averages.values():
                if average.name not in checkpoint.averages:
                    average.start_afresh()
                average.teach()
            self._averages.note_state()
            if checkpoint.missing:
                missing = ", ".join(checkpoint.missing)
                warn_user(
                    f"The state dict has no average for {missing}: averaging starts at the present "
                    "weights."
                )
            for post_hook in self._optimizer_load_state_dict_post_hooks.values():
                post_hook(self)

    def __repr__(self) -> str:
        return f"{type(self).__name__} (\nrules: {self.rules}\n{self._wrapped!r}\n)"

    if not TYPE_CHECKING:  # so that mypy knows a mistyped name
        # Properties, as Python 3.12 and later look for the members of a runtime-checkable protocol,
        # such as Lightning's for optimizers, without calling `__getattr__`.
        @property
        def param_groups(self) -> Any:
            return self._wrapped.param_groups

        @param_groups.setter
        def param_groups(self, value: Any) -> None:
            self._wrapped.param_groups = value

        @property
        def defaults(self) -> Any:
            return getattr(self._wrapped, "defaults", self._own_defaults)

        @defaults.setter
        def defaults(self, value: Any) -> None:
            self._wrapped.defaults = value

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
        # Of an optimizer that has none, which torch asks for next.
        self.__dict__.update(state, _own_defaults={})
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
        averages.note_training()
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
