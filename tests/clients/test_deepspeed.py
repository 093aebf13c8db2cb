"""DeepSpeed trains copies of the weights: `AveragingOptimizer.of` averages the model it trains."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pages import DEEPSPEED, PAGES, blocks, broken_promises
from processes import in_processes
from torch import Tensor, nn
from torch.optim import Adam, Optimizer
from training import loss_of_batch, same, small_model, values

from averaging_optim import EMA, SWA, AveragingOptimizer, Lookahead

# ZeRO's stage, and the dtype of the weights.
CASES = {
    "zero_0_bfloat16": (0, torch.bfloat16),
    "zero_1_float32": (1, torch.float32),
    "zero_2_bfloat16": (2, torch.bfloat16),
}
RULES = {"ema": EMA(0.9), "swa": SWA()}
ACCUMULATED = 2  # batches a step
STEPS = 5
LEARNING_RATE = 0.01


def start(model: nn.Module, optimizer: Optimizer, stage: int) -> Any:
    """Return DeepSpeed's engine, in a process of a group."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(dist.get_rank())}
    with warnings.catch_warnings(action="ignore"):
        import deepspeed
    dtype = next(model.parameters()).dtype
    config = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": ACCUMULATED,
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,
        "bf16": {"enabled": dtype == torch.bfloat16},
    }
    return deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]


def train(engine: Any, averaged: AveragingOptimizer, steps: range) -> list[list[Tensor]]:
    """Return the weights after each step."""
    snapshots = []
    for batch in range(steps.start * ACCUMULATED, steps.stop * ACCUMULATED):
        engine.backward(loss_of_batch(engine, batch * dist.get_world_size() + dist.get_rank()))
        engine.step()
        if engine.was_step_applied():
            averaged.step()
            snapshots.append(values(engine.module.parameters()))
    return snapshots


def averages_of(averaged: AveragingOptimizer, model: nn.Module) -> dict[str, list[Tensor]]:
    return {name: list(averaged.averaged_state_dict(model, name).values()) for name in RULES}


def adam(model: nn.Module) -> Adam:
    return Adam(model.parameters(), lr=LEARNING_RATE)


def drive(stage: int, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """Train without averages, with them, and with a stop, and tell of an optimizer inside."""
    bare = start(model := small_model(dtype), adam(model), stage)
    expected = train(bare, AveragingOptimizer.of(small_model(), EMA()), range(STEPS))

    engine = start(model := small_model(dtype), adam(model), stage)
    averaged = AveragingOptimizer.of(engine.module, RULES)
    snapshots = train(engine, averaged, range(3))
    engine.save_checkpoint(folder, client_state={"averaged": averaged.state_dict()})
    snapshots += train(engine, averaged, range(3, STEPS))

    resumed = start(model := small_model(dtype), adam(model), stage)
    again = AveragingOptimizer.of(resumed.module, RULES)
    again.load_state_dict(resumed.load_checkpoint(folder)[1]["averaged"])
    train(resumed, again, range(3, STEPS))

    writing = start(model := small_model(dtype), adam(model), stage)
    back_to_the_first = AveragingOptimizer.of(model, Lookahead(0.0, every=2))
    undone = train(writing, back_to_the_first, range(STEPS))

    inside = AveragingOptimizer(adam(model := small_model(dtype)), EMA(0.9))
    train(start(model, inside, stage), AveragingOptimizer.of(model, EMA()), range(STEPS))
    with warnings.catch_warnings(record=True, action="always") as told, inside.swap_to_averaged():
        pass
    return {
        "bare": expected,
        "snapshots": snapshots,
        "counts": {name: averaged.n_averaged(name) for name in RULES},
        "averages": averages_of(averaged, engine.module),
        "resumed": averages_of(again, resumed.module),
        "undone": undone,
        "told": [str(each.message) for each in told],
    }


@pytest.fixture(scope="module", params=list(CASES.values()), ids=list(CASES))
def driven(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    stage, dtype = request.param
    return in_processes(2, drive, stage, dtype, tmp_path_factory.mktemp("checkpoint"))[0]


def test_training_is_that_without_averages(driven: dict[str, Any]) -> None:
    assert all(map(same, driven["snapshots"], driven["bare"]))


def test_only_steps_that_are_taken_count(driven: dict[str, Any]) -> None:
    assert driven["counts"] == {"ema": STEPS, "swa": STEPS}


def test_averages_are_those_of_the_weights_of_the_model(driven: dict[str, Any]) -> None:
    columns = list(zip(*driven["snapshots"], strict=True))
    mean = [torch.stack(each).double().mean(0) for each in columns]
    ema = [each[0].double() for each in columns]
    for weights in driven["snapshots"][1:]:
        ema = [0.9 * a + 0.1 * w.double() for a, w in zip(ema, weights, strict=True)]
    # An export has the dtype of the weights, in which it is rounded once more.
    for found, expected in ((driven["averages"]["swa"], mean), (driven["averages"]["ema"], ema)):
        torch.testing.assert_close(found, [each.to(found[0].dtype) for each in expected])


def test_a_resumed_run_is_the_run_that_never_stopped(driven: dict[str, Any]) -> None:
    assert all(same(driven["resumed"][name], driven["averages"][name]) for name in RULES)


def test_what_a_rule_writes_into_the_weights_is_overwritten(driven: dict[str, Any]) -> None:
    # A step of Adam moves a weight by about its learning rate, and the last step would be the first
    # after a return to the first weights.
    moved = [a - b for a, b in zip(driven["undone"][-1], driven["undone"][0], strict=True)]
    assert max(each.abs().max().item() for each in moved) > 3 * LEARNING_RATE


def test_averaging_the_optimizer_that_deepspeed_is_given_warns(driven: dict[str, Any]) -> None:
    assert [each for each in driven["told"] if "took the place" in each]


def test_the_code_of_the_page_runs_in_two_processes(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text("\n".join(blocks(PAGES[DEEPSPEED])))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        # Of one rank, as lines that two print at once run into each other.
        [*torchrun, "--local-ranks-filter=0", str(program)],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "DS_ACCELERATOR": "cpu"},
        timeout=300,
    )
    assert broken_promises(PAGES[DEEPSPEED], done.stdout) == []
