"""Warnings that point at the line that called this package, and who that was."""

from __future__ import annotations

import os
import sys
import warnings
from types import FrameType

_PACKAGE = os.path.dirname(__file__) + os.sep


def warn_user(message: str) -> None:
    """Issue a UserWarning at the frame that called the outermost function of this package."""
    frame: FrameType | None = sys._getframe()
    level = outermost = 1
    while frame is not None:
        # torch and contextlib have frames between ours.
        if frame.f_code.co_filename.startswith(_PACKAGE):
            outermost = level
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=outermost + 1)


def is_called_by(module: str) -> bool:
    """Return whether a function of this module is being run."""
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != module:
        frame = frame.f_back
    return frame is not None
