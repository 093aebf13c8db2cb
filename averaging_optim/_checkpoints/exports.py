"""State dicts of a model under an average, read back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from averaging_optim._averages.entries import check_average, without_attributes
from averaging_optim._checks import checked_mapping, short_repr


def read_exported(
    model: nn.Module,
    state_dict: Mapping[str, Any],
    weights: Sequence[Tensor],
    buffers: Sequence[Tensor],
) -> dict[Tensor, Tensor]:
    """Return weight or buffer → its value in a state dict of the model.

    Raises:
        ValueError: an entry does not fit, or the model has not all of the weights.
    """
    present = model.state_dict(keep_vars=True)
    for key in checked_mapping("state_dict", state_dict):
        if key not in present:
            raise ValueError(f"`state_dict[{short_repr(key)}]` must be an entry of the model's.")
    # A tied parameter has several keys; those that were exported come last and stay.
    keys = {
        tensor: key
        for key, tensor in sorted(present.items(), key=lambda item: item[0] in state_dict)
        if isinstance(tensor, Tensor)
    }
    for weight in weights:
        if weight not in keys:
            raise ValueError(
                "`model` must have all parameters that are averaged, lacks one of shape "
                f"{tuple(weight.shape)}."
            )
    # Buffers that the model does not persist are in no export of it.
    wanted = [*weights, *(buffer for buffer in buffers if buffer in keys)]
    exported = {tensor: without_attributes(state_dict.get(keys[tensor])) for tensor in wanted}
    for tensor, value in exported.items():
        check_average(f"state_dict[{keys[tensor]!r}]", value, tensor)
    return exported
