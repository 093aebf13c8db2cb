"""Ways to damage a checkpoint: what to put where in a nested dict of tensors."""

from __future__ import annotations

import math
import re
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from training import bits

Spot = tuple[Any, Any]


def trace(value: object, depth: int = 0) -> object:
    """Return what compares equal if two values are the same, bit for bit and in order."""
    if isinstance(value, Tensor):
        shape_and_bits = (value.shape, bits(value).numpy().tobytes()) if has_bits(value) else ()
        return type(value), value.dtype, value.layout, value.device, shape_and_bits
    if isinstance(value, int | bytes | None):
        return type(value), value
    if isinstance(value, dict | list | tuple):
        parts = value.items() if isinstance(value, dict) else value
        return type(value), [trace(part, depth + 1) for part in parts if depth < 20]
    # Without addresses, which differ between copies.
    return type(value), re.sub("0x[0-9a-f]+", "", repr(value))


def has_bits(tensor: Tensor) -> bool:
    strided = tensor.layout == torch.strided and not tensor.is_nested
    return strided and not tensor.is_meta and not tensor.is_quantized


def with_attribute(tensor: Tensor, name: str, value: object) -> Tensor:
    """Return the tensor with an attribute, which torch saves and loads with it."""
    setattr(tensor, name, value)
    return tensor


def of_half_bytes(tensor: Tensor) -> Tensor:
    # The dtype is younger than the oldest torch, which has no other that it cannot copy from.
    dtype = getattr(torch, "float4_e2m1fn_x2", torch.bits8)
    return torch.zeros_like(tensor.detach(), dtype=torch.uint8).view(dtype)


def quantized(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they are deprecated, and files hold them
        result: Tensor = torch.quantize_per_tensor(tensor.detach().float(), 0.1, 0, torch.qint8)
    return result


def nested(tensor: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # their interface may change
        return torch.nested.nested_tensor([tensor.detach(), tensor.detach()])


def restrided(tensor: Tensor) -> Tensor:
    """Return the values, if there are several, in memory of another order, with gaps."""
    if tensor.numel() < 2:
        return tensor
    wide = torch.zeros([2 * size for size in reversed(tensor.shape)], dtype=tensor.dtype)
    view = wide.permute(list(reversed(range(wide.dim()))))[(slice(None, None, 2),) * wide.dim()]
    return view.copy_(tensor.detach())


FITTING: dict[str, Callable[[Tensor], Tensor]] = {
    "float16": lambda tensor: tensor.half(),
    "float64": lambda tensor: tensor.double(),
    "float8": lambda tensor: tensor.to(torch.float8_e5m2),
    "nan": lambda tensor: torch.full_like(tensor, math.nan, dtype=torch.float32),
    "infinite": lambda tensor: torch.full_like(tensor, -math.inf, dtype=torch.float32),
    "one_stretched": lambda tensor: tensor.float().reshape(-1)[0].expand(tensor.shape),
    "restrided": lambda tensor: restrided(tensor.float()),
    "parameter": lambda tensor: nn.Parameter(tensor.float()),
    "of_a_graph": lambda tensor: tensor.double().requires_grad_() * 2,
    "annotated": lambda tensor: with_attribute(tensor.float(), "owner", "me"),
    "to_local": lambda tensor: with_attribute(tensor.float(), "to_local", torch.Size),
    "to_an_empty_one": lambda tensor: with_attribute(tensor.float(), "to_local", torch.Tensor),
    "not_floating": lambda tensor: with_attribute(tensor.float(), "is_floating_point", 1),
}
UNFITTING: dict[str, Callable[[Tensor], Any]] = {
    "half_bytes": of_half_bytes,
    "bits": lambda tensor: tensor.detach().to(torch.uint8).view(torch.bits8),
    "complex": lambda tensor: torch.complex(tensor.float(), tensor.float()),
    "batched": lambda tensor: tensor[None],
    "cut": lambda tensor: tensor.reshape(-1)[:-1],
    "empty": lambda tensor: tensor.new_empty(0),
    "sparse": lambda tensor: tensor.to_sparse(),
    "meta": lambda tensor: tensor.to("meta"),
    "nested": nested,
    "quantized": quantized,
    "list": lambda tensor: tensor.float().tolist(),
    "storage": lambda tensor: tensor.untyped_storage(),
    "numpy": lambda tensor: tensor.float().numpy(),
}
ALTERATIONS: dict[str, Callable[[Tensor], Any]] = {
    **FITTING,
    **UNFITTING,
    "int": lambda tensor: tensor.int(),
    "bool": lambda tensor: tensor.bool(),
    "flat": lambda tensor: tensor.reshape(-1),
    "first": lambda tensor: tensor.reshape(-1)[0],
}


def containing_itself() -> list[Any]:
    endless: list[Any] = []
    endless.append(endless)
    return endless


def deep() -> list[Any]:
    """Return lists in lists, more than Python's recursion reaches."""
    inner: list[Any] = []
    for _ in range(2000):
        inner = [inner]
    return inner


VALUES: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "true": lambda: True,
    "minus_one": lambda: -1,
    "zero": lambda: 0,
    "three": lambda: 3,
    "seven": lambda: 7,
    "most": lambda: 2**63 - 1,
    "too_many": lambda: 2**63,
    "huge": lambda: 10**400,
    "unprintable": lambda: -(10**5000),
    "half": lambda: 0.5,
    "float": lambda: 3.0,
    "nan": lambda: math.nan,
    "complex": lambda: 3j,
    "text": lambda: "3",
    "long_text": lambda: "`" * 10_000,
    "bytes": lambda: b"3",
    "list": list,
    "dict": dict,
    "ordered": OrderedDict,
    "tuple": lambda: (0, [1]),
    "set": lambda: {1, 2},
    "endless": containing_itself,
    "deep": deep,
    "dtype": lambda: torch.float32,
    "type": lambda: int,
    "object": object,
    "number": lambda: torch.tensor(3),
    "vector": lambda: torch.ones(3),
    "matrix": lambda: torch.ones(3, 3),
    "entry": lambda: {"step": 1, "averaged_x": 2},
}
KEYS: dict[str, Any] = {
    "long": "averaged_" + 10_000 * "x",
    "unprintable": 10**5000,
    **{
        repr(key): key
        for key in [
            *("", "averaged_", "averaged_ema", "averaged_swa", "averaged_x", "averaged_buffers"),
            *("n_averaged_", "n_averaged_ema", "n_averaged_x", "averaging_steps", "n_skipped"),
            *("state", "param_groups", "params", "average", "lr", "step", "ema", "平均", "0"),
            *(0, 1, 2, 9, -1, 0.5, math.nan, True, None, (), ("ema",), b"averaged_ema", int),
        ]
    },
}


@dataclass(frozen=True)
class Mutation:
    """What is done to a place in a nested dict, with what and with which other place.

    ours: whether the place is one that the wrapper itself reads, so that mutations
        are there more often.
    """

    act: str
    ours: bool
    place: int
    other: int
    value: str
    key: str
    alteration: str

    def apply(self, nested_dict: dict[str, Any]) -> None:
        """Change the dict in place; no effect if it has no such place."""
        spots = [spot for spot in spots_of(nested_dict) if is_ours(spot) or not self.ours]
        if self.act == "alter":
            spots = [(node, key) for node, key in spots if is_unaltered(node[key])]
        if spots:
            ACTS[self.act](self, spots[self.place % len(spots)], spots)


def spots_of(node: Any, depth: int = 0) -> Iterator[Spot]:
    """Yield each container and key by which a part is reached, from outside in."""
    if depth < 6 and isinstance(node, dict | list):
        for key in list(node) if isinstance(node, dict) else range(len(node)):
            yield node, key
            yield from spots_of(node[key], depth + 1)


def is_ours(spot: Spot) -> bool:
    _, key = spot
    return not isinstance(key, str) or key.startswith(("aver", "n_", "param", "state"))


def is_unaltered(value: object) -> bool:
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
    return type(value) is Tensor and value.dtype in dtypes and has_bits(value) and not vars(value)


def replace(mutation: Mutation, spot: Spot, spots: list[Spot]) -> None:
    node, key = spot
    node[key] = VALUES[mutation.value]()


def replace_everywhere(mutation: Mutation, spot: Spot, spots: list[Spot]) -> None:
    for node, key in spots:
        if type(key) is type(spot[1]) and key == spot[1]:
            node[key] = VALUES[mutation.value]()


def alter(mutation: Mutation, spot: Spot, spots: list[Spot]) -> None:
    node, key = spot
    node[key] = ALTERATIONS[mutation.alteration](node[key])


def delete(mutation: Mutation, spot: Spot, spots: list[Spot]) -> None:
    node, key = spot
    del node[key]


def add(mutation: Mutation, spot: Spot, spots: list[Spot]) -> None:
    node, key = spot
    if isinstance(node, dict):
        node[KEYS[mutation.key]] = node[key]
    else:
        node.insert(key, VALUES[mutation.value]())


def rename(mutation: Mutation, spot: Spot, spots: list[Spot]) -> None:
    node, key = spot
    if isinstance(node, dict):
        node[KEYS[mutation.key]] = node.pop(key)


def reorder(mutation: Mutation, spot: Spot, spots: list[Spot]) -> None:
    node, key = spot
    if isinstance(node, dict):
        node[key] = node.pop(key)
    else:
        node.reverse()


def exchange(mutation: Mutation, spot: Spot, spots: list[Spot]) -> None:
    (node, key), (other, other_key) = spot, spots[mutation.other % len(spots)]
    values = node[key], other[other_key]
    # A dict that is put into itself is no longer nested.
    if not any(isinstance(value, dict | list) for value in values):
        other[other_key], node[key] = values


ACTS: dict[str, Callable[[Mutation, Spot, list[Spot]], None]] = {
    act.__name__: act
    for act in (replace, replace_everywhere, alter, delete, add, rename, reorder, exchange)
}
MUTATIONS = st.builds(
    Mutation,
    act=st.sampled_from(list(ACTS)),
    ours=st.booleans(),
    place=st.integers(0, 999),
    other=st.integers(0, 999),
    value=st.sampled_from(list(VALUES)),
    key=st.sampled_from(list(KEYS)),
    alteration=st.sampled_from(list(ALTERATIONS)),
)
