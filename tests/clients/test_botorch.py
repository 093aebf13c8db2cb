"""BoTorch."""

from __future__ import annotations

from typing import Any

import torch
from botorch.models import SingleTaskGP
from botorch.optim.fit import fit_gpytorch_mll_torch
from gpytorch.mlls import ExactMarginalLogLikelihood

from clients.driven import Run, Wrap, check_driven, wrapped

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


def averaged_noise(*, is_bounded_in_a_post_hook: bool) -> float:
    """Return the average of a noise that BoTorch keeps at 0.9 or more, where it would shrink."""
    model: Any = SingleTaskGP(X, Y)
    noise = model.likelihood.noise_covar.raw_noise
    adam = torch.optim.Adam(model.parameters(), lr=0.05)
    if is_bounded_in_a_post_hook:
        adam.register_step_post_hook(lambda *_: noise.data.clamp_(min=0.9))
    optimizer = wrapped(adam)
    likelihood = ExactMarginalLogLikelihood(model.likelihood, model)
    bounds: Any = {"likelihood.noise_covar.raw_noise": (0.9, None)}
    fit_gpytorch_mll_torch(likelihood, bounds=bounds, optimizer=optimizer, step_limit=10)
    assert noise >= 0.9
    with optimizer.swap_to_averaged():
        return float(noise.detach())


def test_a_bound_binds_the_average_too_if_a_post_hook_sets_it() -> None:
    assert averaged_noise(is_bounded_in_a_post_hook=True) >= 0.9
    # BoTorch sets it after the step, and so after the average.
    assert averaged_noise(is_bounded_in_a_post_hook=False) < 0.9
