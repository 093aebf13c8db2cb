"""Training over several processes: what each rank averages, swaps and saves is its own part.

All ranks see the same batches, so that the mean gradient of two is that of one process, exactly.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypedDict

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from sharding import trains_with_fsdp, whole, whole_averages
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, Adam
from torch.testing._internal.distributed.fake_pg import FakeStore
from training import (
    assert_same_steps,
    averaging_sgd,
    frozen,
    gradients_of,
    loss_of_batch,
    model_with_batch_norm,
    recurrence,
    same,
    small_model,
    train,
    values,
    weights_of,
)

from averaging_optim import EMA, LAWA, SWA, T_ADEMA, AveragingOptimizer, Lookahead, Rule

WHOLE = StateDictOptions(full_state_dict=True)
RULES: dict[str, Rule] = {
    "ema": EMA(0.5),
    "swa": SWA(start=2),
    "t_adema": T_ADEMA(0.9, 5),
    "lawa": LAWA(k=3),
}


class Life(TypedDict):
    """What one process saw of a training run; whole tensors, also where they are sharded."""

    snapshots: list[list[Tensor]]
    averages: dict[str, list[Tensor]]
    inside: dict[str, list[Tensor]]
    losses: dict[str, Tensor]
    after: list[Tensor]
    counters: dict[str, int]


def live(model: nn.Module, optimizer: AveragingOptimizer, steps: int = 6, first: int = 0) -> Life:
    """Train, look at every average, and train one step more."""
    snapshots = [whole(step) for step in train(model, optimizer, steps, first)]
    with torch.no_grad():
        losses = {"before": loss_of_batch(model, 0)}
    inside = {}
    for name in optimizer.rules:
        with torch.no_grad(), optimizer.swap_to_averaged(name):
            inside[name] = whole(weights_of(optimizer))
            losses[name] = loss_of_batch(model, 0)
    with torch.no_grad():
        losses["after"] = loss_of_batch(model, 0)
    averages = whole_averages(optimizer)
    (after,) = train(model, optimizer, 1, first=first + steps)
    return Life(
        snapshots=snapshots,
        averages=averages,
        inside=inside,
        losses=losses,
        after=whole(after),
        counters=counters_of(optimizer),
    )


def counters_of(optimizer: AveragingOptimizer) -> dict[str, int]:
    group = optimizer.param_groups[0]
    return {key: group[key] for key in group if "averag" in key}


def averaging_adam(model: nn.Module) -> AveragingOptimizer:
    return AveragingOptimizer(Adam(model.parameters(), lr=0.01), RULES)


def alone() -> Life:
    model = small_model()
    return live(model, averaging_adam(model))


def with_data_parallel() -> Life:
    model = nn.DataParallel(small_model())
    return live(model, averaging_adam(model))


def with_ddp() -> Life:
    model = DistributedDataParallel(small_model())
    return live(model, averaging_adam(model))


def with_fsdp() -> Life:
    model = sharded_model()
    return live(model, averaging_adam(model))


def with_tensor_parallel() -> Life:
    model = tensor_parallel_model()
    return live(model, averaging_adam(model))


def with_zero() -> Life:
    model = DistributedDataParallel(small_model())
    zero = ZeroRedundancyOptimizer(model.parameters(), Adam, lr=0.01)
    return live(model, AveragingOptimizer(zero, RULES))


def sharded_model() -> nn.Module:
    """Return a model whose first layer is sharded by itself and the last with the root."""
    model = small_model()
    fully_shard(model[0])
    fully_shard(model)
    return model


def tensor_parallel_model() -> nn.Module:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    return parallelize_module(small_model(), mesh, plan)


def assert_same_life(life: Life, expected: Life) -> None:
    assert_same_steps(life["snapshots"], expected["snapshots"])
    for name in expected["averages"]:
        assert same(life["averages"][name], expected["averages"][name])
        assert same(life["inside"][name], expected["averages"][name])
    assert same(life["losses"].values(), expected["losses"].values())
    assert same(life["after"], expected["after"])
    assert life["counters"] == expected["counters"]


def test_data_parallel_averages_as_the_module_alone_does() -> None:
    assert_same_life(with_data_parallel(), alone())


@pytest.mark.parametrize(
    "train_on", [with_ddp, pytest.param(with_fsdp, marks=trains_with_fsdp), with_zero]
)
def test_two_ranks_average_exactly_as_one_process(train_on: Callable[[], Life]) -> None:
    expected = alone()
    for life in in_processes(2, train_on):
        assert_same_life(life, expected)


@pytest.mark.parametrize(
    ("ranks", "train_on"),
    [pytest.param(3, with_fsdp, marks=trains_with_fsdp), (2, with_tensor_parallel)],
    ids=["fsdp", "tensor"],
)
def test_sharded_averages_are_the_recurrence_of_the_whole_weights(
    ranks: int, train_on: Callable[[], Life]
) -> None:
    """Sums over these ranks round otherwise than one process does, so it is not compared."""
    for life in in_processes(ranks, train_on):
        for name, rule in RULES.items():
            expected = recurrence(rule, life["snapshots"])
            assert same(life["averages"][name], expected)
            assert same(life["inside"][name], expected)
        assert same([life["losses"]["before"]], [life["losses"]["after"]])
        assert life["counters"]["n_averaged_swa"] == 5


# Distributed checkpoints: saved by two ranks, loaded by one and by three.


def averaging_plain_sgd(model: nn.Module) -> AveragingOptimizer:
    return AveragingOptimizer(SGD(model.parameters(), lr=0.1), RULES)


def averaging_momentum_sgd(model: nn.Module) -> AveragingOptimizer:
    return AveragingOptimizer(SGD(model.parameters(), lr=0.1, momentum=0.9), RULES)


def averaging_adam_with_frozen_weights(model: nn.Module) -> AveragingOptimizer:
    next(model.parameters()).requires_grad_(False)
    return averaging_adam(model)


def averaging_looking_ahead(model: nn.Module) -> AveragingOptimizer:
    return AveragingOptimizer(Adam(model.parameters(), lr=0.01), {**RULES, "ahead": Lookahead()})


BUILDS = {
    "adam": averaging_adam,
    "sgd": averaging_plain_sgd,
    "momentum": averaging_momentum_sgd,
    "frozen": averaging_adam_with_frozen_weights,
    "ahead": averaging_looking_ahead,
}
OPTIONS = {
    "nested": StateDictOptions(),
    "flat": StateDictOptions(flatten_optimizer_state_dict=True),
    "full": StateDictOptions(full_state_dict=True, cpu_offload=True),
}
LOAD_OPTIONS = {
    **OPTIONS,
    "full": StateDictOptions(full_state_dict=True, broadcast_from_rank0=True),
}
CASES = [(build, form) for build in BUILDS for form in OPTIONS]


class Loaded(TypedDict):
    """What a process found after loading, and how it went on."""

    weights: list[Tensor]
    averages: dict[str, list[Tensor]]
    counters: dict[str, int]
    life: Life


def save_all(folder: Path) -> None:
    for build, form in CASES:
        model = sharded_model()
        optimizer = BUILDS[build](model)
        train(model, optimizer, 5)
        weights, state = get_state_dict(model, optimizer, options=OPTIONS[form])
        checkpoint = {"model": weights, "optimizer": state}
        if form != "full":
            save_distributed(checkpoint, checkpoint_id=folder / f"{build}_{form}")
        elif dist.get_rank() == 0:
            torch.save(checkpoint, folder / f"{build}_{form}")


def load_all(folder: Path) -> dict[tuple[str, str], Loaded]:
    return {(build, form): load(folder / f"{build}_{form}", build, form) for build, form in CASES}


def load(path: Path, build: str, form: str) -> Loaded:
    model = small_model() if dist.get_world_size() == 1 else sharded_model()
    optimizer = BUILDS[build](model)
    with torch.no_grad():
        for weight in model.parameters():
            weight.zero_()
    options = LOAD_OPTIONS[form]
    checkpoint: dict[str, Any] = {"model": {}, "optimizer": {}}
    if form != "full":
        weights, state = get_state_dict(model, optimizer, options=options)
        checkpoint = {"model": weights, "optimizer": state}
        load_distributed(checkpoint, checkpoint_id=path)
    elif dist.get_rank() == 0:
        checkpoint = torch.load(path, weights_only=True)
    set_model_state_dict(model, checkpoint["model"], options=options)
    set_optimizer_state_dict(model, optimizer, checkpoint["optimizer"], options=options)
    return Loaded(
        weights=whole(weights_of(optimizer)),
        averages=whole_averages(optimizer),
        counters=counters_of(optimizer),
        life=live(model, optimizer, 2, first=5),
    )


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Any]:
    """Return the number of ranks that loaded → what each of them found."""
    folder = tmp_path_factory.mktemp("checkpoints")
    in_processes(2, save_all, folder)
    return {ranks: in_processes(ranks, load_all, folder) for ranks in (1, 3)}


@trains_with_fsdp
@pytest.mark.parametrize("ranks", [1, 3])
@pytest.mark.parametrize(("build", "form"), CASES)
def test_a_checkpoint_of_two_ranks_is_loaded_by_any_number(
    loaded: dict[int, Any], ranks: int, build: str, form: str
) -> None:
    model = small_model()
    optimizer = BUILDS[build](model)
    train(model, optimizer, 5)
    for found in loaded[ranks]:
        assert same(found[build, form]["weights"], model.parameters())
        assert found[build, form]["counters"] == counters_of(optimizer)
        for name, averages in whole_averages(optimizer).items():
            assert same(found[build, form]["averages"][name], averages)


@trains_with_fsdp
@pytest.mark.parametrize(("build", "form"), CASES)
def test_one_process_resumes_from_the_checkpoint_of_two_as_if_it_never_stopped(
    loaded: dict[int, Any], build: str, form: str
) -> None:
    model = small_model()
    optimizer = BUILDS[build](model)
    train(model, optimizer, 5)
    (found,) = loaded[1]
    assert_same_life(found[build, form]["life"], live(model, optimizer, 2, first=5))


# Averaged buffers, which torch.distributed.checkpoint saves as an object of their own.


class WithBuffers(TypedDict):
    """What a process found of a model with buffers after loading, and how it went on."""

    model: dict[str, Any]
    averages: dict[str, list[Tensor]]
    buffers: dict[str, Any]
    counters: dict[str, int]
    after: dict[str, Any]


def with_batch_norm() -> tuple[nn.Module, AveragingOptimizer]:
    """Return a model, in DDP if there are several ranks, whose statistics are averaged."""
    model: nn.Module = model_with_batch_norm()
    if dist.is_initialized() and dist.get_world_size() > 1:
        model = DistributedDataParallel(model)
    sgd = SGD(model.parameters(), lr=0.1, momentum=0.9)
    return model, AveragingOptimizer(sgd, RULES, buffers=model)


def save_with_buffers(folder: Path) -> None:
    model, optimizer = with_batch_norm()
    train(model, optimizer, 4)
    save_distributed(checkpoint_with_buffers(model, optimizer), checkpoint_id=folder)


def load_with_buffers(folder: Path) -> WithBuffers:
    """Load into a new optimizer; a warning that averages are missing is an error here."""
    model, optimizer = with_batch_norm()
    load_all_of(model, optimizer, checkpoint_with_buffers(model, optimizer), folder)
    return found_with_buffers(model, optimizer)


def checkpoint_with_buffers(model: nn.Module, optimizer: AveragingOptimizer) -> dict[str, Any]:
    weights, state = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": state, "buffers": optimizer.averaged_buffers}


def load_all_of(
    model: nn.Module, optimizer: AveragingOptimizer, checkpoint: dict[str, Any], folder: Path
) -> None:
    load_distributed(checkpoint, checkpoint_id=folder)
    set_model_state_dict(model, checkpoint["model"])
    set_optimizer_state_dict(model, optimizer, checkpoint["optimizer"])


def found_with_buffers(model: nn.Module, optimizer: AveragingOptimizer) -> WithBuffers:
    found = copy.deepcopy(
        WithBuffers(
            model=get_model_state_dict(model),
            averages=whole_averages(optimizer),
            buffers=optimizer.state_dict()["averaged_buffers"],
            counters=counters_of(optimizer),
            after={},
        )
    )
    train(model, optimizer, 2, first=4)
    found["after"] = {**optimizer.averaged_buffers.state_dict(), **get_model_state_dict(model)}
    return found


def never_stopped() -> WithBuffers:
    model, optimizer = with_batch_norm()
    train(model, optimizer, 4)
    return found_with_buffers(model, optimizer)


@pytest.fixture(scope="module")
def with_buffers(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[WithBuffers]]:
    """Return the number of ranks that loaded what two have saved → what each of them found.

    None have loaded what is expected: a process that never stopped. It is one of these too, as
    sums over a batch are rounded otherwise by several threads.
    """
    folder = tmp_path_factory.mktemp("buffers")
    in_processes(2, save_with_buffers, folder)
    loaded = {ranks: in_processes(ranks, load_with_buffers, folder) for ranks in (1, 3)}
    return {**loaded, 0: in_processes(1, never_stopped)}


@pytest.mark.parametrize("ranks", [1, 3])
def test_averaged_buffers_that_two_ranks_saved_are_loaded_by_any_number(
    with_buffers: dict[int, list[WithBuffers]], ranks: int
) -> None:
    (expected,) = with_buffers[0]
    for found in with_buffers[ranks]:
        assert frozen({**found, "after": {}}) == frozen({**expected, "after": {}})


def test_one_process_resumes_averages_of_buffers_as_if_it_never_stopped(
    with_buffers: dict[int, list[WithBuffers]],
) -> None:
    (expected,), (found,) = with_buffers[0], with_buffers[1]
    assert frozen(found["after"]) == frozen(expected["after"])


def export_whole() -> dict[str, Any]:
    model = sharded_model()
    optimizer = averaging_adam(model)
    train(model, optimizer, 3)
    with optimizer.swap_to_averaged("ema"):
        return get_model_state_dict(model, options=WHOLE)


@trains_with_fsdp
def test_the_whole_average_of_a_sharded_model_is_exported_inside_the_swap() -> None:
    model = small_model()
    optimizer = averaging_adam(model)
    train(model, optimizer, 3)
    expected = optimizer.averaged_state_dict(model, "ema")
    for exported in in_processes(2, export_whole):
        assert list(exported) == list(expected)
        assert same(exported.values(), expected.values())


def followed_and_swapped() -> list[tuple[Tensor, Tensor]]:
    """Return what a sharded averaged model gives after each step, and the model in a swap."""
    model, second = sharded_model(), sharded_model()
    optimizer = averaging_adam(model)
    with torch.no_grad():
        for weight in second.parameters():
            weight.zero_()
        loss_of_batch(second, 0)  # from then on, FSDP remembers what it computes with
    teacher = optimizer.averaged_model(model, "ema", into=second)
    found = []
    for step in range(4):
        train(model, optimizer, 1, first=step)
        with torch.no_grad():
            with optimizer.swap_to_averaged("ema"):
                inside = loss_of_batch(model, 9)
            found.append((loss_of_batch(teacher, 9), inside))
    kept = [optimizer.state[weight]["averaged_ema"] for weight in model.parameters()]
    train(model, optimizer, 1, first=4)  # so that no weight of the second stays gathered
    for own, each in zip(second.parameters(), kept, strict=True):
        assert isinstance(own, DTensor)
        assert own.to_local().data_ptr() == each.to_local().data_ptr()
        assert not own.requires_grad
    return found


@trains_with_fsdp
def test_another_sharded_instance_is_the_average_in_its_memory() -> None:
    for found in in_processes(2, followed_and_swapped):
        assert len({inside.item() for _, inside in found}) == 4
        assert same([loss for loss, _ in found], [inside for _, inside in found])


def refused_instances() -> list[str]:
    model = sharded_model()
    optimizer = averaging_adam(model)

    def refused(second: nn.Module | None) -> str:
        with pytest.raises(ValueError, match="must") as refusal:
            optimizer.averaged_model(model, "ema", into=second)
        return str(refusal.value)

    return [refused(None), refused(sharded_model()), refused(small_model())]


@trains_with_fsdp
def test_a_sharded_instance_is_refused_where_parts_are_of_several_sizes() -> None:
    """As one of three ranks sees it that are not there."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=3)
    try:
        model = sharded_model()
        optimizer = averaging_adam(model)
        with pytest.raises(ValueError, match="`into` must have parameters that FSDP shards evenly"):
            optimizer.averaged_model(model, "ema", into=sharded_model())
    finally:
        dist.destroy_process_group()


@trains_with_fsdp
def test_sharded_models_that_cannot_be_the_average_are_refused_on_all_ranks_alike() -> None:
    """Three ranks have parts of two sizes, and compute with padded copies of them."""
    first, *others = in_processes(3, refused_instances)
    assert others == [first] * 2
    copied, uneven, plain = first
    assert copied.startswith(
        "`model` must be one that copy.deepcopy can copy. Pass another instance"
    )
    assert "FSDP does not support deepcopy" in copied
    assert uneven == (
        "`into` must have parameters that FSDP shards evenly, got '0.weight' of shape (4, 3), "
        "which it pads. Use `swap_to_averaged`."
    )
    assert plain.startswith("`into` must have '0.weight' sharded like the ")


@pytest.mark.usefixtures("process_group")
class TestOneRank:
    """What needs no second process."""

    @trains_with_fsdp
    def test_a_forward_inside_the_swap_uses_no_weights_gathered_outside(self) -> None:
        """After a forward alone, FSDP keeps the weights of the root gathered."""
        model = sharded_model()
        optimizer = averaging_adam(model)
        train(model, optimizer, 3)
        outside = loss_of_batch(model, 0)
        averaged = small_model()
        with optimizer.swap_to_averaged("ema"):
            inside = loss_of_batch(model, 0)
            averaged.load_state_dict(get_model_state_dict(model, options=WHOLE))
        assert same([inside], [loss_of_batch(averaged, 0)])
        assert same([outside], [loss_of_batch(model, 0)])

    @pytest.mark.parametrize(
        "build",
        [
            small_model,
            pytest.param(sharded_model, marks=trains_with_fsdp),
            tensor_parallel_model,
        ],
    )
    @pytest.mark.parametrize("made_inside", [False, True], ids=["outside", "inside"])
    def test_a_graph_is_not_taken_over_the_edge_of_a_swap(
        self, made_inside: bool, build: Callable[[], nn.Module]
    ) -> None:
        """FSDP gathers weights anew in backward, which would be others than in forward."""
        model = build()
        optimizer = averaging_adam(model)
        train(model, optimizer, 3)
        before, averaged = whole(model.parameters()), whole_averages(optimizer)
        swap = ExitStack()
        if made_inside:
            swap.enter_context(optimizer.swap_to_averaged("ema"))
        loss = loss_of_batch(model, 0)
        if made_inside:
            swap.close()
        else:
            swap.enter_context(optimizer.swap_to_averaged("ema"))
        with swap, pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()
        assert same(whole(weights_of(optimizer)), before)
        for name, average in whole_averages(optimizer).items():
            assert same(average, averaged[name])

    @trains_with_fsdp
    @pytest.mark.parametrize("build", [sharded_model, tensor_parallel_model])
    def test_gradients_of_a_graph_that_stays_inside_a_swap_are_those_of_the_average(
        self, build: Callable[[], nn.Module]
    ) -> None:
        model, averaged = build(), small_model()
        optimizer = averaging_adam(model)
        train(model, optimizer, 3)
        with torch.no_grad():
            for weight, average in zip(
                averaged.parameters(), whole_averages(optimizer)["ema"], strict=True
            ):
                weight.copy_(average)
        optimizer.zero_grad()
        with optimizer.swap_to_averaged("ema"):
            loss_of_batch(model, 0).backward()
        loss_of_batch(averaged, 0).backward()
        assert same(whole(gradients_of(model)), gradients_of(averaged))

    @trains_with_fsdp
    def test_a_sharded_averaged_model_follows_what_the_swap_shows(self) -> None:
        model = sharded_model()
        optimizer = averaging_adam(model)
        teacher = optimizer.averaged_model(model, "ema", into=sharded_model())
        loss_of_batch(teacher, 0)
        train(model, optimizer, 3)
        with torch.no_grad(), optimizer.swap_to_averaged("ema"):
            inside = loss_of_batch(model, 9)
        assert same([loss_of_batch(teacher, 9)], [inside])
        with pytest.raises(ValueError, match=r"^`into` must have '0\.weight' sharded like"):
            optimizer.averaged_model(model, "ema", into=small_model())

    def test_a_copy_of_a_model_of_distributed_tensors_is_of_their_averages(self) -> None:
        model = small_model()
        mesh = init_device_mesh("cpu", (1,))
        for module in model.modules():
            for key, weight in list(module.named_parameters(recurse=False)):
                module.register_parameter(key, nn.Parameter(distribute_tensor(weight, mesh)))
        optimizer = AveragingOptimizer(SGD(model.parameters(), lr=0.1), EMA(0.5))
        teacher = optimizer.averaged_model(model)
        optimizer.update_averages()
        with torch.no_grad():
            for weight in model.parameters():
                weight.zero_()
        optimizer.update_averages()
        assert all(isinstance(each, nn.Parameter | DTensor) for each in teacher.parameters())
        expected = [each * 0.5 for each in small_model().parameters()]
        assert same(whole(teacher.parameters()), expected)
        assert not any(each.requires_grad for each in teacher.parameters())

    @trains_with_fsdp
    def test_an_export_after_a_forward_alone_is_of_the_whole_model(self) -> None:
        model = sharded_model()
        optimizer = averaging_adam(model)
        train(model, optimizer, 3)
        expected = whole(optimizer.averaged_state_dict(model, "ema").values())
        loss_of_batch(model, 0)
        assert same(whole(optimizer.averaged_state_dict(model, "ema").values()), expected)
        loss_of_batch(model, 0)
        optimizer.averaged_model(model, "ema", into=sharded_model())

    @trains_with_fsdp
    @pytest.mark.parametrize("value", [torch.ones(4, 3), DTensor], ids=["plain", "replicated"])
    def test_an_average_with_other_placements_is_refused(self, value: Any) -> None:
        model = sharded_model()
        optimizer = averaging_adam(model)
        train(model, optimizer, 1)
        saved = optimizer.state_dict()
        if value is DTensor:
            value = saved["state"][0]["averaged_ema"].redistribute(placements=[Replicate()])
        saved["state"][0]["averaged_ema"] = value
        message = r"`state\[0\]\['averaged_ema'\]` must be sharded like its parameter"
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(saved)

    def test_averaged_buffers_are_not_in_a_distributed_checkpoint_and_restart(self) -> None:
        model = model_with_batch_norm()
        optimizer = averaging_sgd(model, EMA(0.5), buffers=model.buffers())
        train(model, optimizer, 3)
        saved = get_optimizer_state_dict(model, optimizer)
        with pytest.warns(UserWarning, match="no average for the buffers of 'ema'"):
            set_optimizer_state_dict(model, optimizer, saved)
        with optimizer.swap_to_averaged():
            inside = values(model.buffers())
        assert same(inside, model.buffers())

    @trains_with_fsdp
    @pytest.mark.parametrize("names", [["ema"], ["ema", "swa"]], ids=len)
    def test_sharded_weights_that_get_another_part_are_averaged_as_they_are_now(
        self, names: list[str]
    ) -> None:
        model = sharded_model()
        rules: dict[str, Rule] = {"ema": EMA(0.5), "swa": SWA()}
        optimizer = averaging_sgd(model, {name: rules[name] for name in names})
        optimizer.update_averages()
        expected = whole(model.parameters())
        for weight in model.parameters():
            assert isinstance(weight, DTensor)
            weight._local_tensor = weight._local_tensor * 3
        optimizer.update_averages()
        for name in names:
            averaged = whole(
                optimizer.state[weight][f"averaged_{name}"] for weight in model.parameters()
            )
            assert same(averaged, [2 * each for each in expected])

    def test_averaged_buffers_are_rolled_back_with_the_averages_of_weights(
        self, tmp_path: Path
    ) -> None:
        model, optimizer = with_batch_norm()
        train(model, optimizer, 4)
        save_distributed(checkpoint_with_buffers(model, optimizer), checkpoint_id=tmp_path)
        before = frozen(optimizer.state_dict())
        train(model, optimizer, 2, first=4)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            load_all_of(model, optimizer, checkpoint_with_buffers(model, optimizer), tmp_path)
        assert frozen(optimizer.state_dict()) == before

    @pytest.mark.parametrize("damage", ["count", "name", "all"])
    def test_averaged_buffers_of_other_names_or_shapes_are_refused_and_change_nothing(
        self, damage: str
    ) -> None:
        damages: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
            "count": (lambda saved: saved.pop("n_averaged_swa"), r"`n_averaged_swa` must be a non"),
            "name": (
                lambda saved: saved["averaged_buffers"]["swa"].pop("1.running_var"),
                r"`averaged_buffers\['swa'\]\['1\.running_var'\]` must be a tensor, got None",
            ),
            "all": (
                lambda saved: saved.pop("averaged_buffers"),
                r"`averaged_buffers` must be a dict, got None\.",
            ),
        }
        model, optimizer = with_batch_norm()
        train(model, optimizer, 4)
        saved = copy.deepcopy(optimizer.averaged_buffers.state_dict())
        act, message = damages[damage]
        act(saved)
        train(model, optimizer, 1, first=4)
        before = frozen(optimizer.state_dict())
        with pytest.raises(ValueError, match=message):
            optimizer.averaged_buffers.load_state_dict(saved)
        assert frozen(optimizer.state_dict()) == before
        with (
            optimizer.swap_to_averaged("ema"),
            pytest.raises(RuntimeError, match=r"`averaged_buffers\.load_state_dict` is not"),
        ):
            optimizer.averaged_buffers.load_state_dict(saved)

    def test_averages_of_weights_that_were_frozen_late_are_rolled_back_in_one_process(
        self, tmp_path: Path
    ) -> None:
        model, optimizer = trained_then_frozen()
        with pytest.warns(UserWarning, match="load the checkpoint before you freeze them"):
            weights, state = get_state_dict(model, optimizer)
        save_distributed({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
        expected = frozen(whole_averages(optimizer))
        train(model, optimizer, 2, first=5)
        assert frozen(whole_averages(optimizer)) != expected
        roll_back(model, optimizer, tmp_path)
        assert frozen(whole_averages(optimizer)) == expected

    def test_saving_averages_of_frozen_weights_warns_once_about_loading_them(
        self,
    ) -> None:
        model, optimizer = trained_then_frozen()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            get_state_dict(model, optimizer)
            get_state_dict(model, optimizer)
            optimizer.state_dict()
        told = [str(each.message) for each in caught if "frozen" in str(each.message)]
        assert len(told) == 1
        assert told[0].startswith("2 parameters were averaged before they were frozen")

    def test_averages_come_back_in_a_new_process_that_freezes_its_weights_after_loading(
        self, tmp_path: Path
    ) -> None:
        model, optimizer = trained_then_frozen()
        with pytest.warns(UserWarning, match="were averaged before they were frozen"):
            weights, state = get_state_dict(model, optimizer)
        save_distributed({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
        other_model = small_model()
        other = averaging_adam(other_model)
        roll_back(other_model, other, tmp_path)
        other_model[0].requires_grad_(False)
        assert frozen(whole_averages(other)) == frozen(whole_averages(optimizer))
        train(model, optimizer, 2, first=5)
        train(other_model, other, 2, first=5)
        assert frozen(whole_averages(other)) == frozen(whole_averages(optimizer))

    @pytest.mark.parametrize("order", ["model_first", "optimizer_first"])
    def test_weights_that_were_always_frozen_are_their_own_averages_as_they_are_loaded(
        self, order: str, tmp_path: Path
    ) -> None:
        model = small_model()
        model[0].requires_grad_(False)
        optimizer = averaging_adam(model)
        train(model, optimizer, 4)
        weights, state = get_state_dict(model, optimizer)
        save_distributed({"model": weights, "optimizer": state}, checkpoint_id=tmp_path)
        other_model = small_model()
        other_model[0].requires_grad_(False)
        with torch.no_grad():
            for weight in other_model.parameters():
                weight.add_(1)
        other = averaging_adam(other_model)
        roll_back(other_model, other, tmp_path, model_first=order == "model_first")
        for name in RULES:
            found = other.averaged_state_dict(other_model, name)
            assert frozen(found) == frozen(optimizer.averaged_state_dict(model, name))


def trained_then_frozen() -> tuple[nn.Sequential, AveragingOptimizer]:
    model = small_model()
    optimizer = averaging_adam(model)
    train(model, optimizer, 3)
    model[0].requires_grad_(False)
    optimizer.zero_grad()
    train(model, optimizer, 2, first=3)
    return model, optimizer


def roll_back(
    model: nn.Module, optimizer: AveragingOptimizer, folder: Path, *, model_first: bool = True
) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="The state dict has no average")
        warnings.filterwarnings("ignore", message=".*were averaged before they were frozen")
        weights, state = get_state_dict(model, optimizer)
        checkpoint: dict[str, Any] = {"model": weights, "optimizer": state}
        load_distributed(checkpoint, checkpoint_id=folder)
        if model_first:
            set_model_state_dict(model, checkpoint["model"])
        set_optimizer_state_dict(model, optimizer, checkpoint["optimizer"])
        if not model_first:
            set_model_state_dict(model, checkpoint["model"])
