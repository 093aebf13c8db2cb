"""How many examples Hypothesis tries, threads torch takes, and what tests of several files get."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import settings
from tally import table
from torch._C._distributed_c10d import HashStore

# Loads a profile of its own when it is imported, as by the tests of torch's optimizers.
importlib.import_module("torch.testing._internal.common_utils")
# The same examples at each run, or very many new ones.
settings.register_profile("default", max_examples=200, derandomize=True, deadline=None)
settings.register_profile("soak", max_examples=20_000, derandomize=False, deadline=None)
settings.load_profile("default")
# On a busy machine the threads of a small model wait for each other far longer than they compute.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-optimizers",
        action="store_true",
        help="every optimizer of other packages that third_party.py finds, not twenty of them",
    )


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    if config.getoption("--all-optimizers"):
        every = [report for reports in terminalreporter.stats.values() for report in reports]
        terminalreporter.write_line(table(r for r in every if isinstance(r, pytest.TestReport)))


@pytest.fixture
def process_group() -> Iterator[None]:
    """Let this process be a group of one, where what shards weights can be run and traced."""
    environment = dict(os.environ)
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()
    # Trainers write there where processes meet, and would make a group of the next one too.
    os.environ.clear()
    os.environ.update(environment)
