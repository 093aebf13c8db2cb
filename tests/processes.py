"""Functions run in several real processes, which talk through gloo."""

from __future__ import annotations

import multiprocessing
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import start_processes

# One server imports torch, and every process is a fork of it: no start-up to wait for. It does
# not find the modules of the tests, and passes over what it does not find without a word.
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "averaging_optim",
        "pytest",
        "torch.distributed.checkpoint.state_dict_loader",
        "torch.distributed.checkpoint.state_dict_saver",
        "torch.distributed.fsdp",
        "torch.distributed.optim",
        "torch.distributed.tensor.parallel",
    ]
)


def in_processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `work(*arguments)` returns in each rank of a gloo group.

    What goes in and out is pickled, as between real programs.
    """
    with tempfile.TemporaryDirectory() as folder:
        start_processes(
            _run, (count, folder, work, arguments), nprocs=count, start_method="forkserver"
        )
        return [torch.load(_result(folder, i), weights_only=False) for i in range(count)]


def _run(rank: int, count: int, folder: str, work: Callable[..., Any], arguments: Any) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("error", message="The state dict has no average")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting_point",
        rank=rank,
        world_size=count,
        timeout=timedelta(seconds=60),
    )
    try:
        torch.save(work(*arguments), _result(folder, rank))
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _result(folder: str, rank: int) -> Path:
    return Path(folder) / f"{rank}.pt"
