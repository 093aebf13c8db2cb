"""The runs of which each released version has kept checkpoints, and what is seen of them.

Weights stay in [1, 2) and move by some 2⁻¹² of that in a step, so that one rounding more or less
within a formula (with or without a fused multiply-add, in another order of factors) is lost in the
last sum. No share in what is compared is 1/6 or 1/10: such a part of a difference often lies just
halfway between two numbers, where nothing is lost. So it holds bit for bit on any machine and for
any version of torch. With ATEN_CPU_CAPABILITY=default torch goes without fused multiply-adds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import SGD, Adam, Optimizer

from averaging_optim import (
    EMA,
    LAWA,
    SWA,
    T_ADEMA,
    AveragingOptimizer,
    ExponentialRamp,
    Formula,
    HalfLifeFraction,
    Lookahead,
    PolynomialAverage,
    PowerEMA,
    PowerRamp,
    Rule,
    SwitchEMA,
    TFRamp,
)

# Steps after which a run is looked at again, once it went on from its checkpoint.
FURTHER = 3
TWO_RANKS = "two_ranks"
# The options that get and set the state dicts of the two ranks.
NESTED = StateDictOptions()

# Key → a tensor's dtype and numbers, or a count. In a file, text takes less room than a tensor.
Seen = dict[str, str | int]


def inverse_root(n_averaged: int) -> float:
    return float(n_averaged**-0.5)


def momentum(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=2**-12, momentum=0.5)


def coarse_momentum(model: nn.Module) -> Optimizer:
    """Take steps that bfloat16 can tell apart."""
    return SGD(model.parameters(), lr=2**-7, momentum=0.5)


def without_state(model: nn.Module) -> Optimizer:
    return SGD(model.parameters(), lr=2**-12)


def adam(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=2**-12)


def adam_with_maxima(model: nn.Module) -> Optimizer:
    return Adam(model.parameters(), lr=2**-12, amsgrad=True)


def with_a_group_left_out(model: nn.Module) -> Optimizer:
    weight, bias = model.parameters()
    groups: list[dict[str, Any]] = [
        {"params": [weight]},
        {"params": [bias], "average": False, "lr": 2**-11},
    ]
    return SGD(groups, lr=2**-12, momentum=0.5)


def with_a_frozen_bias(model: nn.Module) -> Optimizer:
    _, bias = model.parameters()
    bias.requires_grad_(False)
    return momentum(model)


@dataclass(frozen=True)
class Run:
    """A training run, from how it is made to how many steps it had taken when it was saved.

    names_buffers: whether averaged buffers are given, and saved, by name.
    trains_bias: whether the bias has gradients.
    by_hand: the rule, if any, that is updated by `update_averages` after every third step.
    diverges: whether every fourth step leaves a NaN in a buffer.
    since: the release that made this run possible.
    """

    rule: Rule | Callable[[int], float] | Mapping[str, Rule | Callable[[int], float]]
    inner: Callable[[nn.Module], Optimizer] = momentum
    dtype: torch.dtype = torch.float32
    dtype_of_averages: torch.dtype | None = None
    averages_buffers: bool = False
    names_buffers: bool = False
    trains_bias: bool = True
    by_hand: str | None = None
    diverges: bool = False
    steps: int = 6
    since: str = "0.1.0"

    def begin(self, *, sharded: bool = False) -> tuple[nn.Module, AveragingOptimizer]:
        model = model_of(self.dtype, has_buffers=self.averages_buffers)
        if sharded:
            fully_shard(model)
        buffers = model if self.names_buffers else model.buffers()
        optimizer = AveragingOptimizer(
            self.inner(model),
            self.rule,
            buffers=buffers if self.averages_buffers else (),
            dtype=self.dtype_of_averages,
            skip_nonfinite=self.diverges,
        )
        return model, optimizer

    def train(
        self, model: nn.Module, optimizer: AveragingOptimizer, steps: int, first: int = 0
    ) -> None:
        for step in range(first, first + steps):
            set_gradients(model, step)
            if not self.trains_bias:
                model.get_parameter("bias").grad = None
            if self.averages_buffers:
                set_buffers(model, step, is_finite=not (self.diverges and step % 4 == 3))
            optimizer.step()
            if self.by_hand and step % 3 == 2:
                optimizer.update_averages(self.by_hand)

    def go_on(self, model: nn.Module, optimizer: AveragingOptimizer) -> None:
        self.train(model, optimizer, FURTHER, first=self.steps)


RUNS = {
    "ema": Run(EMA(0.75)),
    "ema_debiased": Run(EMA(0.75, debias=True)),
    "ema_after_power_ramp": Run(EMA(15 / 16, warmup=PowerRamp())),
    "ema_after_tf_ramp": Run(EMA(15 / 16, warmup=TFRamp())),
    "ema_after_swa": Run(EMA(15 / 16, warmup=SWA())),
    "swa": Run(SWA()),
    "t_adema": Run(T_ADEMA(0.9, timescale=10)),
    "polynomial_average": Run(PolynomialAverage(eta=3)),
    "power_ema": Run(PowerEMA.from_width(0.1)),
    "half_life_fraction": Run(HalfLifeFraction(0.1)),
    "lawa": Run(LAWA(k=5)),
    "lookahead": Run(Lookahead(every=3)),
    "switch_ema": Run(SwitchEMA(0.75, every=3)),
    "formula": Run(Formula(inverse_root)),
    "function": Run(inverse_root),
    "several": Run(
        {
            "ema": EMA(0.75, start=2),
            "swa": SWA(start=3, every=2),
            "by_hand": T_ADEMA(0.9, timescale=10, every=None),
            "last": LAWA(k=3, every=2),
            "root": inverse_root,
        },
        by_hand="by_hand",
    ),
    "several_that_write_back": Run({"ahead": Lookahead(every=3), "ema": EMA(0.75)}),
    "over_sgd_without_state": Run(EMA(0.75), inner=without_state),
    "over_adam": Run({"ema": EMA(0.75), "swa": SWA(start=4)}, inner=adam),
    "over_adam_with_maxima": Run(EMA(0.75), inner=adam_with_maxima),
    "buffers": Run({"ema": EMA(0.75), "swa": SWA(every=2)}, averages_buffers=True),
    "buffers_in_snapshots": Run(LAWA(k=3, every=2), averages_buffers=True),
    "buffers_that_switch": Run(SwitchEMA(0.75, every=3), averages_buffers=True),
    "group_left_out": Run(EMA(0.75), inner=with_a_group_left_out),
    "frozen_weight": Run(EMA(0.75), inner=with_a_frozen_bias),
    "weights_in_bfloat16": Run(
        {"ema": EMA(0.75), "ahead": Lookahead(every=3)},
        inner=coarse_momentum,
        dtype=torch.bfloat16,
    ),
    "averages_in_double": Run(SWA(), dtype_of_averages=torch.float64),
    "nonfinite_skipped": Run(EMA(0.75), averages_buffers=True, diverges=True),
    "before_the_first_average": Run(SWA(start=7)),
    "before_the_first_step": Run(EMA(0.75), inner=adam, steps=0),
    "exponential_ramp": Run(ExponentialRamp(0.75, tau=3), since="0.2.0"),
    "buffers_by_name": Run(
        {"ema": EMA(0.75), "swa": SWA(every=2)},
        averages_buffers=True,
        names_buffers=True,
        since="0.2.0",
    ),
    "bias_without_gradient": Run(EMA(0.75), inner=adam, trains_bias=False, since="0.2.0"),
}
SHARDED_RUN = Run({"ema": EMA(0.75), "last": LAWA(k=2, every=3)})


def model_of(dtype: torch.dtype, *, has_buffers: bool) -> nn.Module:
    """Return a model of two weights, with three buffers, of which one counts, or none."""
    model = nn.BatchNorm1d(3, track_running_stats=has_buffers).to(dtype)
    with torch.no_grad():
        model.weight.copy_(1.125 + torch.arange(3) / 8)
        model.bias.copy_(1.5 + torch.arange(3) / 8)
    return model


def set_gradients(model: nn.Module, step: int) -> None:
    for i, weight in enumerate(model.parameters()):
        gradient = ((3 * torch.arange(3) + 5 * step + 7 * i) % 11 - 5).to(weight.dtype)
        if isinstance(weight, DTensor):
            gradient = distribute_tensor(gradient, weight.device_mesh, weight.placements)
        weight.grad = gradient if weight.requires_grad else None


def set_buffers(model: nn.Module, step: int, *, is_finite: bool) -> None:
    moved = (3 * torch.arange(3) + 5 * step) % 11 / 4096
    model.get_buffer("running_mean").copy_(1 + moved)
    model.get_buffer("running_var").copy_(1.5 - moved if is_finite else moved * torch.nan)
    model.get_buffer("num_batches_tracked").fill_(step + 1)


def seen(model: nn.Module, optimizer: AveragingOptimizer) -> Seen:
    """Return what the model holds, outside and inside of each swap, averages and counters."""
    saved = optimizer.state_dict()
    counters = {
        f"param_groups[{i}][{key!r}]": count
        for i, group in enumerate(saved["param_groups"])
        for key, count in group.items()
        if key in ("averaging_steps", "n_skipped") or key.startswith("n_averaged_")
    }
    found: Seen = {**held_by(model, "outside"), **counters}
    first = saved["param_groups"][0]
    for name in [key.removeprefix("n_averaged_") for key in first if key.startswith("n_averaged_")]:
        with optimizer.swap_to_averaged(name):
            found |= held_by(model, f"inside {name}")
        # What stands for an average before its first update is not promised.
        if first[f"n_averaged_{name}"] > 0:
            found |= averages_of(model, saved["state"], f"averaged_{name}")
    return found


def held_by(model: nn.Module, where: str) -> Seen:
    return {f"{key} {where}": shown(value) for key, value in model.state_dict().items()}


def averages_of(model: nn.Module, state: Mapping[int, Mapping[str, Tensor]], key: str) -> Seen:
    # The average of a frozen weight is that weight, whether or not there is a tensor for it.
    return {
        f"state[{i}][{key!r}]": shown(state[i][key])
        for i, weight in enumerate(model.parameters())
        if weight.requires_grad and key in state.get(i, {})
    }


def shown(tensor: Tensor) -> str:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return f"{whole.dtype} {whole.tolist()}"
