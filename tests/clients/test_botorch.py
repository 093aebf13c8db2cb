"""BoTorch."""

from __future__ import annotations

from typing import Any

import torch
from botorch.models import SingleTaskGP
from botorch.optim.fit import fit_gpytorch_mll_torch
from gpytorch.mlls import ExactMarginalLogLikelihood

from clients.driven import Run, Wrap, check_driven

X = torch.linspace(0, 1, 12, dtype=torch.double)[:, None]
Y = (6 * X).sin()


def train(wrap: Wrap) -> Run:
    model: Any = SingleTaskGP(X, Y)
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    optimizer = wrap(torch.optim.Adam(model.parameters(), lr=0.05))
    fit_gpytorch_mll_torch(likelihood, optimizer=optimizer, step_limit=10)

    def evaluate() -> Any:
        # In `train` the model forgets what it has computed with other weights.
        model.train()
        return model.posterior(X + 0.05).mean.detach()

    return Run(model, optimizer, evaluate)


def test_a_process_is_fitted_as_without_the_wrapper() -> None:
    check_driven(train, steps=10)
