"""stable-baselines3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from stable_baselines3 import PPO

from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped


def agent(wrap: Wrap) -> PPO:
    def adam(parameters: Any, **arguments: Any) -> Any:
        return wrap(torch.optim.Adam(parameters, **arguments))

    return PPO(
        "MlpPolicy",
        "CartPole-v1",
        n_steps=32,
        batch_size=16,
        n_epochs=2,
        policy_kwargs={"optimizer_class": adam, "net_arch": [8]},
        seed=0,
        device="cpu",
    )


def learned(agent: PPO) -> Run:
    agent.learn(64)
    observations = torch.linspace(-1, 1, 20).reshape(5, 4)

    def evaluate() -> Any:
        return agent.policy.predict_values(observations).detach()

    return Run(agent.policy, agent.policy.optimizer, evaluate)


def test_ppo_learns_as_without_the_wrapper() -> None:
    check_driven(lambda wrap: learned(agent(wrap)), steps=8)


def test_ppo_resumes_from_what_it_has_saved(tmp_path: Path) -> None:
    def whole() -> Run:
        ppo = agent(wrapped)
        ppo.learn(64)
        ppo.set_random_seed(1)
        return learned(ppo)

    def halves() -> Run:
        ppo = agent(wrapped)
        ppo.learn(64)
        ppo.save(tmp_path / "half")
        resumed = PPO.load(tmp_path / "half", env=ppo.get_env(), device="cpu")
        resumed.set_random_seed(1)
        return learned(resumed)

    check_resumed(seeded(halves), seeded(whole))
