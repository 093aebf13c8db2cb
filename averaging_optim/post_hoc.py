"""Averages made after training, out of checkpoints."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from averaging_optim._averages.average import store_keys
from averaging_optim._averages.averages import COUNT
from averaging_optim._checkpoints.reading import Checkpoint, read_checkpoint
from averaging_optim._checks import check_checkpoints
from averaging_optim._merging import decay_shares, merge, plus
from averaging_optim._optimizer import AveragingOptimizer
from averaging_optim._rules import SWA, PowerEMA

__all__ = ["Fit", "decay_shares", "fit", "merge", "reconstruct", "window"]

AnyCheckpoint = Mapping[str, Any] | str | os.PathLike[str]


@dataclass(frozen=True)
class Fit:
    """The average that is wanted, as a sum of those that were saved.

    Attributes:
        coefficients: name of a rule → the factor of its average in each checkpoint. They
            sum to 1, all of them together.
        residual: √(∑(s − w)² / ∑w²) over the steps of the run, s being the share of a step
            in the sum and w the one wanted. 0 is exact.
    """

    coefficients: dict[str, tuple[float, ...]]
    residual: float


def reconstruct(
    checkpoints: Sequence[AnyCheckpoint],
    model: nn.Module,
    sigma_rel: float,
    optimizer: AveragingOptimizer,
) -> dict[str, Any]:
    """Return the model's state dict under an average of another width than those kept.

    The run has kept two or more `PowerEMA`, and saved its optimizer now and then. The sum
    of these averages with the factors of `fit` is close to what
    `PowerEMA.from_width(sigma_rel)` would be at the last of the checkpoints. Sums are
    formed in float64, which takes 8 bytes for each weight, on the CPU. An averaged buffer that
    is nowhere negative in the checkpoints, such as a variance, is at least its least value there.

    Args:
        checkpoints: of one run, the earlier first: state dicts of the optimizer, mappings
            that hold one under "optimizer", or paths of files of either. Files are read
            one at a time, with `weights_only=True`.
        model: has the parameters of `optimizer`. What is not averaged is taken from it.
        sigma_rel: the width wanted, in (0, 0.2886].
        optimizer: made as the one of the run was, over the parameters of `model`. It is
            asked for its rules, groups and buffers, and left as it is.

    Returns:
        the entries of `model.state_dict()`, in its dtypes and on its devices, as
        independent tensors.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: an argument has a wrong value, or a checkpoint does not fit the
            optimizer, has no averages yet, or is not later than the one before it.

    Source: Karras, Aittala, Lehtinen, Hellsten, Aila, Laine: Analyzing and Improving the
    Training Dynamics of Diffusion Models (EDM2), CVPR 2024, arXiv 2312.02696.

    Example:
        >>> import copy, torch
        >>> from averaging_optim import AveragingOptimizer, PowerEMA, describe
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.zeros_(model.weight)
        >>> widths = {"narrow": PowerEMA.from_width(0.05), "wide": PowerEMA.from_width(0.1)}
        >>> sgd = torch.optim.SGD(model.parameters(), lr=1.0)
        >>> optimizer = AveragingOptimizer(sgd, widths)
        >>> checkpoints = []
        >>> for step in range(1, 161):  # the weight is 1, 2, 3, ...
        ...     model.weight.grad = torch.full((1, 1), -1.0)
        ...     optimizer.step()
        ...     if step % 10 == 0:
        ...         checkpoints.append(copy.deepcopy(optimizer.state_dict()))
        >>> wanted = 160 - describe(PowerEMA.from_width(0.15), steps=160).mean_age
        >>> found = reconstruct(checkpoints, model, 0.15, optimizer)["weight"].item()
        >>> round(wanted, 1), round(found, 1)
        (131.7, 131.7)
    """
    coefficients = fit(checkpoints, sigma_rel, optimizer).coefficients
    return _summed(checkpoints, model, optimizer, coefficients)


def window(
    checkpoints: Sequence[AnyCheckpoint],
    model: nn.Module,
    optimizer: AveragingOptimizer,
    name: str | None = None,
) -> dict[str, Any]:
    """Return the model's state dict under the mean of the weights between two checkpoints.

    (t₂ · A₂ − t₁ · A₁) / (t₂ − t₁)

    Of a run that has kept `SWA`, A being its average after t updates. Keep it in float64
    (`dtype=torch.float64`) if the two are near each other beside t: what float32 has rounded off
    of A is multiplied by t₂ / (t₂ − t₁).

    Args:
        checkpoints: two of one run, the earlier first: see `reconstruct`.
        model, optimizer: see `reconstruct`.
        name: which average; may be left out if there is only one.

    Returns:
        as `reconstruct`.

    Raises:
        TypeError: an argument is of the wrong type.
        ValueError: the average is not by `SWA`, there are not two checkpoints, or one does not
            fit; see `reconstruct`.

    Source: the same as in icefall's `average_checkpoints_with_averaged_model`.

    Example:
        >>> import copy, torch
        >>> from averaging_optim import SWA, AveragingOptimizer
        >>> from averaging_optim.post_hoc import window
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> optimizer = AveragingOptimizer(torch.optim.SGD(model.parameters()), SWA())
        >>> saved = []
        >>> for number in (1.0, 2.0, 3.0, 4.0):
        ...     _ = torch.nn.init.constant_(model.weight, number)
        ...     optimizer.update_averages()
        ...     saved.append(copy.deepcopy(optimizer.state_dict()))
        >>> window([saved[1], saved[3]], model, optimizer)
        {'weight': tensor([[3.5000]])}
    """
    if not isinstance(optimizer, AveragingOptimizer):
        raise TypeError(f"`optimizer` must be an AveragingOptimizer, got {optimizer!r}.")
    chosen = optimizer._averages.named(name).name
    if not isinstance(optimizer.rules[chosen], SWA):
        raise ValueError(f"`name` must be an average by SWA, got {optimizer.rules[chosen]!r}.")
    counts = [each[chosen] for each in _counts(checkpoints, optimizer, [chosen])]
    if len(counts) != 2:
        raise ValueError(f"`checkpoints` must be two, got {len(counts)}.")
    early, late = counts
    shares = {chosen: (-early / (late - early), late / (late - early))}
    return _summed(checkpoints, model, optimizer, shares)


def _summed(
    checkpoints: Sequence[AnyCheckpoint],
    model: nn.Module,
    optimizer: AveragingOptimizer,
    coefficients: Mapping[str, Sequence[float]],
) -> dict[str, Any]:
    """Return the model's state dict under a sum of averages in checkpoints.

    Args:
        coefficients: name → factor of its average in each checkpoint.
    """
    # What is averaged is replaced below; an optimizer without averages gives the model's own.
    exported = optimizer.averaged_state_dict(model, next(iter(coefficients)))
    sums: dict[Tensor, Tensor] = {}
    least: dict[Tensor, Tensor] = {}
    buffers = set(optimizer.buffers)
    for i, checkpoint in enumerate(_read(checkpoints, optimizer)):
        for name, factors in coefficients.items():
            for source, average in checkpoint.averages[name].items():
                sums[source] = plus(sums.get(source), average, factors[i])
                if source in buffers and average.is_floating_point():
                    average = average.to("cpu", torch.float64)
                    least[source] = average.minimum(least.get(source, average))
    for source, lowest in least.items():
        # Some factors are negative, and a variance must not be.
        if bool((lowest >= 0).all()):
            sums[source] = sums[source].maximum(lowest)
    for key, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, Tensor) and tensor in sums:
            exported[key] = sums[tensor].to(tensor)
    return exported


def fit(
    checkpoints: Sequence[AnyCheckpoint], sigma_rel: float, optimizer: AveragingOptimizer
) -> Fit:
    """Return how `reconstruct` forms an average of this width, and how good it can be.

    Update t of the n that an average stands for has the share p(t) = (t^(γ + 1) −
    (t − 1)^(γ + 1)) / n^(γ + 1) in it. The coefficients x of the averages that were saved minimise
    ∑ₜ (∑ᵢ xᵢ pᵢ(t) − p(t))²: they solve ∑ⱼ ⟨pᵢ, pⱼ⟩ xⱼ = ⟨pᵢ, p⟩, and are scaled to sum to 1.

    Args:
        checkpoints, sigma_rel, optimizer: see `reconstruct`. Files are not read but mapped,
            for little more than the counts is looked at.

    Raises:
        TypeError, ValueError: see `reconstruct`.
    """
    rules = _power_emas(optimizer)
    counts = list(_counts(checkpoints, optimizer, list(rules)))
    wanted = _Power(max(counts[-1].values()), PowerEMA.from_width(sigma_rel).gamma)
    powers = [_Power(n, rules[name].gamma) for each in counts for name, n in each.items()]

    products = torch.zeros(len(powers) + 1, len(powers) + 1, dtype=torch.float64)
    for shares in _shares([*powers, wanted]):
        products += shares @ shares.T
    x = torch.linalg.solve(products[:-1, :-1], products[:-1, -1])
    x = x / x.sum()
    squared = 0.0
    for shares in _shares([*powers, wanted]):
        squared += float((x @ shares[:-1] - shares[-1]).square().sum())
    columns = x.view(len(counts), len(rules)).T.tolist()
    return Fit(
        coefficients=dict(zip(rules, map(tuple, columns), strict=True)),
        residual=math.sqrt(squared / float(products[-1, -1])),
    )


@dataclass(frozen=True)
class _Power:
    """The shares of `end` updates in a `PowerEMA`."""

    end: int
    gamma: float

    def shares(self, updates: Tensor) -> Tensor:
        """Return the share of each of these updates, the first being 1."""
        after, before = (
            (t / self.end).clamp(max=1) ** (self.gamma + 1) for t in (updates, updates - 1)
        )
        return after - before


def _shares(powers: Sequence[_Power]) -> Iterator[Tensor]:
    """Yield the shares in each average, a row for each, some thousand updates at a time."""
    last = max(power.end for power in powers)
    for updates in torch.arange(1, last + 1, dtype=torch.float64).split(2**13):
        yield torch.stack([power.shares(updates) for power in powers])


def _power_emas(optimizer: AveragingOptimizer) -> dict[str, PowerEMA]:
    if not isinstance(optimizer, AveragingOptimizer):
        raise TypeError(f"`optimizer` must be an AveragingOptimizer, got {optimizer!r}.")
    rules = {name: each for name, each in optimizer.rules.items() if isinstance(each, PowerEMA)}
    if len({rule.gamma for rule in rules.values()}) < max(2, len(rules)):
        raise ValueError(
            "`optimizer` must keep two or more averages by `PowerEMA`, each of another width, "
            f"got {dict(optimizer.rules)}."
        )
    # Time is counted in updates from `start`, which must be the same time for all of them.
    if len({(rule.start, rule.every) for rule in rules.values()}) > 1:
        raise ValueError(
            "`optimizer` must have the same `start` and `every` in each PowerEMA, got "
            f"{list(rules.values())}."
        )
    return rules


def _counts(
    checkpoints: Sequence[AnyCheckpoint], optimizer: AveragingOptimizer, names: Sequence[str]
) -> Iterator[dict[str, int]]:
    """Yield name → updates averaged, for each checkpoint."""
    before = dict.fromkeys(names, 0)
    for i, checkpoint in enumerate(_read(checkpoints, optimizer)):
        counts = {name: checkpoint.counters[COUNT + name] for name in names}
        for name, count in counts.items():
            if count == 0:
                raise ValueError(f"`checkpoints[{i}]` must hold an average {name!r}, has none yet.")
            if count <= before[name]:
                raise ValueError(
                    f"`checkpoints[{i}]` must be later than the one before it, got {count} updates "
                    f"of {name!r} after {before[name]}."
                )
        yield counts
        before = counts


def _read(
    checkpoints: Sequence[AnyCheckpoint], optimizer: AveragingOptimizer
) -> Iterator[Checkpoint]:
    """Yield what each checkpoint holds for this optimizer, one at a time."""
    check_checkpoints(checkpoints)
    keys = {name: store_keys(name, rule) for name, rule in optimizer.rules.items()}
    for i, each in enumerate(checkpoints):
        state_dict = _state_dict(each)
        try:
            checkpoint = read_checkpoint(state_dict, optimizer._averages.look_up(), keys)
        except ValueError as error:
            raise ValueError(f"`checkpoints[{i}]` must fit `optimizer`: {error}") from error
        yield checkpoint


def _state_dict(checkpoint: AnyCheckpoint) -> Any:
    if isinstance(checkpoint, str | os.PathLike):
        # Mapped, so that only what is looked at is read.
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    inner = checkpoint.get("optimizer") if isinstance(checkpoint, Mapping) else None
    return checkpoint if inner is None else inner
