"""Several optimizers, one average."""

from __future__ import annotations

from collections.abc import Sequence

from averaging_optim._averaged import Averaged
from averaging_optim._averages.averages import Averages
from averaging_optim._optimizer import AveragingOptimizer


class Together(Averaged):
    """What `together` returns."""

    def __init__(self, optimizers: Sequence[AveragingOptimizer]) -> None:
        self.optimizers = tuple(optimizers)

    @property
    def _each(self) -> Sequence[Averages]:
        return [averages for optimizer in self.optimizers for averages in optimizer._each]

    def __repr__(self) -> str:
        return f"together({', '.join(map(repr, self.optimizers))})"


def together(*optimizers: AveragingOptimizer) -> Together:
    """Use the averages of several optimizers as one.

    Example:
        >>> import torch
        >>> from averaging_optim import EMA, AveragingOptimizer, together
        >>> model = torch.nn.Linear(2, 2)
        >>> muon = AveragingOptimizer(torch.optim.Muon([model.weight]), EMA(decay=0.99))
        >>> adam = AveragingOptimizer(torch.optim.AdamW([model.bias]), EMA(decay=0.99))
        >>> list(together(muon, adam).averaged_state_dict(model))
        ['weight', 'bias']

    The result has `swap_to_averaged`, `evaluate_averages`, `averaged_model`, `averaged_state_dict`
    and `load_averaged_state_dict`, as `AveragingOptimizer` has them. They act on all optimizers or,
    if one raises, on none. Step, save and load each optimizer as usual. If several optimizers
    average the same buffer, the last one's average is used.

    Args:
        optimizers: AveragingOptimizers that all have the averages you ask for by name.

    Raises:
        TypeError: one is not an AveragingOptimizer.
        ValueError: none is given, one is given twice, or two train the same parameter.
    """
    if not optimizers:
        raise ValueError("`optimizers` must contain at least one AveragingOptimizer, got none.")
    for optimizer in optimizers:
        if not isinstance(optimizer, AveragingOptimizer):
            raise TypeError(f"`optimizers` must be AveragingOptimizers, got {optimizer!r}.")
    weights = [
        weight
        for optimizer in optimizers
        for weight in dict.fromkeys(p for group in optimizer.param_groups for p in group["params"])
    ]
    if len(set(weights)) < len(weights):
        raise ValueError("`optimizers` must train different parameters, got one that two train.")
    return Together(optimizers)
