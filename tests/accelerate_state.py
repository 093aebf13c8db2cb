"""What Accelerate remembers of a process."""

from __future__ import annotations

from accelerate.state import AcceleratorState, GradientState


def forget_accelerators() -> None:
    """An Accelerator of other arguments is refused while one is remembered."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
