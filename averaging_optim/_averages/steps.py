"""What counts as a step: how each library tells that a call of `step()` took none."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from averaging_optim._averages.moving import is_zero_without_sync
from averaging_optim._averages.sharding import all_ranks_agree, local_parts, sharding_of

Groups = Sequence[Mapping[str, Any]]


def took_no_step(optimizer: Any, arguments: Mapping[str, Any]) -> bool:
    """Return whether the last call of the optimizer's `step` left out the step.

    Args:
        optimizer: the one that was called.
        arguments: that it was given by name.
    """
    return (
        # torch.amp.GradScaler, over an optimizer that looks for infinities itself.
        bool(getattr(optimizer, "found_inf", None))
        or (
            arguments.get("grad_scaler") is not None
            and _found_inf(optimizer, arguments["grad_scaler"])
        )
        # Accelerate's AcceleratedOptimizer: gradients accumulate, or its scaler skipped.
        or not getattr(getattr(optimizer, "gradient_state", None), "sync_gradients", True)
        or getattr(optimizer, "step_was_skipped", False) is True
        # opacus' DPOptimizer: a physical batch that is a part of the logical one.
        or getattr(optimizer, "_is_last_step_skipped", False) is True
        # optimi, releasing gradients: of one parameter, or into the momenta alone.
        or arguments.get("param") is not None
        or (getattr(optimizer, "optimizer_accumulation", False) is True and _releases(optimizer))
    )


def share_scaler_state(grad_scaler: Any, wrapper: object, optimizer: object) -> None:
    """Let the scaler know the wrapped optimizer by what it knows of the wrapper.

    An optimizer that takes `grad_scaler` looks itself up in the scaler, which unscales and
    checks for infinities once for each optimizer.
    """
    states = grad_scaler._per_optimizer_states
    states[id(optimizer)] = states[id(wrapper)]


def is_init_step(groups: Groups) -> bool:
    """Return whether a step is that by which torch.distributed.checkpoint makes the state.

    It takes one at lr 0 with all gradients 0 (torch/distributed/checkpoint/state_dict.py,
    `_init_optim_state`). Nothing can have moved. All ranks come to the same answer.
    """
    return all(is_zero_without_sync(group.get("lr")) for group in groups) and (
        _gradients_are_zero([weight for group in groups for weight in group["params"]])
    )


def _releases(optimizer: Any) -> bool:
    return bool(optimizer.defaults.get("gradient_release"))


def _found_inf(optimizer: object, grad_scaler: Any) -> bool:
    states = grad_scaler._per_optimizer_states[id(optimizer)]
    return any(bool(found) for found in states["found_inf_per_device"].values())


def _gradients_are_zero(weights: Sequence[Tensor]) -> bool:
    by_sharding: dict[Any, list[Tensor]] = defaultdict(list)
    for weight in weights:
        if weight.grad is not None:
            by_sharding[sharding_of(weight.grad)] += local_parts([weight.grad])
    # All verdicts before the answer, as other ranks wait in each.
    verdicts = [
        all_ranks_agree(not any(map(_has_nonzero, gradients)), sharding)
        for sharding, gradients in by_sharding.items()
    ]
    return all(verdicts)


def _has_nonzero(gradient: Tensor) -> bool:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return bool(torch.count_nonzero(values))
