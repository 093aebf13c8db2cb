"""What the host may know without waiting for a device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from averaging_optim._averages.moving import is_zero_without_sync


@pytest.mark.parametrize(
    ("number", "known"),
    [
        (0, True),
        (0.0, True),
        (torch.tensor(0.0), True),
        (1e-300, False),
        (torch.tensor(0.1), False),
        (None, False),
        (torch.zeros((), device="meta"), False),
    ],
)
def test_a_number_on_a_device_is_not_waited_for(number: float | Tensor | None, known: bool) -> None:
    assert is_zero_without_sync(number) is known
