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
from write_checkpoints import write

import averaging_optim
from averaging_optim import AveragingOptimizer

DATA = Path(__file__).parent / "data"
RELEASES = sorted(folder.name for folder in DATA.iterdir())
CHECKPOINTS = [path for release in RELEASES for path in sorted((DATA / release).glob("*.pt"))]
# Later versions give these two warm-ups the formulas of their sources, which 0.1.0 missed.
CORRECTED = [
    DATA / "0.1.0" / "ema_after_power_ramp.pt",
    DATA / "0.1.0" / "ema_after_tf_ramp.pt",
]
UNCHANGED = [path for path in CHECKPOINTS if path not in CORRECTED]


def name_of(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def as_numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def load(path: Path) -> tuple[nn.Module, AveragingOptimizer, dict[str, Seen]]:
    checkpoint = torch.load(path, weights_only=True)
    model, optimizer = RUNS[path.stem].begin()
    model.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return model, optimizer, checkpoint


def load_two_ranks(
    folder: Path, *, sharded: bool
) -> tuple[nn.Module, AveragingOptimizer, dict[str, Seen]]:
    model, optimizer = SHARDED_RUN.begin(sharded=sharded)
    weights, state = get_state_dict(model, optimizer, options=NESTED)
    checkpoint: dict[str, Any] = {"model": weights, "optimizer": state}
    load_distributed(checkpoint, checkpoint_id=folder)
    set_model_state_dict(model, checkpoint["model"], options=NESTED)
    set_optimizer_state_dict(model, optimizer, checkpoint["optimizer"], options=NESTED)
    return model, optimizer, torch.load(folder / "seen.pt", weights_only=True)


def unlike(found: Seen, stored: Seen) -> dict[str, tuple[object, object]]:
    """Return what is now and was then, where that differs; later versions may show more."""
    return {key: (found.get(key), then) for key, then in stored.items() if found.get(key) != then}


def counts(found: Seen) -> Seen:
    return {key: count for key, count in found.items() if isinstance(count, int)}


def test_the_latest_release_keeps_its_checkpoints_here() -> None:
    assert averaging_optim.__version__ in RELEASES


@pytest.mark.parametrize("release", RELEASES)
def test_a_release_keeps_a_checkpoint_of_every_run_it_can_make(release: str) -> None:
    can_make = {name for name, run in RUNS.items() if as_numbers(run.since) <= as_numbers(release)}
    assert {path.stem for path in (DATA / release).iterdir()} == {*can_make, TWO_RANKS}


@pytest.mark.parametrize("name", RUNS)
def test_resuming_from_what_this_version_writes_equals_never_stopping(
    name: str, tmp_path: Path
) -> None:
    path = tmp_path / f"{name}.pt"
    write(path, RUNS[name])
    model, optimizer, checkpoint = load(path)
    assert unlike(seen(model, optimizer), checkpoint["held"]) == {}
    RUNS[name].go_on(model, optimizer)
    assert unlike(seen(model, optimizer), checkpoint["continued"]) == {}


@pytest.mark.parametrize("path", CHECKPOINTS, ids=name_of)
def test_a_released_checkpoint_is_loaded_as_it_was_saved(path: Path) -> None:
    model, optimizer, checkpoint = load(path)
    assert unlike(seen(model, optimizer), checkpoint["held"]) == {}


@pytest.mark.parametrize("path", UNCHANGED, ids=name_of)
def test_a_run_resumes_from_a_released_checkpoint_as_it_did_then(path: Path) -> None:
    model, optimizer, checkpoint = load(path)
    RUNS[path.stem].go_on(model, optimizer)
    assert unlike(seen(model, optimizer), checkpoint["continued"]) == {}


@pytest.mark.parametrize("path", CORRECTED, ids=name_of)
def test_a_run_resumes_from_a_released_checkpoint_by_a_corrected_formula(path: Path) -> None:
    model, optimizer, checkpoint = load(path)
    RUNS[path.stem].go_on(model, optimizer)
    assert unlike(seen(model, optimizer), counts(checkpoint["continued"])) == {}


@pytest.mark.skipif(
    torch.__version__ < "2.9", reason="FSDP2 averages gradients on CPUs from torch 2.9 on"
)
@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("release", RELEASES)
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
def test_one_process_resumes_from_a_released_checkpoint_of_two_as_they_did_then(
    release: str, sharded: bool
) -> None:
    model, optimizer, checkpoint = load_two_ranks(DATA / release / TWO_RANKS, sharded=sharded)
    assert unlike(seen(model, optimizer), checkpoint["held"]) == {}
    SHARDED_RUN.go_on(model, optimizer)
    assert unlike(seen(model, optimizer), checkpoint["continued"]) == {}
