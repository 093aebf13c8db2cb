"""What a user hands over, checked before anything is built from it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer

from averaging_optim._averages.average import store_keys
from averaging_optim._averages.moving import has_memory_of_its_own
from averaging_optim._averages.sources import Buffers, Excluded, module_inside, unwrapped
from averaging_optim._checks import check_bool, check_either
from averaging_optim._rules import Formula, Rule

AnyRule = Rule | Callable[[int], float]


def check_optimizer(optimizer: object) -> None:
    """Raise unless this can be used as a torch optimizer, and has sound `average` flags."""
    # Some are optimizers in all but their class, such as schedulefree's ScheduleFreeWrapper.
    methods = ("step", "zero_grad", "state_dict", "load_state_dict")
    if isinstance(optimizer, type) or not all(
        callable(getattr(optimizer, m, None)) for m in methods
    ):
        raise TypeError(
            f"`optimizer` must be a torch.optim.Optimizer, got {optimizer!r}."
            + _to_construct(optimizer, "model.parameters()")
        )
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(groups, list):
        raise TypeError(
            "`optimizer` must have a list of `param_groups`, got a "
            f"{type(optimizer).__name__} with {groups!r}. Wrap the optimizer inside it instead."
        )
    for group in groups:
        check_group(group)
        for weight in group["params"]:
            _check_memory("optimizer", weight)


def checked_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a model, which must be whole."""
    parameters = list(module_inside("model", model).parameters())
    if not any(is_lazy(each) or each.numel() for each in parameters):
        raise ValueError(
            f"`model` must have parameters that are not empty, got a {type(model).__name__} of "
            f"{len(parameters)} empty ones. DeepSpeed's ZeRO-3 keeps them elsewhere: use ZeRO-2."
        )
    return parameters


def check_group(group: object) -> None:
    """Raise unless this is a dict that says True, False or nothing about averaging."""
    if not isinstance(group, dict):
        raise TypeError(f"`param_group` must be a dict, got {group!r}.")
    check_bool("average", group.get("average", True))


def checked_rules(rule: AnyRule | Mapping[str, AnyRule]) -> dict[str, Rule]:
    """Return name → rule; a rule alone is named after its class, a function by its own name."""
    if isinstance(rule, Rule):
        return {type(rule).__name__.lower(): rule}
    if _is_function(rule):
        return {getattr(rule, "__name__", type(rule).__name__).lower(): Formula(rule)}
    if not isinstance(rule, Mapping):
        raise TypeError(
            "`rule` must be a Rule such as EMA(0.999), a function of the number of updates, or a "
            f"mapping of names to these, got {rule!r}." + _to_construct(rule)
        )
    if not rule:
        raise ValueError(f"`rule` must contain at least one rule, got {rule!r}.")
    rules = {name: _named_rule(name, each) for name, each in rule.items()}
    for name, each in rules.items():
        for key in store_keys(name, each)[1:]:
            if key in rules:
                raise ValueError(
                    f"`rule` must not name an average {key!r}, which is a snapshot of {name!r}. "
                    "Choose another name."
                )
    return rules


def _named_rule(name: object, rule: AnyRule) -> Rule:
    if not isinstance(name, str) or not (isinstance(rule, Rule) or _is_function(rule)):
        raise TypeError(
            f"`rule` must map strings to Rules, got {name!r}: {rule!r}." + _to_construct(rule)
        )
    return rule if isinstance(rule, Rule) else Formula(rule)


def _to_construct(thing: object, arguments: str = "") -> str:
    """Return what to do with a class that was passed in place of an instance."""
    return f" Pass {thing.__name__}({arguments})." if isinstance(thing, type) else ""


def _is_function(rule: object) -> TypeGuard[Callable[[int], float]]:
    # A class can be called too, but was meant to be an instance.
    return callable(rule) and not isinstance(rule, type)


def checked_buffers(
    buffers: nn.Module | Iterable[Tensor], use_buffers: bool, optimizer: Optimizer
) -> Buffers:
    """Return the buffers of a model, or these tensors, each once."""
    check_bool("use_buffers", use_buffers)
    if isinstance(buffers, nn.Module):
        found = Buffers(unwrapped(buffers), use_buffers)
    else:
        rule = "a model or an iterable of tensors"
        found = Buffers(_checked_tensors("buffers", buffers, rule), use_buffers)
    trained = {weight for group in optimizer.param_groups for weight in group["params"]}
    if isinstance(buffers, nn.Module):
        _check_trains(trained, buffers)
    for key, buffer in found.by_key.items():
        which = "one" if found.module is None else repr(key)
        _check_memory("buffers", buffer, which)
        if buffer in trained:
            raise ValueError(f"`buffers` must contain no trained parameter, got {which}.")
    return found


def _check_trains(trained: Collection[Tensor], model: nn.Module) -> None:
    parameters = list(model.parameters())
    if parameters and not any(each in trained for each in parameters):
        raise ValueError(
            f"`buffers` must be the model that the optimizer trains, got a {type(model).__name__} "
            "without any parameter of `param_groups`. If the optimizer trains copies of the "
            "weights, as DeepSpeed's does, use `AveragingOptimizer.of(model, rule)`."
        )


def checked_exclude(
    exclude: Iterable[Tensor] | Callable[[Tensor], bool] | None, optimizer: Optimizer
) -> Callable[[Tensor], bool]:
    """Return whether each parameter is excluded."""
    if callable(exclude) and not isinstance(exclude, type | nn.Module):
        for weight in [weight for group in optimizer.param_groups for weight in group["params"]]:
            if not isinstance(answer := exclude(weight), bool):
                raise TypeError(f"`exclude` must return True or False, got {answer!r}.")
        return exclude
    rule = "a function of a parameter or an iterable of parameters"
    return Excluded(() if exclude is None else _checked_tensors("exclude", exclude, rule))


def _checked_tensors(argument: str, tensors: object, rule: str) -> tuple[Tensor, ...]:
    """Return the tensors of an iterable, each once."""
    if isinstance(tensors, Tensor | nn.Module) or not isinstance(tensors, Iterable):
        raise TypeError(f"`{argument}` must be {rule}, got {tensors!r}.")
    unique = tuple(dict.fromkeys(tensors))
    for each in unique:
        if not isinstance(each, Tensor):
            raise TypeError(f"`{argument}` must contain tensors, got {each!r}.")
    return unique


def _check_memory(argument: str, tensor: Tensor, which: str = "one") -> None:
    """Raise unless each number of the tensor lies in memory of its own."""
    # What has no memory yet gets its own.
    if is_lazy(tensor) or has_memory_of_its_own(tensor):
        return
    kind: object = tensor.layout
    if tensor.is_quantized:
        kind = "quantized"
    elif tensor.layout == torch.strided:
        kind = "expanded" if 0 in tensor.stride() else "overlapping itself"
    raise ValueError(
        f"`{argument}` must contain tensors whose elements don't share memory, got {which} that is "
        f"{kind}, of shape {tuple(tensor.shape)}. Clone it, or leave it out."
    )


def checked_dtype(dtype: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype, a floating-point one, or None."""
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"`dtype` must be a torch.dtype, got {dtype!r}.")
    if dtype is not None and not dtype.is_floating_point:
        raise ValueError(f"`dtype` must be floating-point, got {dtype}.")
    if dtype is not None and dtype.itemsize == 1:
        raise ValueError(
            f"`dtype` must be one that torch can average in, got {dtype}. Use torch.bfloat16, or "
            "None for the weights' dtype, but at least float32."
        )
    return dtype


def rounds_at_random(rounding: str, dtype: torch.dtype | None) -> bool:
    """Return whether averages are rounded stochastically."""
    check_either("rounding", rounding, "nearest", "stochastic")
    if rounding == "stochastic" and dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            "`rounding` must be 'nearest' unless averages have 16 bits, got 'stochastic' with "
            f"`dtype` {dtype}. Pass `dtype=torch.bfloat16` too."
        )
    return rounding == "stochastic"


def checked_device(device: torch.device | str | int | None) -> torch.device | None:
    """Return the device with its index, as tensors name theirs: "cuda" is cuda:0."""
    if device is None:
        return None
    try:
        return torch.empty(0, device=device).device
    except (AssertionError, RuntimeError, TypeError) as error:
        raise ValueError(
            f"`device` must be one that torch can use here, got {device!r}."
        ) from error
