"""Averages made from checkpoints, after training."""

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
    """A sum of saved averages that comes close to the one you want.

    Attributes:
        coefficients: name of a rule → the factors of its averages, one for each checkpoint. All
            factors together sum to 1.
        residual: √(∑(s − w)² / ∑w²) over the steps of the run, where s is the share of a step in
            the sum and w in the average you want. 0 is exact.
    """

    coefficients: dict[str, tuple[float, ...]]
    residual: float


def reconstruct(
    checkpoints: Sequence[AnyCheckpoint],
    model: nn.Module,
    sigma_rel: float,
    optimizer: AveragingOptimizer,
) -> dict[str, Any]:
    """Return the model's state dict with an average of another width than those you kept.

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

    During training, keep two or more `PowerEMA` and save the optimizer now and then. The sum of
    these averages with the factors of `fit` is close to `PowerEMA.from_width(sigma_rel)` at the
    last checkpoint. Sums are computed in float64 on the CPU, which takes 8 bytes for each weight.
    If an averaged buffer is never negative in the checkpoints, such as a variance, its smallest
    value there is a lower bound of the result.

    Args:
        checkpoints: of one run, earlier ones first: state dicts of the optimizer, mappings with
            one under "optimizer", or paths of files with either. Files are read one at a time,
            with `weights_only=True`.
        model: the model whose parameters `optimizer` has. What is not averaged is taken from it.
        sigma_rel: the relative width you want, in (0, 0.2886].
        optimizer: constructed like the run's, over the parameters of `model`. Only its rules,
            groups and buffers are used; it is not modified.

    Returns:
        the entries of `model.state_dict()`, with its dtypes and devices, as independent tensors.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has a wrong value, or a checkpoint doesn't match the optimizer, has
            no averages yet, or is not later than the one before it.

    Source: Karras, Aittala, Lehtinen, Hellsten, Aila, Laine: Analyzing and Improving the Training
    Dynamics of Diffusion Models (EDM2), CVPR 2024, arXiv 2312.02696.
    """
    coefficients = fit(checkpoints, sigma_rel, optimizer).coefficients
    return _summed(checkpoints, model, optimizer, coefficients)


def window(
    checkpoints: Sequence[AnyCheckpoint],
    model: nn.Module,
    optimizer: AveragingOptimizer,
    name: str | None = None,
) -> dict[str, Any]:
    """Return the model's state dict with the mean of the weights between two checkpoints.

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

    During training, keep `SWA`. Let A₁ and A₂ be its averages after t₁ and t₂ updates. Then the
    weights of the updates after t₁, up to t₂, have

        mean = (t₂ · A₂ − t₁ · A₁) / (t₂ − t₁)

    Rounding errors of A₁ and A₂ are multiplied by t₂ / (t₂ − t₁). If the window is short compared
    with t₂, keep the average in float64 (`dtype=torch.float64`).

    Args:
        checkpoints: two of one run, the earlier one first. See `reconstruct`.
        model, optimizer: see `reconstruct`.
        name: which average. You may leave it out if there is only one.

    Returns:
        the entries of `model.state_dict()`. See `reconstruct`.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the average's rule is not `SWA`, there are not two checkpoints, or one doesn't
            match. See `reconstruct`.

    Source: the formula of icefall's `average_checkpoints_with_averaged_model`.
    """
    if not isinstance(optimizer, AveragingOptimizer):
        raise TypeError(f"`optimizer` must be an AveragingOptimizer, got {optimizer!r}.")
    chosen = optimizer._averages.named(name).name
    if not isinstance(optimizer.rules[chosen], SWA):
        raise ValueError(
            f"`name` must be an average whose rule is SWA, got {optimizer.rules[chosen]!r}."
        )
    counts = [each[chosen] for each in _counts(checkpoints, optimizer, [chosen])]
    if len(counts) != 2:
        raise ValueError(f"`checkpoints` must contain two, got {len(counts)}.")
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
    """Return the sum that `reconstruct` uses for this width, and how close it comes.

    Example:
        >>> import copy, torch
        >>> from averaging_optim import AveragingOptimizer, PowerEMA
        >>> from averaging_optim.post_hoc import fit
        >>> widths = {"narrow": PowerEMA.from_width(0.05), "wide": PowerEMA.from_width(0.1)}
        >>> sgd = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))])
        >>> optimizer = AveragingOptimizer(sgd, widths)
        >>> checkpoints = []
        >>> for update in range(1, 161):
        ...     optimizer.update_averages()
        ...     if update % 10 == 0:
        ...         checkpoints.append(copy.deepcopy(optimizer.state_dict()))
        >>> round(fit(checkpoints, 0.15, optimizer).residual, 3)
        0.009

    In an average of n updates, update t has the share

        p(t) = (t^(γ + 1) − (t − 1)^(γ + 1)) / n^(γ + 1)

    The coefficients x of the saved averages minimize ∑ₜ (∑ᵢ xᵢ pᵢ(t) − p(t))². They solve
    ∑ⱼ ⟨pᵢ, pⱼ⟩ xⱼ = ⟨pᵢ, p⟩, and are scaled to sum to 1.

    Args:
        checkpoints, sigma_rel, optimizer: see `reconstruct`. Files are mapped rather than read, as
            only their counts are needed.

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
            "`optimizer` must keep two or more `PowerEMA` of different widths, got "
            f"{dict(optimizer.rules)}."
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
                raise ValueError(f"`checkpoints[{i}]` must have updates of {name!r}, got 0.")
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
            raise ValueError(f"`checkpoints[{i}]` must match `optimizer`. {error}") from error
        yield checkpoint


def _state_dict(checkpoint: AnyCheckpoint) -> Any:
    if isinstance(checkpoint, str | os.PathLike):
        # Mapped, so that only what is looked at is read.
        checkpoint = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    inner = checkpoint.get("optimizer") if isinstance(checkpoint, Mapping) else None
    return checkpoint if inner is None else inner
