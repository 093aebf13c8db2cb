"""Data that every library is given, small and the same at each import."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits

_digits = load_digits()
IMAGES = (_digits.data[:64] / 16).astype(np.float32)
LABELS = _digits.target[:64].astype(np.int64)
INPUTS, TARGETS = torch.from_numpy(IMAGES), torch.from_numpy(LABELS)
