"""What is averaged: parameters that are trained, and the buffers that go with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.optim import Optimizer

from averaging_optim._averages.moving import Present, has_infinity, numeric_kind
from averaging_optim._averages.store import TensorStore, are_identical
from averaging_optim._warnings import warn_user


class Buffers:
    """The buffers that go with the weights: tensors that were given, or what a model has now.

    by_key: name in the model, or place among the tensors that were given → buffer.
    saved: the same without those that the model does not save, such as caches.
    averaged: those that are averaged.
    copied: those of which an average has the values that they had at its last update.

    Args:
        given: a model, whose buffers are looked up each time, or tensors.
        use_buffers: whether floating-point buffers are averaged.
    """

    def __init__(self, given: nn.Module | Iterable[Tensor], use_buffers: bool) -> None:
        self.module = given if isinstance(given, nn.Module) else None
        self._use_buffers = use_buffers
        self._modules: list[nn.Module] = []
        self._parts: list[Any] | None = None
        self._names: list[tuple[str, Tensor]] = []
        self._is_averaged: dict[tuple[Any, str], bool] = {}
        self._list({} if isinstance(given, nn.Module) else dict(enumerate(given)))
        self.look_up()

    def __contains__(self, tensor: object) -> bool:
        return tensor in self._tensors

    def look_up(self) -> dict[Tensor, list[Tensor]] | None:
        """Look again at what the model has; return None if that is what it was.

        Otherwise return former buffer → those under its names now, of each that has lost one.
        """
        if self.module is None or (self._parts is not None and self._are_unchanged()):
            return None
        before = self._names
        self._names = [each for each in _named_buffers(self.module) if not is_lazy(each[1])]
        first_names = {buffer: name for name, buffer in reversed(self._names)}
        found = {name: each for name, each in self._names if first_names[each] == name}
        self._list(found, normalised_vectors(self.module), _not_persistent(self.module))
        self._modules = list(self.module.modules())
        # A buffer that is lazy turns into another without being replaced.
        self._parts = None if any(map(is_lazy, self.module.buffers())) else self._present_parts()
        return self._moved(before)

    def _list(
        self,
        found: Mapping[Any, Tensor],
        vectors: Collection[str] = (),
        not_saved: Collection[str] = (),
    ) -> None:
        self.by_key = dict(found)
        self.saved = {key: buffer for key, buffer in found.items() if key not in not_saved}
        self._tensors = frozenset(found.values())
        kinds = [(key, numeric_kind(buffer)) for key, buffer in found.items()]
        self._is_averaged = {
            (key, kind): self._is_averaged[key, kind]
            if (key, kind) in self._is_averaged
            else key not in vectors and self._can_be_averaged(found[key])
            for key, kind in kinds
        }
        self.averaged = [found[key] for key, kind in kinds if self._is_averaged[key, kind]]
        self.copied = [found[key] for key, kind in kinds if not self._is_averaged[key, kind]]

    def _moved(self, before: Iterable[tuple[str, Tensor]]) -> dict[Tensor, list[Tensor]]:
        names, now = defaultdict(list), dict(self._names)
        for name, buffer in before:
            names[buffer].append(name)
        moved = {}
        for buffer in names:
            there = [now[name] for name in names[buffer] if name in now]
            # One that has other names alone keeps its average.
            is_renamed = not there and buffer in self
            if not is_renamed and not are_identical(there, [buffer] * len(names[buffer])):
                moved[buffer] = list(dict.fromkeys(there))
        return moved

    def _can_be_averaged(self, buffer: Tensor) -> bool:
        # The difference of two infinities is NaN.
        is_integer = numeric_kind(buffer) == "integer"
        return self._use_buffers and not is_integer and not has_infinity(buffer)

    def _are_unchanged(self) -> bool:
        return are_identical(self._present_parts(), self._parts or [])

    def _present_parts(self) -> list[Any]:
        # Faster than to name all buffers, for it is done at every step.
        return [
            part
            for module in self._modules
            for parts in (module._modules, module._buffers)
            for part in parts.values()
        ]


class Sources:
    """The parameters and buffers of which there are averages, as they are now.

    A parameter that is frozen is its own average, and has none here, unless it was averaged
    before it was frozen.

    listed: parameters of the groups that are averaged, frozen ones among them.
    weights: parameters that are averaged, each once.
    moving: weights and averaged buffers.
    all: the same and copied buffers.
    changes: how often these have become others.

    Args:
        is_excluded: parameter → whether it is left out wherever it is.
        stores: in which averages are kept.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        buffers: Buffers,
        is_excluded: Callable[[Tensor], bool],
        stores: Iterable[TensorStore],
    ) -> None:
        self.buffers = buffers
        self.is_excluded = is_excluded
        self.weights: list[Tensor] = []
        self.changes = 0
        self._optimizer = optimizer
        self._stores = tuple(stores)
        self.listed: list[Tensor] = []
        self._of: tuple[Any, ...] = ()
        self._list([])

    @property
    def groups(self) -> Sequence[dict[str, Any]]:
        return self._optimizer.param_groups

    def look_up(self) -> None:
        """Look again at what is to be averaged: the same lists while it is the same."""
        moved = self.buffers.look_up() if self.buffers.module else None
        if moved:
            for store in self._stores:
                store.rekey(moved)
        listed = [
            weight
            for group in self._optimizer.param_groups
            if group.get("average", True)
            for weight in group["params"]
        ]
        trained = [each.requires_grad or is_trained(each) for each in listed]
        of = trained, sum([store.changes for store in self._stores])
        if moved is None and of == self._of and are_identical(listed, self.listed):
            return
        self.listed, self._of = listed, of
        weights = [each for each in dict.fromkeys(listed) if self._is_averaged(each)]
        if moved is not None or not are_identical(weights, self.weights):
            self._list(weights)

    def places(self) -> Present:
        """Return what is where tensors are, by the names that they have in the model now.

        Casting or moving a model may replace its tensors (`Module.to`, always of buffers and of
        parameters with torch.__future__.set_overwrite_module_params_on_conversion).
        """
        module = self.buffers.module
        names = defaultdict(list)
        for name, tensor in _named_tensors(module) if module else ():
            names[tensor].append(name)

        def present(tensors: Sequence[Tensor]) -> list[list[Tensor]]:
            now = dict(_named_tensors(module)) if module else {}
            return [[now[name] for name in names[each] if name in now] for each in tensors]

        return present

    def tell_of_left_buffers(self, model: nn.Module) -> None:
        """Warn if tensors that were given as buffers are not the model's any more."""
        given, present = self.buffers.by_key.values(), dict(model.named_buffers())
        if self.buffers.module is not None:
            return
        others = [each for each in present.values() if each not in self.buffers]
        left = {each.shape for each in given if not any(each is own for own in present.values())}
        if any(other.is_floating_point() and other.shape in left for other in others):
            warn_user(
                "The model has replaced tensors that you passed as `buffers`: the new ones are not "
                "averaged. Pass `buffers=model`, which follows them."
            )

    def leaves_out(self, parameter: Tensor) -> bool:
        """Return whether a parameter was said not to be averaged."""
        return self.is_excluded(parameter) or any(
            parameter is each
            for group in self.groups
            if not group.get("average", True)
            for each in group["params"]
        )

    def present(self) -> set[Tensor]:
        """Return all that averages may be kept of, now or later."""
        return {
            *self.buffers.by_key.values(),
            *(p for group in self.groups for p in group["params"]),
        }

    def _is_averaged(self, weight: Tensor) -> bool:
        has_average = is_trained(weight) or any(weight in each.tensors for each in self._stores)
        return has_average and not self.is_excluded(weight)

    def _list(self, weights: list[Tensor]) -> None:
        self.weights = weights
        self.moving = [*weights, *self.buffers.averaged]
        self.all = [*self.moving, *self.buffers.copied]
        self.changes += 1


def is_trained(parameter: Tensor) -> bool:
    """Return whether a parameter is neither frozen nor, being lazy, without values yet."""
    # With `differentiable=True` optimizers are given gradients of tensors that require none.
    is_given = parameter.requires_grad or parameter.grad is not None
    return is_given and not is_lazy(parameter)


class Excluded:
    """Whether a parameter is one of these."""

    def __init__(self, parameters: Iterable[Tensor] = ()) -> None:
        self._parameters = frozenset(parameters)

    def __call__(self, parameter: Tensor) -> bool:
        return parameter in self._parameters


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from _named_buffers(module)


def _named_buffers(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    # All names of one that is shared: `Module.to` makes it several.
    yield from module.named_buffers(remove_duplicate=False)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside of DistributedDataParallel, DataParallel and torch.compile."""
    while attribute := wrapped_as(model):
        model = getattr(model, attribute)
    return model


def module_inside(argument: str, model: object) -> nn.Module:
    """Return the module inside of an argument, or raise unless that is one."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"`{argument}` must be a torch.nn.Module, got {model!r}.")
    return unwrapped(model)


def wrapped_as(model: nn.Module) -> str:
    """Return the attribute by which a wrapper has its model, "" of what is no wrapper."""
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return "module"
    # Of torch._dynamo.OptimizedModule, which takes a second to import.
    return "_orig_mod" if isinstance(getattr(model, "_orig_mod", None), nn.Module) else ""


def normalised_vectors(module: nn.Module) -> frozenset[str]:
    """Return the names of spectral norms' u and v, whose averages would not be of length 1."""
    names = set()
    for prefix, each in module.named_modules():
        dot = prefix and f"{prefix}."
        if isinstance(each, _SpectralNorm):
            names |= {f"{dot}_u", f"{dot}_v"}
        for hook in each._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                names |= {f"{dot}{hook.name}_u", f"{dot}{hook.name}_v"}
    return frozenset(names)


def _not_persistent(module: nn.Module) -> frozenset[str]:
    """Return the names of buffers that are in no state dict of the module."""
    return frozenset(
        f"{prefix}.{name}" if prefix else name
        for prefix, each in module.named_modules()
        for name in each._non_persistent_buffers_set
    )
