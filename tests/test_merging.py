"""Checkpoints of every kind, merged, beside sums formed here in float64."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from processes import in_processes
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.fsdp import fully_shard
from torch.optim import SGD
from training import frozen, loss_of_batch, model_with_batch_norm, same, small_model, train, values
from transformers import GPT2Config, GPT2LMHeadModel

from averaging_optim.__main__ import main
from averaging_optim.post_hoc import AnyCheckpoint, decay_shares, merge

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

SHARES = [0.5, 0.3, 0.2]


def three(dtype: torch.dtype = torch.float32) -> list[dict[str, Tensor]]:
    """Return the weights of one run at three times."""
    model = model_with_batch_norm()
    sgd = SGD(model.parameters(), lr=0.1)
    saved = []
    for i in range(3):
        train(model, sgd, 3, first=3 * i)
        saved.append(
            {
                key: value.clone().to(dtype if value.is_floating_point() else value.dtype)
                for key, value in model.state_dict().items()
            }
        )
    return saved


def summed(saved: list[dict[str, Tensor]], shares: list[float]) -> dict[str, Tensor]:
    """Return sums in float64, in the dtypes of the first; integers of the last."""
    return {
        key: sum(
            (s * each[key].double() for s, each in zip(shares, saved, strict=True)),
            torch.zeros((), dtype=torch.float64),
        ).to(value.dtype)
        if value.is_floating_point()
        else saved[-1][key]
        for key, value in saved[0].items()
    }


def to_torch(weights: dict[str, Tensor], path: Path) -> Path:
    torch.save(weights, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def to_torch_before_1_6(weights: dict[str, Tensor], path: Path) -> Path:
    torch.save(weights, path.with_suffix(".pt"), _use_new_zipfile_serialization=False)
    return path.with_suffix(".pt")


def to_checkpoint_of_more(weights: dict[str, Tensor], path: Path) -> Path:
    torch.save({"step": 3, "optimizer": {"state": {}}, "model": weights}, path.with_suffix(".pt"))
    return path.with_suffix(".pt")


def to_checkpoint_of_lightning(weights: dict[str, Tensor], path: Path) -> Path:
    torch.save({"epoch": 3, "state_dict": weights}, path.with_suffix(".ckpt"))
    return path.with_suffix(".ckpt")


def to_safetensors(weights: dict[str, Tensor], path: Path) -> Path:
    save_file(weights, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


def to_dcp(weights: dict[str, Tensor], path: Path) -> Path:
    save_distributed({"model": weights, "step": 3}, checkpoint_id=path)
    return path


def to_dcp_of_a_model_alone(weights: dict[str, Tensor], path: Path) -> Path:
    save_distributed(weights, checkpoint_id=path)
    return path


def to_dcp_of_a_model_with_a_usual_name(weights: dict[str, Tensor], path: Path) -> Path:
    """As of a language model whose body is its `model`, beside a head."""
    return to_dcp_of_a_model_alone(
        {key if key.startswith("0") else f"model.{key}": value for key, value in weights.items()},
        path,
    )


def to_pretrained_in_torchs_format(weights: dict[str, Tensor], path: Path) -> Path:
    path.mkdir()
    torch.save(weights, path / "pytorch_model.bin")
    return path


def to_shards(weights: dict[str, Tensor], path: Path) -> Path:
    path.mkdir()
    files = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(weights)}
    for file in set(files.values()):
        save_file({key: weights[key] for key in weights if files[key] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    return path


def as_it_is(weights: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    return weights


KINDS: list[Callable[[dict[str, Tensor], Path], Any]] = [
    as_it_is,
    to_torch,
    to_torch_before_1_6,
    to_checkpoint_of_more,
    to_checkpoint_of_lightning,
    to_safetensors,
    to_dcp,
    to_dcp_of_a_model_alone,
    to_shards,
    to_pretrained_in_torchs_format,
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("save", KINDS)
def test_checkpoints_of_every_kind_merge_to_the_sum_in_double_precision(
    save: Callable[[dict[str, Tensor], Path], Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    saved = three(dtype)
    paths = [save(weights, tmp_path / str(i)) for i, weights in enumerate(saved)]
    merged = merge(paths, SHARES)
    assert merged.keys() == saved[0].keys()
    expected = summed(saved, SHARES)
    assert same([merged[key] for key in expected], expected.values())


def test_equal_shares_are_the_mean() -> None:
    saved = three()
    assert frozen(merge(saved)) == frozen(summed(saved, [1 / 3] * 3))


def test_no_tensor_is_left_out_of_a_model_that_has_a_part_of_a_usual_name(tmp_path: Path) -> None:
    saved = three()
    paths = [
        to_dcp_of_a_model_with_a_usual_name(weights, tmp_path / str(i))
        for i, weights in enumerate(saved)
    ]
    assert same(merge(paths, SHARES).values(), summed(saved, SHARES).values())


def test_kinds_of_checkpoints_may_be_mixed_and_are_left_as_they_are(tmp_path: Path) -> None:
    saved = three()
    before = frozen(saved)
    mixed: list[AnyCheckpoint] = [
        saved[0],
        str(to_torch(saved[1], tmp_path / "1")),
        to_dcp(saved[2], tmp_path / "2"),
    ]
    assert frozen(merge(mixed, SHARES)) == frozen(merge(saved, SHARES))
    assert frozen(saved) == before


def test_what_transformers_has_saved_merges_into_what_it_loads(tmp_path: Path) -> None:
    config = GPT2Config(n_layer=1, n_embd=8, n_head=2, n_positions=8, vocab_size=16)
    models = [GPT2LMHeadModel(config) for _ in range(2)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / str(i), max_shard_size="2KB")
    merged = merge([tmp_path / "0", tmp_path / "1"])
    loaded = GPT2LMHeadModel(config)
    assert loaded.load_state_dict(merged, strict=False).unexpected_keys == []
    weights = [[*model.parameters()] for model in models]
    expected = [((a.double() + b.double()) / 2).float() for a, b in zip(*weights, strict=True)]
    assert same(loaded.parameters(), expected)


def save_sharded(folder: Path) -> list[Tensor]:
    model = nn.Linear(6, 5)
    for parameter in model.parameters():
        nn.init.constant_(parameter, 1.0)
    fully_shard(model)
    for number in (1, 2):
        state_dict = {"model": get_model_state_dict(model), "step": number}
        save_distributed(state_dict, checkpoint_id=folder / str(number))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1)
    return []


def test_folders_of_two_processes_merge_to_whole_tensors(tmp_path: Path) -> None:
    in_processes(2, save_sharded, tmp_path)
    merged = merge([tmp_path / "1", tmp_path / "2"], key="model")
    assert frozen(merged) == frozen(
        {"weight": torch.full((5, 6), 1.5), "bias": torch.full((5,), 1.5)}
    )


def test_integers_masks_and_anything_but_tensors_are_those_of_the_last_checkpoint() -> None:
    mask = torch.tensor([0.0, -torch.inf])
    first = {"n": torch.tensor(3), "mask": mask, "w": torch.tensor([1.0]), "_extra_state": "a"}
    last = {"n": torch.tensor(5), "mask": mask, "w": torch.tensor([2.0]), "_extra_state": "b"}
    assert frozen(merge([first, last])) == frozen(
        {"n": torch.tensor(5), "mask": mask, "w": torch.tensor([1.5]), "_extra_state": "b"}
    )


@pytest.mark.parametrize("kind", ["linear", "cosine", "sqrt"])
def test_decay_shares_merge_to_the_weights_of_sgd_at_decayed_rates(kind: str) -> None:
    """θₙ − η ∑ wᵢ gᵢ, of the gradients that there were."""
    n, lr = 7, 0.1
    decays: dict[str, Callable[[Tensor], Tensor]] = {
        "linear": lambda t: 1 - t,
        "cosine": lambda t: (1 + torch.cos(torch.pi * t)) / 2,
        "sqrt": lambda t: 1 - torch.sqrt(t),
    }
    model = small_model(torch.float64)
    sgd = SGD(model.parameters(), lr=lr)
    saved = [{key: value.clone() for key, value in model.state_dict().items()}]
    expected = values(model.parameters())
    for i in range(1, n):
        sgd.zero_grad()
        loss_of_batch(model, i).backward()
        share = decays[kind](torch.tensor(i / n, dtype=torch.float64))
        for total, weight in zip(expected, model.parameters(), strict=True):
            assert weight.grad is not None
            total -= lr * share * weight.grad
        sgd.step()
        saved.append({key: value.clone() for key, value in model.state_dict().items()})
    merged = merge(saved, decay_shares(kind, n))
    # Sums of seven products, in another order.
    torch.testing.assert_close(list(merged.values()), expected, rtol=1e-12, atol=1e-14)


@given(kind=st.sampled_from(["linear", "cosine", "sqrt"]), n=st.integers(1, 200))
def test_decay_shares_are_positive_and_sum_to_1(kind: str, n: int) -> None:
    shares = decay_shares(kind, n)
    assert len(shares) == n
    assert min(shares) > 0
    assert sum(shares) == pytest.approx(1, abs=1e-12)


A = {"w": torch.ones(2)}
REFUSALS: dict[str, tuple[tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "none": (([],), {}, ValueError, r"`checkpoints` must contain at least one, got none\."),
    "text": (("a.pt",), {}, TypeError, r"`checkpoints` must be a sequence of .*, got 'a\.pt'\."),
    "number": (
        ([A, 3],),
        {},
        TypeError,
        r"`checkpoints\[1\]` must be a state dict or a path, got 3",
    ),
    "no_file": ((["no.pt"],), {}, FileNotFoundError, r"`checkpoints\[0\]` must be .*'no\.pt'"),
    "more": (
        ([A, A | {"v": torch.ones(1)}],),
        {},
        ValueError,
        r"`checkpoints\[1\]` must have the same tensors as `checkpoints\[0\]`, got 1 that are in "
        r"`checkpoints\[1\]` only, such as 'v'\.",
    ),
    "fewer": (
        ([A | {"v": torch.ones(1)}, A],),
        {},
        ValueError,
        r"that are in `checkpoints\[0\]` only, such as 'v'",
    ),
    "shape": (
        ([A, {"w": torch.ones(3)}],),
        {},
        ValueError,
        r"`checkpoints\[1\]` must have a floating-point 'w' of shape \(2,\), .*\(3,\)\.",
    ),
    "kind": (([A, {"w": torch.ones(2).long()}],), {}, ValueError, r"got a integer one of shape"),
    "shares_number": (
        ([A, A], [1.0]),
        {},
        ValueError,
        r"must contain 2, one for each checkpoint, got 1\.",
    ),
    "shares_sum": (([A, A], [0.5, 0.6]), {}, ValueError, r"`shares` must sum to 1, got 1\.1"),
    "shares_nan": (([A], [float("nan")]), {}, ValueError, r"`shares\[0\]` must be in .*, got nan"),
    "shares_text": (([A], "1"), {}, TypeError, r"`shares` must be a sequence of numbers, got '1'"),
    "no_weights": (
        ([{"step": 3}],),
        {},
        ValueError,
        r"weights of one model, got 'step'\. Pass",
    ),
    "two_models": (
        ([{"model": A, "net": A}],),
        {},
        ValueError,
        r"`checkpoints\[0\]` must contain the weights of one model, got 'model', 'net'\.",
    ),
    "no_key": (([A],), {"key": "model"}, ValueError, r"`key` must be where .*'w', got 'model'\."),
}


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"), REFUSALS.values(), ids=REFUSALS
)
def test_checkpoints_that_cannot_be_merged_are_refused(
    arguments: tuple[Any, ...], options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        merge(*arguments, **options)


@pytest.mark.parametrize("shown", [True, False], ids=["with_tqdm", "without"])
def test_a_bar_is_shown_on_a_terminal_if_tqdm_is_there(
    shown: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    if not shown:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    merge([A, A])
    assert ("checkpoint/s" in capsys.readouterr().err) == shown


def test_a_file_or_folder_without_weights_is_refused(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "list.pt")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match=r"must contain a state dict, got \[1, 2\]"):
        merge([tmp_path / "list.pt"])
    with pytest.raises(ValueError, match=r"`checkpoints\[0\]` must be a folder of"):
        merge([tmp_path / "folder"])
    (tmp_path / "broken.pt").write_bytes(b"PK\x03\x04")
    with pytest.raises(RuntimeError, match="PytorchStreamReader"):
        merge([tmp_path / "broken.pt"])


def test_a_key_may_have_a_dot_in_it() -> None:
    assert merge([{"a.b": A, "c": 3}], key="a.b")["w"].tolist() == [1, 1]


def test_a_key_chooses_one_of_several_models() -> None:
    saved = [{"net": {"ema": {"w": torch.tensor([i])}, "raw": A}, "model": A} for i in (1.0, 2.0)]
    assert merge(saved, key="net.ema")["w"].item() == 1.5


def test_an_unknown_decay_is_refused() -> None:
    with pytest.raises(
        ValueError, match="`kind` must be one of 'linear', 'cosine', 'sqrt', got 'x'"
    ):
        decay_shares("x", 3)


@pytest.mark.parametrize("n", [2, 8])
def test_memory_is_the_sum_in_double_precision_and_one_tensor_whatever_the_number(
    n: int, tmp_path: Path
) -> None:
    """As the profiler counts it: what is mapped from files is not the allocator's."""
    size, tensors = 250_000, 8
    paths = []
    for i in range(n):
        weights = {str(j): torch.full((size,), float(i)) for j in range(tensors)}
        paths.append(to_torch(weights, tmp_path / str(i)))
    most = now = 0
    with torch.profiler.profile(profile_memory=True) as profile:
        merged = merge(paths)
    for event in sorted(profile.events(), key=lambda each: each.time_range.start):
        if event.name == "[memory]":
            now += event.self_cpu_memory_usage
            most = max(most, now)
    assert merged["0"][0] == (n - 1) / 2
    # Eight bytes a weight, one tensor in double precision, and as much again for its product.
    assert most <= 8 * size * (tensors + 2)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_command_writes_a_file_that_is_whole_and_the_only_one(
    suffix: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(to_torch(weights, tmp_path / str(i))) for i, weights in enumerate(three())]
    out = tmp_path / f"out{suffix}"
    assert main(["merge", str(out), *paths]) == 0
    assert capsys.readouterr().out == f"{out}: the average of 3 checkpoints\n"
    assert frozen(sorted(merge([out]).items())) == frozen(sorted(merge(paths).items()))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["0.pt", "1.pt", "2.pt", out.name]
    assert main(["merge", str(out), *paths]) == 1
    assert "OUT must not exist yet" in capsys.readouterr().err


def test_the_package_is_a_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["averaging_optim", "--help"])
    monkeypatch.delitem(sys.modules, "averaging_optim.__main__")
    with pytest.raises(SystemExit, match="0"):
        runpy.run_module("averaging_optim", run_name="__main__")


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "averaging_optim", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_writes_what_merge_returns_and_never_over_a_file(tmp_path: Path) -> None:
    saved = three()
    paths = [to_torch(weights, tmp_path / str(i)) for i, weights in enumerate(saved)]
    out = tmp_path / "averaged.safetensors"
    done = run("merge", out, *paths, "--shares", "sqrt")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{out}: the average of 3 checkpoints\n"
    expected = merge(saved, decay_shares("sqrt", 3))
    found = load_file(out)
    assert same([found[key] for key in expected], expected.values())

    refused = run("merge", out, *paths)
    assert refused.returncode == 1
    assert refused.stderr == f"error: OUT must not exist yet, got {str(out)!r}. Remove it first.\n"
    assert same(load_file(out).values(), found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shares", "0.5,0.4,0.2"], "error: `shares` must sum to 1"),
        (["--shares", "half"], "error: `kind` must be one of"),
        (["--key", "net"], "error: `key` must be where the weights are"),
    ],
    ids=["sum", "kind", "key"],
)
def test_the_command_says_what_is_wrong_and_leaves_no_file(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [str(to_torch(weights, tmp_path / str(i))) for i, weights in enumerate(three())]
    before = sorted(tmp_path.iterdir())
    assert main(["merge", str(tmp_path / "out.pt"), *paths, *options]) == 1
    assert capsys.readouterr().err.startswith(message)
    assert sorted(tmp_path.iterdir()) == before


def test_safetensors_are_not_written_of_what_they_cannot_hold(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"w": torch.ones(1), "_extra_state": "a"}, tmp_path / "a.pt")
    assert main(["merge", str(tmp_path / "out.safetensors"), str(tmp_path / "a.pt")]) == 1
    assert "can't hold '_extra_state'" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pt"]


def test_the_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        main(["merge", "--help"])
    assert "--shares" in capsys.readouterr().out
