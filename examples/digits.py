"""Does averaging help? Train a small ResNet on digits, with a fifth of the training labels random.

Each run keeps three averages. It tests the training weights and each average after every epoch.
At the end, it saves the run and loads it into a new optimizer. Prints a table and draws a picture.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import statistics
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import matplotlib.pyplot as plt
import torch
from matplotlib.ticker import MaxNLocator
from rich import box
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from averaging_optim import EMA, SWA, T_ADEMA, AveragingOptimizer

CLASSES = 10
RANDOM_LABELS = 0.2
TEST_SIZE = 600
BATCH = 32

Curves = dict[str, list[float]]
Batches = DataLoader[tuple[Tensor, ...]]


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.body(x))


def small_resnet(width: int = 16) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        Block(width),
        nn.Conv2d(width, 2 * width, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(2 * width),
        nn.ReLU(),
        Block(2 * width),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, CLASSES),
    )


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Return the training set, with its random labels, and the test set."""
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target)
    order = torch.randperm(len(labels))
    test, train = order[:TEST_SIZE], order[TEST_SIZE:]
    random = torch.rand(len(train)) < RANDOM_LABELS
    noisy = torch.where(random, torch.randint(CLASSES, (len(train),)), labels[train])
    return TensorDataset(images[train], noisy), TensorDataset(images[test], labels[test])


def with_averages(model: nn.Module, steps: int) -> AveragingOptimizer:
    return AveragingOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
        {
            "EMA": EMA(decay=0.99),
            "SWA": SWA(start=steps // 2),
            "T_ADEMA": T_ADEMA(alpha=0.995, timescale=200),
        },
        buffers=model,
    )


def train_epoch(model: nn.Module, optimizer: AveragingOptimizer, batches: Batches) -> None:
    model.train()
    for images, labels in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()


def evaluate(
    model: nn.Module, optimizer: AveragingOptimizer, train: Batches, test: TensorDataset
) -> dict[str, float]:
    """Return the test accuracy of the training weights and of each average, in percent.

    New BatchNorm statistics help the training weights too, so test them with the old and the new.
    Before an average's first update, its accuracy is NaN.
    """
    copied = copy.deepcopy(model)
    found = {"training weights": accuracy(copied, test)}
    update_bn(train, copied)
    found["training weights, BatchNorm re-estimated"] = accuracy(copied, test)
    for name in optimizer.rules:
        with optimizer.swap_to_averaged(name):
            update_bn(train, model)
            started = optimizer.n_averaged(name) > 0
            found[name] = accuracy(model, test) if started else math.nan
    return found


@torch.no_grad()
def accuracy(model: nn.Module, test: TensorDataset) -> float:
    images, labels = test.tensors
    model.eval()
    hits: Tensor = model(images).argmax(1) == labels
    return 100 * hits.float().mean().item()


def save_safely(checkpoint: dict[str, Any], path: Path) -> None:
    """Save so that `path` never holds part of a checkpoint, even if the process is killed."""
    temporary = f"{path}.tmp"  # in the same folder: replacing is atomic only within a file system
    with open(temporary, "wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())  # without it, a power failure may leave an empty file
    os.replace(temporary, path)


def check_resume(model: nn.Module, optimizer: AveragingOptimizer, steps: int) -> None:
    """Save, load into a new model and optimizer, and raise an error if an average differs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "checkpoint.pt"
        save_safely({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, path)
        checkpoint = torch.load(path, weights_only=True)
    resumed_model = small_resnet()
    resumed = with_averages(resumed_model, steps)
    resumed_model.load_state_dict(checkpoint["model"])
    resumed.load_state_dict(checkpoint["optimizer"])
    for name in optimizer.rules:
        before = optimizer.averaged_state_dict(model, name)
        after = resumed.averaged_state_dict(resumed_model, name)
        if not all(torch.equal(before[key], after[key]) for key in before):
            raise RuntimeError(f"The {name} average changed when the run was saved and loaded.")


def run(seed: int, epochs: int, progress: tqdm[NoReturn]) -> Curves:
    """Train once, and return the test accuracy after each epoch."""
    torch.manual_seed(seed)
    train, test = digits()
    batches = DataLoader(train, batch_size=32, shuffle=True)
    steps = epochs * len(batches)
    model = small_resnet()
    optimizer = with_averages(model, steps)
    curves: Curves = {}
    for _ in range(epochs):
        train_epoch(model, optimizer, batches)
        for name, percent in evaluate(model, optimizer, batches, test).items():
            curves.setdefault(name, []).append(percent)
        progress.update()
    check_resume(model, optimizer, steps)
    return curves


def table(runs: list[Curves]) -> Table:
    result = Table("weights", "test accuracy", box=box.MARKDOWN)
    for name in runs[0]:
        last = [curves[name][-1] for curves in runs]
        spread = statistics.stdev(last) if len(last) > 1 else 0.0
        result.add_row(name, f"{statistics.mean(last):.1f} ± {spread:.1f} %")
    return result


def draw(runs: list[Curves], path: Path) -> None:
    """Draw the mean over the seeds, and the range from lowest to highest."""
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in runs[0]:
        by_epoch = torch.tensor([curves[name] for curves in runs])
        epochs = range(1, by_epoch.shape[1] + 1)
        axes.fill_between(epochs, by_epoch.amin(0), by_epoch.amax(0), alpha=0.15)
        axes.plot(epochs, by_epoch.mean(0), label=name)
    axes.set(
        title=f"Digits, {RANDOM_LABELS:.0%} random training labels, {len(runs)} seeds",
        xlabel="epoch",
        ylabel="test accuracy (%)",
        ylim=(70, 100),
    )
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="number of runs (default: 5)")
    parser.add_argument("--epochs", type=int, default=16, help="epochs per run (default: 16)")
    parser.add_argument("--picture", type=Path, default=Path("digits.png"), help="where to draw")
    arguments = parser.parse_args()
    for name in ("seeds", "epochs"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    # On a busy machine, the threads of a small model mostly wait for each other.
    torch.set_num_threads(1)
    console = Console()
    console.print(
        f"Training {arguments.seeds} small ResNets for {arguments.epochs} epochs each, on one core."
    )
    with tqdm(total=arguments.seeds * arguments.epochs, unit="epoch") as progress:
        runs = [run(seed, arguments.epochs, progress) for seed in range(arguments.seeds)]
    draw(runs, arguments.picture)
    console.print(table(runs))
    console.print(
        f"Mean ± standard deviation over {len(runs)} seeds after {arguments.epochs} epochs. "
        "Every average is identical after saving and loading. "
        f"Picture: {arguments.picture}"
    )


if __name__ == "__main__":
    main()
