"""optuna runs, and prunes, trials that train with the wrapper."""

from __future__ import annotations

import optuna
import torch
from torch import nn
from training import same, values

from clients.data import INPUTS, TARGETS
from clients.driven import Run, Wrap, check_driven, wrapped


def train_a_trial(trial: optuna.Trial, wrap: Wrap) -> Run:
    model = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    rate = trial.suggest_float("lr", 1e-3, 1e-1, log=True)
    optimizer = wrap(torch.optim.Adam(model.parameters(), lr=rate))
    for _ in range(4):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(INPUTS), TARGETS).backward()
        optimizer.step()
    return Run(model, optimizer, lambda: model(INPUTS).detach())


def study() -> optuna.Study:
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))


def test_a_trial_trains_as_without_the_wrapper() -> None:
    check_driven(lambda wrap: train_a_trial(study().ask(), wrap), steps=4)


def test_a_trial_that_is_pruned_inside_a_swap_leaves_the_training_weights() -> None:
    found: list[bool] = []

    def objective(trial: optuna.Trial) -> float:
        run = train_a_trial(trial, wrapped)
        trained = values(run.model.parameters())
        try:
            with run.optimizer.swap_to_averaged():
                raise optuna.TrialPruned
        finally:
            found.append(same(run.model.parameters(), trained))

    trials = study()
    trials.optimize(objective, n_trials=2)
    assert found == [True, True]
    assert {trial.state for trial in trials.trials} == {optuna.trial.TrialState.PRUNED}
