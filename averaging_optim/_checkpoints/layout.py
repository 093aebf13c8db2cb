"""Where a state dict holds what concerns averages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

BUFFERS = "averaged_buffers"

# Where averages are of parameters of which the wrapped optimizer keeps nothing, since it would miss
# its own in an entry that holds averages alone. Frozen parameters that are their own averages have
# an empty entry here, by which it is known that none was lost.
PARAMETERS = "averaged_parameters"

# Where averages are if the wrapped optimizer's state dict is not in torch's format.
BESIDE = "averaging_optim"


def parameters_by_index(
    saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> dict[Any, Tensor]:
    """Return index in the state dict → parameter, for the groups that are averaged."""
    return {
        index: parameter
        for saved, group in zip(saved_groups, groups, strict=True)
        if saved.get("average", True)
        for index, parameter in zip(saved["params"], group["params"], strict=True)
    }
