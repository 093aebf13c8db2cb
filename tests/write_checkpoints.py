"""Write the checkpoints that later versions must load: python tests/write_checkpoints.py FOLDER."""

from __future__ import annotations

import argparse
import copy
import os
from pathlib import Path

import torch
import torch.distributed as dist
from processes import in_processes
from released_runs import NESTED, RUNS, SHARDED_RUN, TWO_RANKS, Run, seen
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="is made; tests/data/<version>")
    folder = parser.parse_args().folder.resolve()
    folder.mkdir(parents=True)
    for name, run in RUNS.items():
        write(folder / f"{name}.pt", run)
    in_processes(2, write_from_each_rank, folder)


def write(path: Path, run: Run) -> None:
    model, optimizer = run.begin()
    run.train(model, optimizer, run.steps)
    weights, state = copy.deepcopy((dict(model.state_dict()), optimizer.state_dict()))
    checkpoint = {"model": weights, "optimizer": state, "held": seen(model, optimizer)}
    run.go_on(model, optimizer)
    torch.save({**checkpoint, "continued": seen(model, optimizer)}, path)


def write_from_each_rank(folder: Path) -> None:
    # The metadata of a distributed checkpoint holds the path it was given.
    os.chdir(folder)
    model, optimizer = SHARDED_RUN.begin(sharded=True)
    SHARDED_RUN.train(model, optimizer, SHARDED_RUN.steps)
    weights, state = get_state_dict(model, optimizer, options=NESTED)
    save({"model": weights, "optimizer": state}, checkpoint_id=TWO_RANKS)
    held = seen(model, optimizer)
    SHARDED_RUN.go_on(model, optimizer)
    continued = seen(model, optimizer)
    if dist.get_rank() == 0:
        torch.save({"held": held, "continued": continued}, Path(TWO_RANKS) / "seen.pt")


if __name__ == "__main__":
    main()
