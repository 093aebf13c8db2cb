"""Checkpoints of released versions load for good, and their runs go on as they did there.

What is expected was written by the released version itself: see write_checkpoints.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from released_runs import NESTED, RUNS, SHARDED_RUN, TWO_RANKS, Seen, seen
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed

from averaging_optim import AveragingOptimizer

RELEASED = Path(__file__).parent / "data" / "0.1.0"
# Later versions give these two warm-ups the formulas of their sources, which 0.1.0 missed.
CORRECTED = ["ema_after_power_ramp", "ema_after_tf_ramp"]
UNCHANGED = [name for name in RUNS if name not in CORRECTED]


def load(name: str) -> tuple[nn.Module, AveragingOptimizer, dict[str, Seen]]:
    checkpoint = torch.load(RELEASED / f"{name}.pt", weights_only=True)
    model, optimizer = RUNS[name].begin()
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return model, optimizer, checkpoint


def load_two_ranks(*, sharded: bool) -> tuple[nn.Module, AveragingOptimizer, dict[str, Seen]]:
    model, optimizer = SHARDED_RUN.begin(sharded=sharded)
    weights, state = get_state_dict(model, optimizer, options=NESTED)
    checkpoint: dict[str, Any] = {"model": weights, "optimizer": state}
    load_distributed(checkpoint, checkpoint_id=RELEASED / TWO_RANKS)
    set_model_state_dict(model, checkpoint["model"], options=NESTED)
    set_optimizer_state_dict(model, optimizer, checkpoint["optimizer"], options=NESTED)
    return model, optimizer, torch.load(RELEASED / TWO_RANKS / "seen.pt", weights_only=True)


def unlike(found: Seen, stored: Seen) -> dict[str, tuple[object, object]]:
    """Return what is now and was then, where that differs; later versions may show more."""
    return {key: (found.get(key), then) for key, then in stored.items() if found.get(key) != then}


def counts(found: Seen) -> Seen:
    return {key: count for key, count in found.items() if isinstance(count, int)}


def test_every_run_has_its_checkpoint() -> None:
    assert {path.stem for path in RELEASED.iterdir()} == {*RUNS, TWO_RANKS}


@pytest.mark.parametrize("name", RUNS)
def test_a_released_checkpoint_is_loaded_as_it_was_saved(name: str) -> None:
    model, optimizer, checkpoint = load(name)
    assert unlike(seen(model, optimizer), checkpoint["held"]) == {}


@pytest.mark.parametrize("name", UNCHANGED)
def test_a_run_goes_on_from_a_released_checkpoint_as_it_did_then(name: str) -> None:
    model, optimizer, checkpoint = load(name)
    RUNS[name].go_on(model, optimizer)
    assert unlike(seen(model, optimizer), checkpoint["continued"]) == {}


@pytest.mark.parametrize("name", CORRECTED)
def test_a_run_goes_on_from_a_released_checkpoint_by_a_corrected_formula(name: str) -> None:
    model, optimizer, checkpoint = load(name)
    RUNS[name].go_on(model, optimizer)
    assert unlike(seen(model, optimizer), counts(checkpoint["continued"])) == {}


@pytest.mark.skipif(
    torch.__version__ < "2.9", reason="FSDP2 averages gradients on CPUs from torch 2.9 on"
)
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_one_process_goes_on_from_a_released_checkpoint_of_two_as_they_did_then(
    sharded: bool,
) -> None:
    model, optimizer, checkpoint = load_two_ranks(sharded=sharded)
    assert unlike(seen(model, optimizer), checkpoint["held"]) == {}
    SHARDED_RUN.go_on(model, optimizer)
    assert unlike(seen(model, optimizer), checkpoint["continued"]) == {}
