"""Models whose parameters are averages, and what keeps them that as training goes on."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from averaging_optim._averages.moving import copy_into, detached_copy, share_memory
from averaging_optim._averages.sharding import local_parts
from averaging_optim._averages.sources import Buffers
from averaging_optim._averages.store import TensorStore
from averaging_optim._warnings import warn_user


class Teacher:
    """A model that follows another: its parameters are averages, its buffers copies.

    What is not averaged is the other model's. A module that has written into its buffers in
    train mode keeps these, statistics of its own, for as long as it stays in it.

    Args:
        teacher: a model with the parameters and buffers of the other one, by name.
        stores: in which averages are kept.
    """

    def __init__(self, teacher: nn.Module, model: nn.Module, stores: Sequence[TensorStore]) -> None:
        self._stores = stores
        self._buffers = Buffers(model, use_buffers=False)
        self._copies = [
            _BufferCopy(f"{prefix}.{key}" if prefix else key, module, key)
            for prefix, module in teacher.named_modules()
            for key, buffer in module._buffers.items()
            if buffer is not None
        ]
        own = dict(teacher.named_parameters(remove_duplicate=False))
        self._pairs = [
            (source, own[name]) for name, source in model.named_parameters(remove_duplicate=False)
        ]
        self._bound = [_address(kept_of(source, stores)) for source, _ in self._pairs]

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def follow(self) -> bool:
        """Let parameters be the averages there are now, and copy buffers; False if parted."""
        for i, (source, parameter) in enumerate(self._pairs):
            kept = kept_of(source, self._stores)
            if _address(parameter) != (address := _address(kept)):
                if address == self._bound[i]:
                    return False
                parameter.data = kept.detach()
                self._bound[i] = address
        self._buffers.look_up()
        sources = self._buffers.by_key
        following = [each for each in self._copies if each.follows(sources.get(each.name))]
        values = [kept_of(sources[each.name], self._stores) for each in following]
        copy_into([each.tensor() for each in following], values)
        for each in following:
            each.note()
        return True


class _BufferCopy:
    """A buffer of a teacher, and whether it is what was copied into it."""

    def __init__(self, name: str, module: nn.Module, key: str) -> None:
        self.name = name
        self._module = ref(module)
        self._key = key
        self._noted: tuple[ReferenceType[Tensor], int] | None = None
        self.note()

    def tensor(self) -> Tensor:
        return cast("nn.Module", self._module()).get_buffer(self._key)

    def follows(self, source: Tensor | None) -> bool:
        module = self._module()
        if module is None or source is None:
            return False
        tensor = module._buffers.get(self._key)
        if tensor is None or (module.training and self._note_of(tensor) != self._noted):
            return False
        if tensor.shape != source.shape:
            module._buffers[self._key] = detached_copy(source)
        return True

    def note(self) -> None:
        self._noted = self._note_of(self.tensor())

    def _note_of(self, tensor: Tensor) -> tuple[ReferenceType[Tensor], int]:
        return ref(tensor), 0 if tensor.is_inference() else tensor._version


def averaged_copy(model: nn.Module, stores: Sequence[TensorStore]) -> nn.Module:
    """Return a copy of the model whose parameters are the averages, or else the model's own.

    Raises:
        ValueError: the model can't be copied, or not so.
    """
    memo: dict[int, Any] = {
        id(each): _without_gradient(each, kept_of(each, stores)) for each in model.parameters()
    }
    memo |= {id(each): detached_copy(kept_of(each, stores)) for each in model.buffers()}
    try:
        teacher = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            f"`model` must be one that copy.deepcopy copies, got {type(error).__name__}: {error} "
            "Pass another instance of it as `into`."
        ) from error
    verify(teacher, model, stores, "`model` must be one that copy.deepcopy copies by its memo")
    return teacher


def bind(into: nn.Module, model: nn.Module, stores: Sequence[TensorStore]) -> nn.Module:
    """Return another instance, its parameters now the averages, or else the model's own.

    Raises:
        ValueError: it has not the parameters and buffers of the model, or shares them.
    """
    parameters = dict(into.named_parameters(remove_duplicate=False))
    buffers = dict(into.named_buffers(remove_duplicate=False))
    wanted = dict(model.named_parameters(remove_duplicate=False))
    wanted_buffers = dict(model.named_buffers(remove_duplicate=False))
    _check_instance(parameters, wanted)
    _check_instance(buffers, wanted_buffers)
    for name, source in wanted_buffers.items():
        buffers[name].data = detached_copy(kept_of(source, stores))
    for name, source in wanted.items():
        parameters[name].grad = None
        parameters[name].data = kept_of(source, stores).detach()
        parameters[name].requires_grad_(False)
    verify(into, model, stores, "`into` must be a model whose parameters can be set")
    return into


def verify(teacher: nn.Module, model: nn.Module, stores: Sequence[TensorStore], rule: str) -> None:
    """Raise a ValueError that begins with the rule unless parameters are what they should be."""
    own = dict(teacher.named_parameters(remove_duplicate=False))
    for name, source in model.named_parameters(remove_duplicate=False):
        if name not in own or not share_memory(own[name], kept_of(source, stores)):
            raise ValueError(
                f"{rule}, got a {type(model).__name__} whose parameter {name!r} would not be the "
                "average. Pass another instance of it as `into`, or use `swap_to_averaged`."
            )


def kept_of(source: Tensor, stores: Sequence[TensorStore]) -> Tensor:
    """Return what is kept of a parameter or buffer, itself if nothing is."""
    return next((each.tensors[source] for each in stores if source in each.tensors), source)


def _without_gradient(parameter: nn.Parameter, kept: Tensor) -> Tensor:
    """Return a parameter of the same class and attributes, which is the tensor that is kept."""
    kept = kept.detach()
    if type(kept) is not Tensor:  # a DTensor, say, is a parameter by an attribute
        return nn.Parameter(kept, requires_grad=False)
    result = Tensor._make_subclass(type(parameter), kept, False)
    result.__dict__.update(parameter.__dict__)
    return result


def _check_instance(own: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name, source in wanted.items():
        found = own.get(name)
        if found is None or found.shape != source.shape:
            raise ValueError(
                f"`into` must have a {name!r} of shape {tuple(source.shape)}, as the model has, "
                f"got {None if found is None else tuple(found.shape)}."
            )
        if found is source:
            raise ValueError(f"`into` must share nothing with the model, got its {name!r}.")


def _address(tensor: Tensor) -> int:
    (here,) = local_parts([tensor])
    return here.data_ptr()


def warn_of_parting() -> None:
    warn_user(
        "A model from `averaged_model` was cast or moved, and does not follow its average any "
        "more. Make a new one, or have averages of the dtype and device that you want."
    )
