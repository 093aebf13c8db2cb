"""A model's weights wherever they were saved, read one tensor at a time."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from averaging_optim._averages.moving import numeric_kind
from averaging_optim._checks import checked_mapping, short_list, short_repr

AnyWeights = Mapping[str, Any] | str | os.PathLike[str]

# Where programs keep a model's state dict in a checkpoint of more than that.
_USUAL_KEYS = ("model", "state_dict", "model_state_dict", "module", "net", "weights", "params")

# What `save_pretrained` of transformers, diffusers and peft writes, and Accelerate's `save_model`.
_PRETRAINED = ("model", "diffusion_pytorch_model", "adapter_model", "pytorch_model")


@dataclass(frozen=True)
class SavedWeights:
    """The weights of a model in a checkpoint.

    label: how errors name the checkpoint.
    tensors: name → shape and kind of number.
    others: name → what is saved that is no tensor.
    read: name → tensor.
    """

    label: str
    tensors: dict[str, tuple[tuple[int, ...], str]]
    others: dict[str, Any]
    read: Callable[[str], Tensor]


def open_weights(label: str, checkpoint: AnyWeights, key: str | None) -> SavedWeights:
    """Look into a state dict, a file of torch or safetensors, or a folder of either or of DCP.

    Args:
        key: where the weights are in it, such as "model"; None looks in the usual places.

    Raises:
        ValueError: there are no weights, or several and no key.
        FileNotFoundError: there is no such file.
    """
    if isinstance(checkpoint, Mapping):
        return _of_state_dict(label, checkpoint, key)
    path = Path(checkpoint)
    if not path.exists():
        raise FileNotFoundError(f"`{label}` must be a file or a folder, got {str(path)!r}.")
    if path.is_dir():
        return _of_folder(label, path, key)
    if path.suffix == ".safetensors":
        return _of_safetensors(label, path)
    return _of_state_dict(label, _loaded(path), key)


def _of_state_dict(label: str, state_dict: Mapping[str, Any], key: str | None) -> SavedWeights:
    found = _found(label, state_dict, key)
    tensors = {name: each for name, each in found.items() if isinstance(each, Tensor)}
    return SavedWeights(
        label,
        {name: (tuple(each.shape), numeric_kind(each)) for name, each in tensors.items()},
        {name: each for name, each in found.items() if name not in tensors},
        tensors.__getitem__,
    )


def _found(label: str, state_dict: Mapping[str, Any], key: str | None) -> Mapping[str, Any]:
    if key is not None:
        found: Any = state_dict.get(key)
        if found is None:
            found = state_dict
            for part in key.split("."):
                found = found.get(part) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping) or not _holds_tensors(found):
            raise ValueError(
                f"`key` must be where the weights are in `{label}`, which contains "
                f"{short_list(list(map(str, state_dict)))}, got {key!r}."
            )
        return found
    if _holds_tensors(state_dict):
        return state_dict
    usual = [
        each
        for each in _USUAL_KEYS
        if isinstance(state_dict.get(each), Mapping) and _holds_tensors(state_dict[each])
    ]
    if len(usual) != 1:
        names = usual or list(map(str, state_dict))
        raise ValueError(
            f"`{label}` must contain the weights of one model, got {short_list(names)}. Pass "
            "the right one as `key`."
        )
    return checked_mapping(label, state_dict[usual[0]])


def _holds_tensors(mapping: Mapping[str, Any]) -> bool:
    return any(isinstance(each, Tensor) for each in mapping.values())


def _of_folder(label: str, path: Path, key: str | None) -> SavedWeights:
    if (path / ".metadata").exists():
        return _of_dcp(label, path, key)
    for name in _PRETRAINED:
        for suffix in (".safetensors", ".bin"):
            if (file := path / f"{name}{suffix}").exists():
                return open_weights(label, file, None)
            if (index := path / f"{name}{suffix}.index.json").exists():
                return _of_shards(label, path, json.loads(index.read_text())["weight_map"])
    raise ValueError(
        f"`{label}` must be a folder of torch.distributed.checkpoint or of `save_pretrained`, got "
        f"{str(path)!r}."
    )


def _of_shards(label: str, path: Path, files: Mapping[str, str]) -> SavedWeights:
    """Return weights that lie in several files, by an index of name → file."""
    shards = {file: open_weights(label, path / file, None) for file in sorted(set(files.values()))}
    return SavedWeights(
        label,
        {name: shards[file].tensors[name] for name, file in files.items()},
        {},
        lambda name: shards[files[name]].read(name),
    )


def _of_safetensors(label: str, path: Path) -> SavedWeights:
    from safetensors import safe_open  # only who has such files needs the package

    file: Any = safe_open(path, framework="pt")
    tensors = {}
    for name in file.keys():  # noqa: SIM118, as it is no mapping
        part = file.get_slice(name)
        dtype = part.get_dtype()
        kind = "complex" if dtype.startswith("C") else "integer"
        kind = "floating-point" if dtype.startswith(("F", "BF")) else kind
        tensors[name] = (tuple(part.get_shape()), kind)
    return SavedWeights(label, tensors, {}, file.get_tensor)


def _of_dcp(label: str, path: Path, key: str | None) -> SavedWeights:
    # Imported here, as it takes half a second.
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    metadata = FileSystemReader(path).read_metadata()
    entries = metadata.state_dict_metadata
    # Flat name → keys of the nested dict that was saved.
    paths = metadata.planner_data or {name: (name,) for name in entries}
    nested: dict[Any, Any] = {}
    names: dict[int, str] = {}
    for name, entry in entries.items():
        if isinstance(entry, TensorStorageMetadata):
            *outer, last = paths[name]
            inner = functools.reduce(lambda each, part: each.setdefault(part, {}), outer, nested)
            inner[last] = torch.empty(entry.size, dtype=entry.properties.dtype, device="meta")
            names[id(inner[last])] = name
    saved = _of_state_dict(label, nested, key)

    def read(name: str) -> Tensor:
        without_values = saved.read(name)
        target = torch.empty_like(without_values, device="cpu")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as is meant
            load({names[id(without_values)]: target}, checkpoint_id=path)
        return target

    return replace(saved, read=read)


def _loaded(path: Path) -> Mapping[str, Any]:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap can only be used" not in str(error):
            raise
        # The format of torch before 1.6.
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{str(path)!r} must contain a state dict, got {short_repr(loaded)}.")
    return loaded
