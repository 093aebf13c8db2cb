"""Does averaging help if there is nothing to learn? ResNet-18, random images, random labels.

For each seed, train at 224 × 224 pixels for five epochs, and test the training weights and three
averages of the same run on 100 images. Prints the results, and how likely they are by chance.

`make random-labels` writes random_labels.txt. It uses one thread and takes up to an hour.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from tqdm import tqdm

from averaging_optim import EMA, SWA, T_ADEMA, AveragingOptimizer

CLASSES = 2
TEST_SIZE = 100
BATCH = 16
REPORTED = {"weights": 46, "SWA": 54, "EMA": 58, "T_ADEMA": 58}  # percent, in one run elsewhere


class Block(nn.Module):
    """Two convolutions and a way around them."""

    def __init__(self, channels_in: int, channels: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels_in, channels, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )
        self.around = nn.Sequential()
        if stride > 1:
            self.around.append(nn.Conv2d(channels_in, channels, 1, stride, bias=False))
            self.around.append(nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.around(x) + self.body(x))


def resnet18() -> nn.Sequential:
    """ResNet-18 as in He, Zhang, Ren, Sun: Deep Residual Learning, CVPR 2016, arXiv 1512.03385."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        *(Block(64, 64, stride=1), Block(64, 64, stride=1)),
        *(Block(64, 128, stride=2), Block(128, 128, stride=1)),
        *(Block(128, 256, stride=2), Block(256, 256, stride=1)),
        *(Block(256, 512, stride=2), Block(512, 512, stride=1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(512, CLASSES),
    )
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return model


def random_images(count: int, pixels: int) -> TensorDataset:
    """Return images of noise, each with the toss of a coin as its label."""
    return TensorDataset(torch.randn(count, 3, pixels, pixels), torch.randint(CLASSES, (count,)))


@dataclass(frozen=True)
class Found:
    """The result of one seed: the test labels, and by name, which of them the weights get right.

    There are two classes, so two sets of weights disagree exactly where one of them is right.
    """

    labels: Tensor
    right: dict[str, Tensor]
    training_percent: float

    def hits(self, name: str) -> int:
        return int(self.right[name].sum())

    def called_one(self, name: str) -> int:
        return int((self.right[name] == self.labels.bool()).sum())

    def disagreements(self, name: str, other: str) -> int:
        return int((self.right[name] != self.right[other]).sum())


def run(seed: int, epochs: int, images: int, pixels: int, progress: tqdm[NoReturn]) -> Found:
    """Train once with three averages. Test the training weights and each average."""
    torch.manual_seed(seed)
    train, test = random_images(images, pixels), random_images(TEST_SIZE, pixels)
    batches = DataLoader(train, batch_size=BATCH, shuffle=True, drop_last=True)
    model = resnet18()
    optimizer = AveragingOptimizer(
        torch.optim.Adam(model.parameters(), lr=1e-3),
        {
            "SWA": SWA(start=epochs * len(batches) // 2),
            "EMA": EMA(decay=0.9),
            "T_ADEMA": T_ADEMA(alpha=0.9),
        },
        buffers=model,
    )
    for _ in range(epochs):
        model.train()
        for batch, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(batch), labels).backward()
            optimizer.step()
        progress.update()
    right = optimizer.evaluate_averages(lambda: which_are_right(model, test))
    training_percent = 100 * which_are_right(model, train).float().mean().item()
    return Found(test.tensors[1], right, training_percent)


@torch.no_grad()
def which_are_right(model: nn.Module, data: TensorDataset) -> Tensor:
    model.eval()
    batches = DataLoader(data, batch_size=BATCH)
    return torch.cat([model(images).argmax(1) == labels for images, labels in batches])


def table(found: list[Found]) -> Table:
    result = Table("seed", *REPORTED, "training images", box=box.MARKDOWN)
    by_seed = [
        [*(float(each.hits(name)) for name in REPORTED), each.training_percent] for each in found
    ]
    for seed, row in enumerate(by_seed):
        result.add_row(str(seed), *(f"{percent:.0f} %" for percent in row))
    columns = list(zip(*by_seed, strict=True))
    result.add_row("mean", *(f"{statistics.mean(column):.1f} %" for column in columns))
    if len(found) > 1:
        result.add_row("standard error", *(f"{standard_error(column):.1f} %" for column in columns))
    totals = [sum(each.hits(name) for each in found) for name in REPORTED]
    coins = TEST_SIZE * len(found)
    likely = [f"{tail(coins, abs(total - coins / 2)):.3f}" for total in totals]
    result.add_row("as far by chance", *likely, "")
    return result


def calls(found: list[Found]) -> Table:
    """Return how often the weights say class 1. If always or never, they ignore the image."""
    result = Table("seed", "labels", *REPORTED, box=box.MARKDOWN)
    for seed, each in enumerate(found):
        ones = [int(each.labels.sum()), *(each.called_one(name) for name in REPORTED)]
        result.add_row(str(seed), *map(str, ones))
    return result


def standard_error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def spreads(found: list[Found]) -> Iterator[str]:
    """Say how far results spread by chance, and on how many images the weights disagree."""
    one, mean = math.sqrt(TEST_SIZE) / 2, math.sqrt(TEST_SIZE / len(found)) / 2
    weights, t_adema = (mean_disagreements(found, "EMA", other) for other in ("weights", "T_ADEMA"))
    yield "Labels are coins: whatever a model has learned, expect it to be right on half"
    yield f"of them, ± {one:.1f} % (standard deviation) for a seed, ± {mean:.1f} % for the mean."
    yield "The last row is the probability that coins are as far from 50 % as the mean is."
    yield f"EMA disagrees with the weights on {weights:.1f} images, with T_ADEMA on {t_adema:.1f}."


def likelihoods(found: list[Found]) -> Iterator[str]:
    """Say how likely results like the reported ones are.

    The hits of any weights are heads among TEST_SIZE coins. Where two sets of weights disagree,
    one of them is right, and a coin decides which. With g hits more than the other, one set has
    g / 2 heads more than half of these coins.
    """
    for percent in sorted(set(REPORTED.values())):
        names = ", ".join(name for name, each in REPORTED.items() if each == percent)
        likely = tail(TEST_SIZE, abs(percent - 50))
        yield f"{percent} % ({names}) or as far from 50 %: {likely:.2f}"
    gain = max(REPORTED.values()) - REPORTED["weights"]
    here = round(mean_disagreements(found, "EMA", "weights"))
    for images in sorted({20, 40, 60, here}):
        yield f"{gain} % apart, if they disagree on {images} images: {tail(images, gain / 2):.2f}"


def mean_disagreements(found: list[Found], name: str, other: str) -> float:
    return statistics.mean(each.disagreements(name, other) for each in found)


def tail(coins: int, distance: float) -> float:
    """Return the probability that the heads are at least this far from half of the coins."""
    far = [heads for heads in range(coins + 1) if abs(heads - coins / 2) >= distance]
    return float(sum(math.comb(coins, heads) for heads in far) / 2**coins)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=20, help="number of runs (default: 20)")
    parser.add_argument("--epochs", type=int, default=5, help="epochs per run (default: 5)")
    parser.add_argument("--images", type=int, default=128, help="training images (default: 128)")
    parser.add_argument("--pixels", type=int, default=224, help="pixels per side (default: 224)")
    arguments = parser.parse_args()
    for name, least in {"seeds": 1, "epochs": 1, "images": BATCH, "pixels": 1}.items():
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    seeds, epochs = arguments.seeds, arguments.epochs
    images, pixels = arguments.images, arguments.pixels
    with tqdm(total=seeds * epochs, unit="epoch") as progress:
        found = [run(seed, epochs, images, pixels, progress) for seed in range(seeds)]
    console = Console(highlight=False)
    console.print(
        f"ResNet-18, {images} images of {pixels} × {pixels} pixels of noise with random labels, "
        f"{epochs} epochs\nof {images // BATCH} steps. "
        f"Accuracy on {TEST_SIZE} test images of that kind, and on training images:"
    )
    console.print(table(found), *spreads(found), sep="\n")
    console.print("\nNumber of test images with label 1, and of those classified as 1:")
    console.print(calls(found))
    console.print("\nReported elsewhere for one run, and how likely it is by chance:")
    console.print(*likelihoods(found), sep="\n")


if __name__ == "__main__":
    main()
