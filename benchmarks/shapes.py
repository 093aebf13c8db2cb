"""Models as averaging sees them: the shapes of their parameters, in order."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

Shape = tuple[int, ...]


def model_of(shapes: Iterable[Shape], dtype: torch.dtype = torch.float32) -> nn.ParameterList:
    """Return random weights of these shapes.

    They are in one flat module, which saves work for peers that walk through modules at updates.
    """
    return nn.ParameterList(nn.Parameter(torch.rand(shape, dtype=dtype)) for shape in shapes)


def size_of(shapes: Iterable[Shape]) -> int:
    """Return the number of weights."""
    return sum(math.prod(shape) for shape in shapes)


def even(weights: int, tensors: int) -> list[Shape]:
    """Return equal shapes that hold about this many weights together."""
    return [(weights // tensors,)] * tensors


def resnet18() -> list[Shape]:
    """Return the 62 parameters of torchvision's ResNet-18: 11,689,512 weights.

    Source: He, Zhang, Ren, Sun: Deep Residual Learning for Image Recognition, CVPR 2016.
    """
    shapes = _convolution(3, 64, 7)
    for before, width in ((64, 64), (64, 128), (128, 256), (256, 512)):
        shapes += _convolution(before, width, 3) + _convolution(width, width, 3)
        shapes += _convolution(before, width, 1) if before != width else []
        shapes += 2 * _convolution(width, width, 3)
    return [*shapes, (1000, 512), (1000,)]


def gpt2() -> list[Shape]:
    """Return the 148 parameters of the smallest GPT-2, its head tied: 124,439,808 weights.

    Source: Radford et al.: Language Models are Unsupervised Multitask Learners, 2019.
    """
    return _transformer(vocabulary=50_257, positions=1024, layers=12)


def half_gpt2() -> list[Shape]:
    """Return half of GPT-2's vocabulary, positions and layers: 62,220,288 weights."""
    return _transformer(vocabulary=25_128, positions=512, layers=6)


def _convolution(before: int, width: int, size: int) -> list[Shape]:
    """Return a convolution and its BatchNorm."""
    return [(width, before, size, size), (width,), (width,)]


def _transformer(vocabulary: int, positions: int, layers: int, width: int = 768) -> list[Shape]:
    norm: list[Shape] = [(width,), (width,)]
    attention = [*_linear(width, 3 * width), *_linear(width, width)]
    feed_forward = [*_linear(width, 4 * width), *_linear(4 * width, width)]
    layer = [*norm, *attention, *norm, *feed_forward]
    return [(vocabulary, width), (positions, width), *(layers * layer), *norm]


def _linear(before: int, width: int) -> list[Shape]:
    return [(before, width), (width,)]
