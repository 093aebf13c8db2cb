"""Measure time and memory of merging checkpoints, and the error of a window of a running mean."""

from __future__ import annotations

import argparse
import copy
import tempfile
import threading
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.optim import SGD
from tqdm import tqdm

from averaging_optim import SWA, AveragingOptimizer
from averaging_optim.post_hoc import merge, window

MIB = 2**20


class Peak:
    """The most memory that this process has used, in MiB, without mapped files."""

    def __init__(self) -> None:
        self.start = self.most = self._now()
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._is_over.wait(0.01):
            self.most = max(self.most, self._now())

    @staticmethod
    def _now() -> float:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) / 1024
        raise RuntimeError("/proc/self/status must have a line RssAnon. Run this on Linux.")


def merging(table: Table, mebibytes: int, number: int, folder: Path) -> None:
    """Merge checkpoints of a model with 32 float32 tensors."""
    paths = []
    for i in tqdm(range(number), leave=False):
        size = mebibytes * MIB // 4 // 32
        torch.save({str(j): torch.full((size,), float(i)) for j in range(32)}, folder / f"{i}.pt")
        paths.append(folder / f"{i}.pt")
    with Peak() as peak:
        begin = time.perf_counter()
        merged = merge(paths)
        seconds = time.perf_counter() - begin
    assert merged["0"][0] == (number - 1) / 2
    taken = f"{peak.most - peak.start:.0f}"
    table.add_row(f"{number} × {mebibytes} MiB", f"{seconds:.1f}", taken)


def spread_lost(dtype: torch.dtype, updates: int, length: int) -> float:
    """Return the error of a window's mean, divided by the spread of the weights in it."""
    torch.manual_seed(0)
    weight = nn.Parameter(torch.zeros(1000))
    optimizer = AveragingOptimizer(SGD([weight]), SWA(every=None), dtype=dtype)
    model = nn.ParameterList([weight])
    early, kept = {}, []
    for update in range(1, updates + 1):
        with torch.no_grad():
            weight.normal_(1.0, 1e-3)  # an ulp of the average is 1e-4 of the spread
        optimizer.update_averages()
        if update == updates - length:
            early = copy.deepcopy(optimizer.state_dict())
        elif early:
            kept.append(weight.detach().double())
    found = window([early, optimizer.state_dict()], model, optimizer)["0"].double()
    error = found - torch.stack(kept).mean(0)
    return float(error.square().mean().sqrt() / torch.stack(kept).std())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--mebibytes", type=int, default=2048, help="size of a checkpoint (default: 2048)"
    )
    mebibytes = parser.parse_args().mebibytes
    console = Console()
    table = Table("checkpoints", "seconds", "MiB used")
    with tempfile.TemporaryDirectory() as folder:
        for number in (2, 4):
            merging(table, mebibytes, number, Path(folder))
    console.print(table)
    table = Table("average in", "error of the last 500 of 20,000 updates, relative to their spread")
    for dtype in (torch.float32, torch.float64):
        table.add_row(str(dtype).removeprefix("torch."), f"{spread_lost(dtype, 20_000, 500):.1e}")
    console.print(table)


if __name__ == "__main__":
    main()
