"""Interrupts that come at any time, by a real timer.

They may come while coverage is measured, too, and leave its lock locked: run it without.
"""

from __future__ import annotations

import signal
from random import Random

import pytest
import torch
from torch import nn
from torch.optim import SGD
from training import in_place, same

from averaging_optim import EMA, AveragingOptimizer


@in_place
def test_interrupts_at_random_times_leave_no_average_in_the_model(in_place: bool) -> None:
    weights = [nn.Parameter(torch.zeros(1000)) for _ in range(10)]
    optimizer = AveragingOptimizer(SGD(weights, lr=0.1), EMA(0.5))
    optimizer.update_averages()
    expected = [torch.full((1000,), 3.0)] * 10
    for weight in weights:
        weight.data.fill_(3.0)
    former = signal.signal(signal.SIGALRM, signal.default_int_handler)
    random = Random(0)
    try:
        for _ in range(300):
            with pytest.raises(KeyboardInterrupt):  # noqa: PT012  # at any of its instructions
                signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 2e-3))
                while True:
                    with optimizer.swap_to_averaged(in_place=in_place):
                        pass
            assert same(weights, expected)
            assert signal.getsignal(signal.SIGALRM) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGALRM, former)
