"""Averages of checkpoints that you already have."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from averaging_optim._averages.moving import has_infinity, numeric_kind
from averaging_optim._checkpoints.weights import AnyWeights, SavedWeights, open_weights
from averaging_optim._checks import check_checkpoints, check_integer, check_real, short_repr

# Decays of the learning rate over a time from 0 to 1.
_DECAYS: dict[str, Callable[[float], float]] = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "sqrt": lambda t: 1 - math.sqrt(t),
}


def merge(
    checkpoints: Sequence[AnyWeights],
    shares: Sequence[float] | None = None,
    *,
    key: str | None = None,
) -> dict[str, Any]:
    """Return the average of a model's weights in several checkpoints.

    Example:
        >>> import torch
        >>> from averaging_optim.post_hoc import merge
        >>> merge([{"weight": torch.tensor([0.0])}, {"weight": torch.tensor([1.0])}])
        {'weight': tensor([0.5000])}

    Checkpoints are read one after the other, tensor by tensor. This takes 8 bytes for each weight
    (16 for complex ones), however many checkpoints there are, plus file pages that the system maps.

    Args:
        checkpoints: of one model, earlier ones first: state dicts, files of `torch.save` or
            safetensors, folders of torch.distributed.checkpoint (of any number of processes) or of
            `save_pretrained`. Files are read with `weights_only=True`.
        shares: the share of each checkpoint, which sum to 1. Equal by default. See
            `decay_shares`.
        key: where the weights are in each checkpoint, such as "model" or "state.model". By
            default they are found: at the top, or under "model", "state_dict" and the like.

    Returns:
        the state dict of the model, on the CPU, in the dtypes of the first checkpoint. Sums are
        computed in float64. Integers, tensors with infinities and everything that is not a tensor
        are taken from the last checkpoint.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: a checkpoint has other names or shapes than the first (this is checked before
            weights are read), no weights are found, there is not one share for each checkpoint, or
            the shares don't sum to 1.
        FileNotFoundError: there is no such file.

    Source: Tian et al.: WSM: Decay-Free Learning Rate Schedule via Checkpoint Merging for LLM
    Pre-training, 2025, arXiv 2507.17634, among many.
    """
    check_checkpoints(checkpoints)
    for i, each in enumerate(checkpoints):
        if not isinstance(each, Mapping | str | os.PathLike):
            raise TypeError(
                f"`checkpoints[{i}]` must be a state dict or a path, got {short_repr(each)}."
            )
    factors = _checked_shares(shares, len(checkpoints))
    labels = [f"checkpoints[{i}]" for i in range(len(checkpoints))]
    first = open_weights(labels[0], checkpoints[0], key)
    for label, checkpoint in zip(labels[1:], checkpoints[1:], strict=True):
        _check_alike(first, open_weights(label, checkpoint, key))
    dtypes: dict[str, torch.dtype] = {}
    sums: dict[str, Tensor] = {}
    others: dict[str, Any] = {}
    for i in _with_progress(range(len(checkpoints))):
        saved = open_weights(labels[i], checkpoints[i], key)
        for name in first.tensors:
            tensor = saved.read(name)
            dtypes.setdefault(name, tensor.dtype)
            sums[name] = plus(sums.get(name), tensor, factors[i])
        others = saved.others
    # One by one, so that there is not twice as much of them for a moment.
    merged: dict[str, Any] = {name: sums.pop(name).to(dtype) for name, dtype in dtypes.items()}
    return merged | others


def decay_shares(kind: str, n: int) -> list[float]:
    """Return shares with which n checkpoints merge as though the learning rate had decayed.

    Example:
        >>> from averaging_optim.post_hoc import decay_shares
        >>> decay_shares("linear", 4)
        [0.25, 0.25, 0.25, 0.25]
        >>> [round(share, 3) for share in decay_shares("sqrt", 4)]
        [0.5, 0.207, 0.159, 0.134]

    Let w(t) be a decay from w(0) = 1 to w(1) = 0, and wⱼ = w(j / n). The checkpoints 0 … k, k = n −
    1, have the shares

        c₀ = 1 − w₁,    cⱼ = wⱼ − wⱼ₊₁,    c_k = w_k

    SGD at a constant rate gives θⱼ = θ₀ − η ∑ gᵢ over i ≤ j. Then ∑ cⱼ θⱼ = θ₀ − η ∑ wᵢ gᵢ, which
    is training at the rates η wᵢ, if the gradients had been the same.

    Args:
        kind: "linear" (equal shares), "cosine", or "sqrt" (1 − √t).
        n: number of checkpoints, at least 1.

    Raises:
        TypeError: `n` is not an integer.
        ValueError: `kind` is unknown, or `n` is less than 1.

    Source: Tian et al., see `merge`; Hägele et al.: Scaling Laws and Compute-Optimal Training
    Beyond Fixed Training Durations, 2024, arXiv 2405.18392, for 1 − √t.
    """
    if kind not in _DECAYS:
        raise ValueError(f"`kind` must be one of {', '.join(map(repr, _DECAYS))}, got {kind!r}.")
    check_integer("n", n, at_least=1)
    decay = _DECAYS[kind]
    return [decay(j / n) - decay((j + 1) / n) for j in range(n)]


def plus(sum_: Tensor | None, tensor: Tensor, factor: float) -> Tensor:
    """Return sum + factor · tensor in double precision, or a copy of integers and masks."""
    if numeric_kind(tensor) == "integer" or has_infinity(tensor):
        return tensor.clone()
    double = torch.complex128 if tensor.is_complex() else torch.float64
    tensor = tensor.to("cpu", double)
    return factor * tensor if sum_ is None else sum_.add_(tensor, alpha=factor)


def _checked_shares(shares: Sequence[float] | None, n: int) -> list[float]:
    if shares is None:
        return [1 / n] * n
    if isinstance(shares, str) or not isinstance(shares, Sequence):
        raise TypeError(f"`shares` must be a sequence of numbers, got {shares!r}.")
    if len(shares) != n:
        raise ValueError(f"`shares` must contain {n}, one for each checkpoint, got {len(shares)}.")
    for i, share in enumerate(shares):
        check_real(f"shares[{i}]", share, "(-∞, ∞)")
    if abs(math.fsum(shares) - 1) > 1e-6:
        raise ValueError(f"`shares` must sum to 1, got {math.fsum(shares)}.")
    return [float(share) for share in shares]


def _check_alike(first: SavedWeights, other: SavedWeights) -> None:
    for one, two in ((first, other), (other, first)):
        if more := [name for name in one.tensors if name not in two.tensors]:
            raise ValueError(
                f"`{other.label}` must have the same tensors as `{first.label}`, got {len(more)} "
                f"that are in `{one.label}` only, such as {more[0]!r}."
            )
    for name, (shape, kind) in first.tensors.items():
        found_shape, found_kind = other.tensors[name]
        if (found_shape, found_kind) != (shape, kind):
            raise ValueError(
                f"`{other.label}` must have a {kind} {name!r} of shape {shape}, as "
                f"`{first.label}` has, got a {found_kind} one of shape {found_shape}."
            )


def _with_progress(numbers: Sequence[int]) -> Iterable[int]:
    """Show a bar on a terminal, if tqdm is there."""
    if not sys.stderr.isatty() or os.environ.get("TQDM_DISABLE"):
        return numbers
    try:
        from tqdm import tqdm
    except ImportError:
        return numbers
    bar: Iterable[int] = tqdm(numbers, unit="checkpoint", leave=False)
    return bar
