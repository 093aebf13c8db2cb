"""Is averaging on a CPU as fast as memory? Race it against the limit and against other libraries.

Prints a table with the target of each row. Without `--case`, it also writes the table and the
machine it ran on to results.md, and draws results.png.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from peers import DECAY, EMA_PEERS, checked, from_timm, from_torch_swa, ours
from race import Quartiles, Race, race
from report import Cost, Row, show, terminal, write
from shapes import Shape, even, gpt2, half_gpt2, model_of, resnet18, size_of
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from tqdm import tqdm

from averaging_optim import EMA, SWA, AveragingOptimizer, Rule

OURS = "ours"
LIMIT = "flat lerp_"
TENSORS = (10, 100, 1_000, 10_000)


def flat_lerp(weights: int) -> Callable[[], object]:
    """Return one `lerp_` over all weights. It moves 12 bytes per weight, as little as can be."""
    average, weight = torch.rand(weights), torch.rand(weights)
    return lambda: average.lerp_(weight, 1 - DECAY)


def resnet18_ema(rounds: int) -> list[Row]:
    targets = {LIMIT: 1.10, **dict.fromkeys(EMA_PEERS, 1.00)}
    return _against_peers("ResNet-18, EMA", resnet18(), targets, rounds)


def gpt2_ema(rounds: int) -> list[Row]:
    """Every peer gets the target for the best one."""
    targets = {LIMIT: 1.10, **dict.fromkeys(EMA_PEERS, 1.05)}
    return _against_peers("GPT-2, EMA", gpt2(), targets, rounds)


def many_tensors(rounds: int) -> list[Row]:
    targets = {"timm": 0.50, "torch AveragedModel": 0.40}
    shapes = even(weights=1_024_000, tensors=1_000)
    return _against_peers("1,000 tensors of 1,024, EMA", shapes, targets, rounds)


def resnet18_swa(rounds: int) -> list[Row]:
    model = model_of(resnet18())
    peer = "torch AveragedModel"
    updates = checked(model, {OURS: ours(model, SWA()), peer: from_torch_swa(model)}, share=1 / 2)
    return _rows("ResNet-18, SWA", race(updates, rounds), {peer: 0.20})


def three_averages(rounds: int) -> list[Row]:
    model = model_of(half_gpt2())
    three: dict[str, Rule] = {"first": EMA(DECAY), "second": EMA(0.99), "third": EMA(0.9)}
    candidates = {OURS: ours(model, three), "one average": ours(model, EMA(DECAY))}
    updates = checked(model, candidates, 1 - DECAY)
    return _rows("half GPT-2, three EMAs", race(updates, rounds), {"one average": 2.7})


def bfloat16_weights(rounds: int) -> list[Row]:
    """An update moves at least 10 bytes per weight: it reads 2 + 4 and writes 4.

    A float32 `lerp_` moves 12, so over 10/12 of the weights it moves as many bytes. It also reads
    more than it writes, and writes where it has read.
    """
    model = model_of(half_gpt2(), torch.bfloat16)
    peer = "timm, dtype=float32"
    candidates = {OURS: ours(model, EMA(DECAY)), peer: from_timm(model, torch.float32)}
    ten_bytes = {"10 bytes a weight": flat_lerp(size_of(half_gpt2()) * 10 // 12)}
    result = race({**checked(model, candidates, 1 - DECAY), **ten_bytes}, rounds)
    return _rows("half GPT-2 in bfloat16, float32 EMA", result, {"10 bytes a weight": 2.6})


def float64_averages(rounds: int) -> list[Row]:
    model = model_of(resnet18())
    candidates = {
        OURS: ours(model, EMA(DECAY), torch.float64),
        "float32 averages": ours(model, EMA(DECAY)),
    }
    updates = checked(model, candidates, 1 - DECAY)
    return _rows("ResNet-18, float64 EMA", race(updates, rounds), {})


def swap(rounds: int) -> list[Row]:
    """Swap in and out, against the copies of all weights that this needs."""
    model = model_of(half_gpt2())
    optimizer = _with_average(model)
    weights = list[Tensor](model.parameters())
    averages = list[Tensor](optimizer.averaged_model(model).parameters())
    first, second = torch.rand(2, size_of(half_gpt2()))
    by_hand, flat = "three copies, one into fresh memory", "four flat copies"
    calls: dict[str, Callable[[], object]] = {
        OURS: lambda: _swap(optimizer),
        by_hand: lambda: _copy_through_a_backup(weights, averages),
    }
    in_place: dict[str, Callable[[], object]] = {
        OURS: lambda: _swap(optimizer, in_place=True),
        flat: lambda: _copy_to_and_fro(first, second),
    }
    rows = _rows("half GPT-2, swap in and out", race(calls, rounds), {by_hand: 1.25})
    rows += _rows("half GPT-2, swap in place", race(in_place, rounds), {flat: 1.15})
    mebibytes = _allocated(in_place[OURS]) / 2**20
    rows.append(Row(rows[-1].case, "memory", "", Quartiles(*3 * [mebibytes]), 16, " MiB"))
    small = _with_average(nn.Linear(1, 1))
    milliseconds = [1e3 * each for each in race({OURS: lambda: _swap(small)}, rounds).seconds[OURS]]
    return [*rows, Row("2 weights, swap", "time", "", Quartiles.of(milliseconds), 0.1, " ms")]


def adamw_step(rounds: int) -> list[Row]:
    calls = {OURS: _adamw(averaged=True), "AdamW alone": _adamw(averaged=False)}
    return _rows("ResNet-18, AdamW with EMA", race(calls, rounds), {"AdamW alone": 1.15})


def training(rounds: int) -> list[Row]:
    calls = {OURS: _training(averaged=True), "AdamW alone": _training(averaged=False)}
    return _rows("training a transformer with EMA", race(calls, rounds), {"AdamW alone": 1.03})


CASES: dict[str, Callable[[int], list[Row]]] = {
    "resnet18": resnet18_ema,
    "gpt2": gpt2_ema,
    "swa": resnet18_swa,
    "many": many_tensors,
    "three": three_averages,
    "bfloat16": bfloat16_weights,
    "swap": swap,
    "adamw": adamw_step,
    "training": training,
    "float64": float64_averages,
}
COST = "cost"


def cost(rounds: int, weights: int, tensors: int) -> Cost:
    """Measure one model size, and its limit."""
    model = model_of(even(weights, tensors))
    calls = {OURS: ours(model, EMA(DECAY)).update, LIMIT: flat_lerp(weights)}
    result = race(calls, rounds)
    return Cost(weights, tensors, result.median(OURS), result.median(LIMIT))


def _against_peers(
    case: str, shapes: list[Shape], targets: Mapping[str, float], rounds: int
) -> list[Row]:
    model = model_of(shapes)
    peers = {name: peer(model) for name, peer in EMA_PEERS.items()}
    updates = checked(model, {OURS: ours(model, EMA(DECAY)), **peers}, 1 - DECAY)
    result = race({LIMIT: flat_lerp(size_of(shapes)), **updates}, rounds)
    return _rows(case, result, targets)


def _rows(case: str, result: Race, targets: Mapping[str, float]) -> list[Row]:
    """Compare our time with each of the others."""
    return [
        Row(
            case,
            _timed(result, OURS),
            _timed(result, reference),
            result.ratio(OURS, reference),
            targets.get(reference),
        )
        for reference in result.seconds
        if reference != OURS
    ]


def _timed(result: Race, name: str) -> str:
    return f"{name} {1e3 * result.median(name):,.2f} ms"


def _with_average(model: nn.Module) -> AveragingOptimizer:
    optimizer = AveragingOptimizer(SGD(model.parameters()), EMA(DECAY))
    optimizer.update_averages()
    return optimizer


def _swap(optimizer: AveragingOptimizer, in_place: bool = False) -> None:
    with optimizer.swap_to_averaged(in_place=in_place):
        pass


@torch.no_grad()
def _copy_through_a_backup(weights: list[Tensor], averages: list[Tensor]) -> None:
    backup = [weight.detach().clone() for weight in weights]
    torch._foreach_copy_(weights, averages)
    torch._foreach_copy_(weights, backup)


def _copy_to_and_fro(first: Tensor, second: Tensor) -> None:
    for _ in range(2):
        first.copy_(second)
        second.copy_(first)


def _allocated(call: Callable[[], object]) -> int:
    """Return how many bytes a call allocates, whether or not it frees some."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    return sum(max(0, event.self_cpu_memory_usage) for event in profile.events() or ())


def _adamw(averaged: bool) -> Callable[[], object]:
    """Return a step that always has the same gradients."""
    model = model_of(resnet18())
    for weight in model.parameters():
        weight.grad = torch.rand_like(weight)
    adamw = AdamW(model.parameters(), foreach=True)
    return AveragingOptimizer(adamw, EMA(DECAY)).step if averaged else adamw.step


def _training(averaged: bool) -> Callable[[], object]:
    """Return a training step of 3.4 million weights, always on the same 1,024 tokens."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    model = nn.Sequential(
        nn.Embedding(512, 256), nn.TransformerEncoder(layer, 4), nn.Linear(256, 512)
    )
    tokens = torch.randint(512, (16, 65))
    adamw = AdamW(model.parameters(), lr=1e-4)
    optimizer = AveragingOptimizer(adamw, EMA(DECAY)) if averaged else adamw

    def step() -> None:
        optimizer.zero_grad()
        logits = model(tokens[:, :-1])
        nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()

    return step


def _run(names: list[str], rounds: int) -> list[Row]:
    rows = []
    for name in tqdm([name for name in names if name in CASES], unit="case"):
        rows += CASES[name](rounds)
        gc.collect()
    return rows


def _costs(rounds: int, largest: int) -> list[Cost]:
    sizes = [10**power for power in range(4, 10) if 10**power <= largest]
    models = [(weights, tensors) for weights in sizes for tensors in TENSORS]
    return [cost(rounds, weights, tensors) for weights, tensors in tqdm(models, unit="model")]


def main() -> None:
    names = [*CASES, COST]
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", action="append", choices=names, help="what to run (default: all)")
    parser.add_argument("--rounds", type=int, default=100, help="rounds per race (default: 100)")
    parser.add_argument(
        "--largest",
        type=float,
        default=1e8,
        help=f"most weights for {COST} (default: 1e8; 1e9 needs 16 GiB)",
    )
    parser.add_argument("--threads", type=int, help="torch's threads (default: torch chooses)")
    parser.add_argument("--folder", type=Path, default=Path(__file__).parent, help="for results")
    arguments = parser.parse_args()
    if arguments.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {arguments.rounds}")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    chosen = arguments.case or names
    rows = _run(chosen, arguments.rounds)
    costs = _costs(arguments.rounds, int(arguments.largest)) if COST in chosen else []
    show(rows, costs, terminal())
    if arguments.case is None:
        write(rows, costs, arguments.rounds, arguments.folder)


if __name__ == "__main__":
    main()
