"""Models whose parameters are averages, kept so during training."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn

from averaging_optim._averages.moving import copy_into, share_memory, storages
from averaging_optim._averages.sharding import fsdp_modules, is_uneven, local_parts, sharding_of
from averaging_optim._averages.sources import Buffers, module_inside
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
        self._copies = [_BufferCopies(*each) for each in teacher.named_modules()]
        self._sharded = list(map(ref, fsdp_modules(teacher)))
        owners = dict(teacher.named_modules(remove_duplicate=False))
        self._places = [
            (source, ref(owners[prefix]), key)
            for name, source in model.named_parameters(remove_duplicate=False)
            for prefix, _, key in [name.rpartition(".")]
        ]
        self._bound = [_address(kept_of(source, stores)) for source, _, _ in self._places]
        self._has_parted = False

    @torch.inference_mode(mode=False)
    @torch.no_grad()
    def follow(self) -> None:
        """Let parameters be the averages there are now, and copy buffers.

        No-op, with one warning, once the teacher was cast or moved.
        """
        if self._has_parted:
            return
        for sharded in filter(None, [reference() for reference in self._sharded]):
            sharded.reshard()  # what was gathered is not the average any more
        for i, (source, owner, key) in enumerate(self._places):
            parameter, kept = getattr(owner(), key, None), kept_of(source, self._stores)
            if parameter is None or _address(parameter) == (address := _address(kept)):
                continue
            if address == self._bound[i]:
                self._has_parted = True
                _warn_of_parting()
                return
            _bind(cast("nn.Module", owner()), key, kept)
            self._bound[i] = address
        self._buffers.look_up()
        sources = {name: kept_of(each, self._stores) for name, each in self._buffers.by_key.items()}
        following = [each for each in self._copies if each.follow_now()]
        pairs = [pair for each in following for pair in each.pairs(sources)]
        copy_into([own for own, _ in pairs], [source for _, source in pairs])
        for each in following:
            each.note()


class _BufferCopies:
    """The buffers of one module of a teacher, and whether they are what was copied into them."""

    def __init__(self, prefix: str, module: nn.Module) -> None:
        self._module = ref(module)
        self._names = {
            key: f"{prefix}.{key}" if prefix else key
            for key, buffer in module._buffers.items()
            if buffer is not None
        }
        self._noted: list[tuple[ReferenceType[Tensor], int]] = []
        self.note()

    def follow_now(self) -> bool:
        module = self._module()
        # Not each buffer by itself: BatchNorm writes into its statistics without a trace, and
        # into its count with one.
        return module is not None and not (module.training and self._are_written())

    def pairs(self, sources: Mapping[str, Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Return the buffers, each of the shape of its source, and these."""
        found = [
            (key, own, sources[self._names[key]])
            for key, own in self._present().items()
            if self._names[key] in sources
        ]
        for key, own, source in found:
            if source.shape != own.shape:  # as of caches that grow
                module = cast("nn.Module", self._module())
                setattr(module, key, source.to(own.device, own.dtype, copy=True))
        present = self._present()
        return [(present[key], source) for key, _, source in found]

    def note(self) -> None:
        self._noted = [(ref(each), _version(each)) for each in self._present().values()]

    def _are_written(self) -> bool:
        present = list(self._present().values())
        return len(present) != len(self._noted) or any(
            noted() is not own or version != _version(own)
            for (noted, version), own in zip(self._noted, present, strict=True)
        )

    def _present(self) -> dict[str, Tensor]:
        # By attribute, as modules of TorchScript have no `get_buffer`.
        found = {key: getattr(self._module(), key, None) for key in self._names}
        return {key: each for key, each in found.items() if each is not None}


def averaged_copy(model: nn.Module, stores: Sequence[TensorStore]) -> nn.Module:
    """Return a copy of the model whose parameters are the averages, or else the model's own.

    Raises:
        ValueError: the model can't be copied, or not so.
    """
    memo: dict[int, Any] = {
        id(each): _without_gradient(each, kept_of(each, stores)) for each in model.parameters()
    }
    memo |= {id(each): copy for each, copy in _copies_of_buffers(model, stores).items()}
    try:
        teacher = copy.deepcopy(model, memo)
    except Exception as error:
        raise ValueError(
            "`model` must be one that copy.deepcopy can copy. Pass another instance as `into`. "
            f"({type(error).__name__}: {error})"
        ) from error
    verify(teacher, model, stores, "`model` must be one that copy.deepcopy copies with its memo")
    return teacher


def bind(into: nn.Module, model: nn.Module, stores: Sequence[TensorStore]) -> nn.Module:
    """Return another instance, its parameters now the averages, or else the model's own.

    Raises:
        TypeError: it is no module.
        ValueError: it has not the parameters and buffers of the model, or shares them.
    """
    into = module_inside("into", into)
    for each in fsdp_modules(into):
        each.reshard()
    wanted = dict(model.named_parameters(remove_duplicate=False))
    wanted_buffers = dict(model.named_buffers(remove_duplicate=False))
    _check_parameters(into, wanted)
    _check_names(dict(into.named_buffers(remove_duplicate=False)), wanted_buffers)
    copies = _copies_of_buffers(model, stores)
    owners = dict(into.named_modules(remove_duplicate=False))
    for name, source in wanted_buffers.items():
        prefix, _, key = name.rpartition(".")
        setattr(owners[prefix], key, copies[source])
    for name, source in wanted.items():
        prefix, _, key = name.rpartition(".")
        _bind(owners[prefix], key, kept_of(source, stores))
    verify(into, model, stores, "`into` must be a model whose parameters can be set")
    return into


def verify(teacher: nn.Module, model: nn.Module, stores: Sequence[TensorStore], rule: str) -> None:
    """Raise a ValueError that begins with the rule unless parameters are what they should be."""
    own = dict(teacher.named_parameters(remove_duplicate=False))
    for name, source in model.named_parameters(remove_duplicate=False):
        if name not in own or not share_memory(own[name], kept_of(source, stores)):
            raise ValueError(
                f"{rule}, got a {type(model).__name__} whose parameter {name!r} would not be the "
                "average. Pass another instance of the model as `into`, or use `swap_to_averaged`."
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


def _copies_of_buffers(model: nn.Module, stores: Sequence[TensorStore]) -> dict[Tensor, Tensor]:
    """Return buffer → a copy of what is kept of it, in the dtype and place of the averages."""
    return {each: stores[0].copy_of(kept_of(each, stores)) for each in model.buffers()}


def _bind(owner: nn.Module, key: str, kept: Tensor) -> None:
    """Let a parameter of a module be the tensor that is kept."""
    parameter = getattr(owner, key)
    parameter.grad = None
    parameter.requires_grad_(False)
    if sharding_of(kept) is None:
        parameter.data = kept.detach()
    else:
        # FSDP computes with memory that it remembers, and looks at it again after this.
        assigned = {key: nn.Parameter(kept.detach(), requires_grad=False)}
        owner.load_state_dict(assigned, strict=False, assign=True)


def _check_parameters(into: nn.Module, wanted: Mapping[str, Tensor]) -> None:
    own = dict(into.named_parameters(remove_duplicate=False))
    _check_names(own, wanted)
    source_of: dict[Tensor, Tensor] = {}
    pads = bool(fsdp_modules(into))
    for name, source in wanted.items():
        if own[name] is source or storages([own[name]]) == storages([source]):
            raise ValueError(
                f"`into` must share no tensor with the model, got its {name!r}. Pass another "
                "instance."
            )
        if source_of.setdefault(own[name], source) is not source:
            raise ValueError(
                f"`into` must have an untied {name!r}, as the model has, got one that is tied."
            )
        if sharding_of(own[name]) != sharding_of(source):
            raise ValueError(
                f"`into` must have {name!r} sharded like the model's, {sharding_of(source)}, got "
                f"{sharding_of(own[name])}. Call `fully_shard` on it as on the model."
            )
        if pads and sharding_of(source) and is_uneven(source):
            raise ValueError(
                f"`into` must have parameters that FSDP shards evenly, got {name!r} of shape "
                f"{tuple(source.shape)}, which it pads. Use `swap_to_averaged`."
            )


def _check_names(own: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    for name in {**wanted, **own}:
        shapes = [tuple(each[name].shape) if name in each else None for each in (wanted, own)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"`into` must be another instance of the model, with a {name!r} of shape "
                f"{shapes[0]}, got {shapes[1]}."
            )


def _version(tensor: Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def _address(tensor: Tensor) -> int:
    (here,) = local_parts([tensor])
    return here.data_ptr()


def _warn_of_parting() -> None:
    warn_user(
        "A model from `averaged_model` was cast or moved, and no longer follows its average. Make "
        "a new one, or pass the `dtype` and `device` you want to `AveragingOptimizer`."
    )
