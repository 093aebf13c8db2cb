"""What is known of DTensor and FSDP: tensors that are spread over processes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from torch.distributed.fsdp import FSDPModule


def sharding_of(tensor: Tensor) -> Any:
    """Return how a DTensor is spread over its devices, None for a tensor of one device."""
    if hasattr(tensor, "device_mesh") and hasattr(tensor, "placements"):
        return tensor.device_mesh, tensor.placements
    return None


def is_uneven(tensor: Tensor) -> bool:
    """Return whether ranks have parts of different sizes of this DTensor."""
    mesh, placements = sharding_of(tensor)
    return any(
        hasattr(each, "dim") and tensor.shape[each.dim] % mesh.size(i) != 0
        for i, each in enumerate(placements)
    )


def fsdp_modules(model: nn.Module) -> list[FSDPModule]:
    """Return those that `torch.distributed.fsdp.fully_shard` was called for."""
    return [each for each in model.modules() if _is_fsdp(each)]


def _is_fsdp(module: nn.Module) -> TypeGuard[FSDPModule]:
    # By name, as importing it takes half a second.
    return any(each.__name__ == "FSDPModule" for each in type(module).__mro__)


def local_parts(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Return this rank's part of each DTensor, in the same memory; other tensors as they are."""
    # By name, as importing DTensor takes half a second and not every torch is built with it.
    return [each.to_local() if hasattr(each, "to_local") else each for each in tensors]


def all_ranks_agree(verdict: bool, sharding: Any) -> bool:
    """Return whether the ranks that share tensors of this sharding all come to this verdict."""
    if sharding is None:
        return verdict
    # Imported here, as it takes half a second. A verdict and not the largest number is reduced,
    # for a maximum over ranks may pass over NaN.
    from torch.distributed.tensor import DTensor, Partial

    mesh, _ = sharding
    votes = DTensor.from_local(torch.tensor(verdict).int(), mesh, [Partial("min")] * mesh.ndim)
    return bool(votes.full_tensor())


def forget_gathered(weights: Iterable[Tensor]) -> None:
    """Let FSDP gather these weights again, and autograd know that they have changed.

    Graphs that were made before then raise in backward, as those of any weight do.
    """
    # Imported here, as few programs need it and it takes half a second.
    from torch.distributed._composable_state import _module_state_mapping
    from torch.distributed.fsdp import FSDPModule

    # A DTensor counts its changes apart from its local part, and FSDP gathers without a count.
    changed = set(weights)
    # A sharded weight does not know its module; this is torch's own list of those there are.
    for module in [each for each in _module_state_mapping if isinstance(each, FSDPModule)]:
        module.reshard()  # after a forward alone, the root keeps its weights gathered
        changed.update(_gathered(module, changed))
    for each in changed:
        torch.autograd.graph.increment_version(each)


def _gathered(module: Any, weights: set[Tensor]) -> list[Tensor]:
    """Return those tensors of a module that these weights are gathered into."""
    state = module._get_fsdp_state()
    # Older versions of torch have one group for a module, or None.
    groups = getattr(state, "_fsdp_param_groups", None) or [
        getattr(state, "_fsdp_param_group", None)
    ]
    return [
        each._unsharded_param
        for group in groups
        for each in (group.fsdp_params if group else ())
        if each.sharded_param in weights and hasattr(each, "_unsharded_param")
    ]
