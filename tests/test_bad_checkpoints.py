"""Damaged checkpoints: each is loaded as it says or refused by name, with nothing changed."""

from __future__ import annotations

import copy
import functools
import io
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import FITTING, MUTATIONS, UNFITTING, VALUES, Mutation, trace, with_attribute
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Optimizer
from training import (
    Run,
    averages,
    averaging_sgd,
    everything,
    of_bfloat16_weights,
    same,
    small_model,
    train,
    with_snapshots,
)

from averaging_optim import EMA, LAWA, SWA, T_ADEMA, AveragingOptimizer, Rule

Start = Callable[[], Run]

ENTRY = r"`(state_dict|state|param_groups|averaged_(buffers|parameters))(\[.*\])?` (must|belongs) "

RULES: dict[str, Rule] = {"ema": EMA(0.9), "swa": SWA(start=1)}
NAMES = ["", "averaged_", "n_averaged_x", "x", "xx", "'; drop", "buffers", "params", "平均\0`"]


def with_momentum() -> Run:
    model = small_model()
    return model, averaging_sgd(model, EMA(0.9))


def with_entries_of_averages_alone() -> Run:
    model = small_model()
    rules = {name: EMA(0.1 * i) for i, name in enumerate(NAMES)}
    return model, AveragingOptimizer(SGD(model.parameters(), lr=0.1), rules)


def with_buffers_of_two_kinds() -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    adam = Adam(model.parameters(), lr=0.01)
    return model, AveragingOptimizer(adam, RULES, buffers=model.buffers())


def with_groups_of_one_shape() -> Run:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 3))
    groups: list[dict[str, Any]] = [{"params": layer.parameters()} for layer in model]
    groups[2]["average"] = False
    return model, AveragingOptimizer(Adam(groups, lr=0.01, amsgrad=True), T_ADEMA(0.9, 10))


def with_a_frozen_layer() -> Run:
    model = small_model()
    model[0].requires_grad_(False)
    return model, averaging_sgd(model, EMA(0.9), dtype=torch.float64)


RUNS: list[Start] = [
    with_momentum,
    with_entries_of_averages_alone,
    with_buffers_of_two_kinds,
    with_groups_of_one_shape,
    of_bfloat16_weights,
    with_a_frozen_layer,
    with_snapshots,
]


def saved_by(start: Start) -> dict[str, Any]:
    """Return a checkpoint taken after three steps, a new one at each call."""
    return copy.deepcopy(saved_once(start))


@functools.cache
def saved_once(start: Start) -> dict[str, Any]:
    model, optimizer = start()
    train(model, optimizer, 3)
    return optimizer.state_dict()


def to_load_into(start: Start) -> Run:
    """Return the run after two other steps, a new one at each call."""
    run: Run = pickle.loads(trained_once(start))
    return run


@functools.cache
def trained_once(start: Start) -> bytes:
    model, optimizer = start()
    train(model, optimizer, 2, first=7)
    return pickle.dumps((model, optimizer))


@functools.cache
def file_of(start: Start) -> bytes:
    file = io.BytesIO()
    torch.save(saved_once(start), file)
    return file.getvalue()


def contents(file: bytes) -> list[Any]:
    """Return what torch reads from the file in a list, an empty one if it refuses to."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return [torch.load(io.BytesIO(file), weights_only=True)]
        except Exception:  # a damaged file may raise anything
            return []


def is_whole(file: bytes) -> bool:
    """Return whether Python finds the checksums, and no record made a folder, which has none."""
    try:
        with zipfile.ZipFile(io.BytesIO(file)) as archive:
            folders = [record for record in archive.infolist() if record.external_attr]
            return archive.testzip() is None and not folders
    except Exception:  # a damaged file may raise anything
        return False


def flipped(file: bytes, bit: int) -> bytes:
    damaged = bytearray(file)
    damaged[bit // 8] ^= 1 << bit % 8
    return bytes(damaged)


def trace_of(model: nn.Module, optimizer: AveragingOptimizer) -> object:
    """Return the trace of all that is kept, and of where it is kept."""
    wrapped = optimizer.wrapped
    weights = [id(weight) for group in wrapped.param_groups for weight in group["params"]]
    keys = [id(key) for key in wrapped.state]
    return trace([model.state_dict(), optimizer.state_dict(), homes(optimizer), weights, keys])


def homes(optimizer: AveragingOptimizer) -> dict[tuple[int, str], int]:
    """Return the address of each average."""
    entries = [
        (id(weight), optimizer.state.get(weight, {}))
        for group in optimizer.param_groups
        for weight in group["params"]
    ]
    keys = [f"averaged_{name}" for name in optimizer.rules]
    return {
        (weight, key): entry[key].data_ptr()
        for weight, entry in entries
        for key in keys
        if key in entry
    }


def starts(key: object, prefix: str | tuple[str, ...]) -> bool:
    return isinstance(key, str) and key.startswith(prefix)


def refusal_of(saved: Any, start: Start) -> str:
    """Load into a trained optimizer, which must do it right or say what is wrong.

    Returns what it says, "" if it loads.
    """
    model, optimizer = to_load_into(start)
    before, given_trace = trace_of(model, optimizer), trace(saved)
    former_homes = homes(optimizer)
    refusal: Exception | None = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            optimizer.load_state_dict(saved)
        except (ValueError, TypeError) as error:
            refusal = error
    assert trace(saved) == given_trace
    # What torch itself warns of is reported for files of its own.
    warned = [str(each.message) for each in caught if each.filename == __file__]
    if refusal is None:
        assert_loaded(saved, start, model, optimizer, warned)
        assert homes(optimizer) == homes(optimizer) | former_homes
        return ""
    assert not warned
    assert re.match(ENTRY, str(refusal), re.DOTALL), refusal
    assert trace_of(model, optimizer) == before
    return str(refusal)


def assert_loaded(
    saved: dict[str, Any],
    start: Start,
    model: nn.Sequential,
    optimizer: AveragingOptimizer,
    warned: list[str],
) -> None:
    """Compare with what the checkpoint says, read here by other means."""
    former_model, former = to_load_into(start)
    assert trace(model.state_dict()) == trace(former_model.state_dict())
    sources = list(sources_in(saved, optimizer, former))
    entries = [entry for entry, _, _ in sources]
    kept = {name: names_kept(name, rule) for name, rule in optimizer.rules.items()}
    found = {
        name: not entries or any(f"averaged_{key}" in entry for entry in entries for key in keys)
        for name, keys in kept.items()
    }
    assert_all_known(saved, entries, optimizer)
    for name, is_there in found.items():
        for key in kept[name]:
            assert_averages_loaded(f"averaged_{key}", sources, is_there, optimizer, former)

    first = saved["param_groups"][0]
    missing = [
        repr(name)
        for name, is_there in found.items()
        if not is_there and first.get(f"n_averaged_{name}") != 0
    ]
    missing += buffers_not_in(saved, found, optimizer, model)
    warning = f"The state dict has no average for {', '.join(missing)}: averaging starts at "
    warning += "the present weights."
    assert warned == ([warning] if missing else [])
    assert_counters_loaded(saved, found, bool(missing), optimizer)

    bare = former.wrapped
    bare.load_state_dict(without_averages(saved, kept))
    assert trace(held_by(optimizer.wrapped)) == trace(held_by(bare))


def names_kept(name: str, rule: Rule) -> list[str]:
    """Return the names of an average and of the snapshots it takes."""
    snapshots = rule.k - 1 if isinstance(rule, LAWA) else 0
    return [name, *(f"{name}_{i + 1}" for i in range(snapshots))]


def sources_in(
    saved: dict[str, Any], optimizer: AveragingOptimizer, former: AveragingOptimizer
) -> Iterator[tuple[dict[str, Any], Tensor, Tensor]]:
    """Yield the saved entry of each averaged weight, the weight, and that of the former run."""
    groups = (saved["param_groups"], optimizer.param_groups, former.param_groups)
    for group, now, then in zip(*groups, strict=True):
        if group.get("average", then.get("average", True)):
            weights = (group["params"], now["params"], then["params"])
            for index, weight, former_weight in zip(*weights, strict=True):
                yield saved["state"].get(index, {}), weight, former_weight


def assert_all_known(
    saved: dict[str, Any], sources: list[dict[str, Any]], optimizer: AveragingOptimizer
) -> None:
    """Check that no average and no count in the checkpoint was passed over."""
    entries = [entry for entry in saved["state"].values() if isinstance(entry, dict)]
    names = {key for name, rule in optimizer.rules.items() for key in names_kept(name, rule)}
    known = {f"averaged_{name}" for name in names}
    averaged = [id(entry) for entry in entries if known & keys_in([entry], "averaged_")]
    assert set(averaged) <= set(map(id, sources))
    # An optimizer may have keys of this form itself; what is counted is an average.
    ours = {key for key in keys_in(entries, "averaged_") if f"n_{key}" in counts_in(saved)}
    assert ours <= known
    counted = counts_in(saved)
    assert counted <= {f"n_averaged_{name}" for name in optimizer.rules}
    assert saved.get("averaged_buffers", {}).keys() <= names


def counts_in(saved: dict[str, Any]) -> set[str]:
    return keys_in(saved["param_groups"], "n_averaged_")


def keys_in(parts: list[dict[str, Any]], prefix: str) -> set[str]:
    return {key for part in parts for key in part if starts(key, prefix)}


def assert_averages_loaded(
    key: str,
    sources: list[tuple[dict[str, Any], Tensor, Tensor]],
    is_there: bool,
    optimizer: AveragingOptimizer,
    former: AveragingOptimizer,
) -> None:
    """Compare with the saved averages, or with the weights if there were some and none is saved."""
    for entry, weight, former_weight in sources:
        if is_there:
            assert key in entry or not weight.requires_grad
            # A frozen weight of which nothing was saved is its own average.
            assert_holds(optimizer.state.get(weight, {}).get(key, weight), entry.get(key, weight))
        else:
            assert (key in optimizer.state.get(weight, {})) == (
                key in former.state.get(former_weight, {})
            )
            if key in optimizer.state.get(weight, {}):
                assert_holds(optimizer.state[weight][key], weight)


def assert_holds(average: Tensor, value: Tensor) -> None:
    # Without attributes, which may hide methods.
    plain = Tensor.detach(value)
    kinds = [(each.is_floating_point(), each.is_complex()) for each in (average, plain)]
    assert kinds[0] == kinds[1]
    assert same([average], [plain.to(average.dtype)])


def buffers_not_in(
    saved: dict[str, Any],
    found: dict[str, bool],
    optimizer: AveragingOptimizer,
    model: nn.Sequential,
) -> Iterator[str]:
    """Compare averaged buffers with the saved ones, else with the model's, and yield the latter."""
    loaded, given = (each.get("averaged_buffers", {}) for each in (optimizer.state_dict(), saved))
    for name in [name for name in optimizer.rules if name in loaded and found[name]]:
        keys = names_kept(name, optimizer.rules[name])
        is_there = any(key in given for key in keys)
        for key in keys:
            expected = given[key] if is_there else list(model.buffers())
            for average, value in zip(loaded[key], expected, strict=True):
                assert_holds(average, value)
        if not is_there:
            yield f"the buffers of {name!r}"


def assert_counters_loaded(
    saved: dict[str, Any], found: dict[str, bool], is_missing: bool, optimizer: AveragingOptimizer
) -> None:
    """Compare with the saved counts; they are 0 for what starts afresh."""
    goes_on = {f"n_averaged_{name}": is_there for name, is_there in found.items()}
    goes_on |= dict.fromkeys(
        ["averaging_steps", "n_skipped"], any(found.values()) or not is_missing
    )
    for saved_group, group in zip(saved["param_groups"], optimizer.param_groups, strict=True):
        expected = {key: saved_group.get(key, 0) if goes_on[key] else 0 for key in goes_on}
        assert trace({key: group[key] for key in goes_on}) == trace(expected)
        assert all(0 <= count < 2**63 for count in expected.values())


def without_averages(saved: dict[str, Any], kept: dict[str, list[str]]) -> dict[str, Any]:
    """Return the checkpoint that the wrapped optimizer would have saved."""
    state, ours = {}, {f"averaged_{key}" for keys in kept.values() for key in keys}
    for index, entry in saved["state"].items():
        if not isinstance(entry, dict):
            state[index] = entry
        elif rest := {key: entry[key] for key in entry if key not in ours}:
            state[index] = rest
        elif not entry:
            state[index] = {}
    return {"state": state, "param_groups": saved["param_groups"]}


def held_by(optimizer: Optimizer) -> list[Any]:
    """Return what an optimizer holds of its own."""
    saved = optimizer.state_dict()
    ours = ("averaging_steps", "n_skipped", "n_averaged_", "average")
    groups = [
        {key: group[key] for key in group if not starts(key, ours)}
        for group in saved["param_groups"]
    ]
    return [saved["state"], groups]


# There is more to damage than other properties have to try.
@settings(max_examples=15 * settings().max_examples)
@given(start=st.sampled_from(RUNS), mutations=st.lists(MUTATIONS, min_size=1, max_size=3))
def test_a_mutated_checkpoint_loads_as_it_says_or_is_refused_and_changes_nothing(
    start: Start, mutations: list[Mutation]
) -> None:
    saved = saved_by(start)
    for mutation in mutations:
        mutation.apply(saved)
    refusal_of(saved, start)


@given(
    start=st.sampled_from(RUNS),
    alterations=st.lists(st.sampled_from(list(FITTING)), min_size=1, max_size=4),
    indices=st.lists(
        st.integers() | st.text() | st.booleans() | st.none() | st.tuples(st.integers()),
        min_size=6,
        max_size=6,
        unique=True,
    ).filter(lambda indices: set(range(6)).isdisjoint(indices)),
    count=st.integers(0, 2**63 - 1),
)
def test_whatever_can_stand_for_averages_indices_and_counts_is_loaded(
    start: Start, alterations: list[str], indices: list[Hashable], count: int
) -> None:
    saved = saved_by(start)
    numbered = [
        (entry, key)
        for entry in saved["state"].values()
        for key in entry
        if key.startswith("averaged_")
    ]
    for i, (entry, key) in enumerate(numbered):
        entry[key] = FITTING[alterations[i % len(alterations)]](entry[key])
    saved["state"] = {indices[index]: entry for index, entry in saved["state"].items()}
    for group in saved["param_groups"]:
        group["params"] = [indices[index] for index in group["params"]]
        group |= {key: count for key in group if key.startswith(("n_averaged_", "averaging_"))}
    assert refusal_of(saved, start) == ""


@pytest.mark.parametrize("alteration", UNFITTING)
@pytest.mark.parametrize("start", [with_momentum, of_bfloat16_weights])
def test_what_cannot_be_copied_into_an_average_is_refused(start: Start, alteration: str) -> None:
    saved = saved_by(start)
    saved["state"][3]["averaged_ema"] = UNFITTING[alteration](saved["state"][3]["averaged_ema"])
    assert re.match(r"`state\[3\]\['averaged_ema'\]` must ", refusal_of(saved, start))


@pytest.mark.parametrize("alteration", ["half_bytes", "bits", "cut", "meta", "quantized", "list"])
def test_what_cannot_be_copied_into_an_averaged_buffer_is_refused(alteration: str) -> None:
    saved = saved_by(with_buffers_of_two_kinds)
    kept = saved["averaged_buffers"]["swa"]
    kept[2] = UNFITTING[alteration](kept[2])
    refusal = refusal_of(saved, with_buffers_of_two_kinds)
    assert re.match(r"`averaged_buffers\['swa'\]\[2\]` must ", refusal)


MESSAGES = {
    "sparse": "be a tensor that torch can copy from, got torch.sparse_coo of torch.float32 on cpu.",
    "meta": "be a tensor that torch can copy from, got torch.strided of torch.float32 on meta.",
    "nested": "be a tensor that torch can copy from, got torch.strided of torch.float32 on cpu.",
    "quantized": "be floating-point, got torch.qint8.",
    "cut": "have the shape (2,), got (1,).",
    "list": "be a tensor, got [",
}


@pytest.mark.parametrize("alteration", MESSAGES)
def test_a_refusal_says_what_came_in_place_of_the_average(alteration: str) -> None:
    saved = saved_by(with_momentum)
    saved["state"][3]["averaged_ema"] = UNFITTING[alteration](saved["state"][3]["averaged_ema"])
    message = re.escape(f"`state[3]['averaged_ema']` must {MESSAGES[alteration]}")
    assert re.match(message, refusal_of(saved, with_momentum))


def set_count(count: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["param_groups"][0].update(n_averaged_ema=count)


def set_params(*params: Any) -> Callable[[dict[str, Any]], None]:
    return lambda saved: saved["param_groups"][0].update(params=list(params))


PARAMS = r"`param_groups\[0\]\['params'\]` must contain "
COUNT = r"`param_groups\[0\]\['n_averaged_ema'\]` must be "
DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "index_twice": (set_params(0, 1, 2, 1), PARAMS + r"each index once, got 1 twice\."),
    "index_twice_by_value": (
        set_params(0, 1, 2, True),
        PARAMS + r"each index once, got True twice\.",
    ),
    "index_unhashable": (set_params(0, [1], 2, 3), PARAMS + r"hashable indices, got \[1\]\."),
    "index_unhashable_inside": (set_params(0, 1, 2, (3, {})), PARAMS + "hashable indices, got "),
    "index_of_text": (
        set_params("0", "1", "2", "3"),
        r"`state` must contain parameters of `param_groups` only, got the index 0\.",
    ),
    "state_of_text": (
        lambda saved: saved["state"].update({"0": saved["state"].pop(0)}),
        r"`state\['0'\]\['averaged_ema'\]` belongs to a parameter that this optimizer "
        r"doesn't average\.",
    ),
    "count_too_large": (set_count(2**63), COUNT + r"less than 2\*\*63, got 9223372036854775808\."),
    "count_huge": (set_count(10**400), COUNT + r"less than 2\*\*63, got 10{199}…\."),
    "count_unprintable": (set_count(-(10**5000)), COUNT + r"a non-negative int, got <int>\."),
    "count_infinite": (set_count(float("inf")), COUNT + r"a non-negative int, got inf\."),
    "count_in_a_tensor": (
        set_count(torch.tensor(3)),
        COUNT + r"a non-negative int, got tensor\(3\)\.",
    ),
    "steps_of_its_own": (
        lambda saved: saved["param_groups"][0].update(n_skipped="x"),
        r"`param_groups\[0\]\['n_skipped'\]` must be a non-negative int, got 'x'\.",
    ),
}


def test_an_entry_must_be_a_dict_for_every_parameter() -> None:
    saved = saved_by(with_groups_of_one_shape)
    saved["state"][5] = []
    assert re.match(
        r"`state\[5\]` must be a dict, got \[\]\.", refusal_of(saved, with_groups_of_one_shape)
    )


@pytest.mark.parametrize("damage", DAMAGES)
def test_ambiguous_indices_and_counts_beyond_reason_are_refused(damage: str) -> None:
    act, message = DAMAGES[damage]
    saved = saved_by(with_momentum)
    act(saved)
    assert re.match(message, refusal_of(saved, with_momentum))


@pytest.mark.parametrize("value", VALUES)
def test_anything_but_a_dict_is_refused(value: str) -> None:
    model, optimizer = to_load_into(with_momentum)
    before = trace_of(model, optimizer)
    with pytest.raises(ValueError, match=r"^`(state_dict|param_groups)` must be "):
        optimizer.load_state_dict(VALUES[value]())
    assert trace_of(model, optimizer) == before


@pytest.mark.parametrize("place", ["an_average", "an_entry"])
@pytest.mark.parametrize("value", ["long_text", "unprintable", "endless", "deep"])
def test_a_refusal_shows_no_more_than_fits_a_line(value: str, place: str) -> None:
    saved = saved_by(with_momentum)
    if place == "an_average":
        saved["state"][0]["averaged_ema"] = VALUES[value]()
    else:
        saved["state"][0] = VALUES[value]()
    assert 0 < len(refusal_of(saved, with_momentum)) < 300


def test_an_average_of_a_weight_that_was_saved_as_frozen_is_refused() -> None:
    saved = saved_by(with_a_frozen_layer)
    saved["state"][0] = {"averaged_ema": torch.ones(4, 3)}
    message = (
        r"`state\[0\]\['averaged_ema'\]` must be absent, as `averaged_parameters\[0\]` is empty"
    )
    assert re.match(message, refusal_of(saved, with_a_frozen_layer))


def test_groups_of_one_shape_are_matched_by_their_order() -> None:
    saved = saved_by(with_groups_of_one_shape)
    saved["param_groups"][:2] = reversed(saved["param_groups"][:2])
    assert refusal_of(saved, with_groups_of_one_shape) == ""
    _, optimizer = to_load_into(with_groups_of_one_shape)
    optimizer.load_state_dict(saved)
    first = optimizer.state[optimizer.param_groups[0]["params"][0]]
    assert same([first["averaged_t_adema"]], [saved["state"][2]["averaged_t_adema"]])


def test_the_saved_flag_of_a_group_tells_whether_it_has_averages() -> None:
    saved = saved_by(with_groups_of_one_shape)
    for group, flag in zip(saved["param_groups"], [False, True, True], strict=True):
        group["average"] = flag
    kept = [saved["state"][index].pop("averaged_t_adema") for index in (0, 1)]
    message = r"`state\[4\]\['averaged_t_adema'\]` must be a tensor, got None\."
    assert re.match(message, refusal_of(saved, with_groups_of_one_shape))
    for index, average in zip((4, 5), kept, strict=True):
        saved["state"][index]["averaged_t_adema"] = average
    assert refusal_of(saved, with_groups_of_one_shape) == ""


def test_one_parameter_twice_in_a_group_is_saved_and_loaded() -> None:
    def build() -> tuple[nn.Parameter, AveragingOptimizer]:
        weight = nn.Parameter(torch.ones(2))
        with pytest.warns(UserWarning, match="duplicate parameters"):
            sgd = SGD([weight, weight], lr=0.1)
        return weight, AveragingOptimizer(sgd, EMA())

    _, optimizer = build()
    optimizer.update_averages()
    saved = copy.deepcopy(optimizer.state_dict())
    weight, other = build()
    other.load_state_dict(saved)
    assert same(averages(other, "ema"), [weight])


@pytest.mark.parametrize("rule", [EMA(), SWA(), T_ADEMA(timescale=1e-300)], ids=repr)
def test_the_largest_counts_are_of_use(rule: Rule) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, {"rule": rule})
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0].update(averaging_steps=2**63 - 1, n_averaged_rule=2**63 - 1)
    optimizer.load_state_dict(saved)
    train(model, optimizer, 1)
    assert optimizer.param_groups[0]["n_averaged_rule"] == 2**63


def test_entries_that_belong_to_no_parameter_are_not_written_into() -> None:
    model = small_model()
    optimizer = AveragingOptimizer(Adagrad(model.parameters()), EMA())
    train(model, optimizer, 1)
    saved = copy.deepcopy(optimizer.state_dict())
    # If the first step is no tensor, Adagrad makes tensors of all, in the entries it is given.
    elsewhere = {"step": 1.0}
    saved["state"] = {"elsewhere": elsewhere, **saved["state"]}
    optimizer.load_state_dict(saved)
    assert isinstance(optimizer.state_dict()["state"]["elsewhere"]["step"], Tensor)
    assert trace(elsewhere) == trace({"step": 1.0})


EXPORTS: dict[str, tuple[Any, str]] = {
    "no_dict": ([], r"^`state_dict` must be a dict, got \[\]\."),
    "no_name": ({5: torch.ones(1)}, r"^`state_dict` must contain keys of the model only, got 5\."),
    "sparse": (
        {"weight": torch.ones(2, 2).to_sparse(), "bias": torch.ones(2)},
        r"^`state_dict\['weight'\]` must be a tensor that torch can copy from, got torch\.sparse",
    ),
    "meta": (
        {"weight": torch.ones(2, 2), "bias": torch.ones(2, device="meta")},
        r"^`state_dict\['bias'\]` must be a tensor that torch can copy from, got .* on meta\.",
    ),
}


@pytest.mark.parametrize("export", EXPORTS)
def test_an_export_that_cannot_be_copied_from_is_refused(export: str) -> None:
    exported, message = EXPORTS[export]
    model = nn.Linear(2, 2)
    optimizer = AveragingOptimizer(SGD(model.parameters(), lr=0.1), EMA())
    optimizer.update_averages()
    before = everything(model, optimizer)
    with pytest.raises(ValueError, match=message):
        optimizer.load_averaged_state_dict(model, exported)
    assert same(everything(model, optimizer), before)


def test_attributes_that_hide_a_tensors_methods_change_nothing() -> None:
    model = nn.Linear(2, 2)
    optimizer = AveragingOptimizer(SGD(model.parameters(), lr=0.1), EMA())
    exported = {"weight": torch.ones(2, 2), "bias": torch.zeros(2)}
    hiding = {key: with_attribute(exported[key] + 0, "to_local", torch.Tensor) for key in exported}
    optimizer.load_averaged_state_dict(model, hiding)
    assert same(averages(optimizer, "ema"), exported.values())


SAVED_TYPES = {dict, list, tuple, int, float, bool, str, type(None), Tensor}


@pytest.mark.parametrize("start", RUNS)
def test_nothing_is_saved_but_what_torch_loads_as_weights_only(start: Start) -> None:
    saved = saved_once(start)
    assert set(types_in(saved)) <= SAVED_TYPES
    assert trace(contents(file_of(start))) == trace([saved])


def types_in(node: Any) -> Iterator[type]:
    """Yield the types of all parts of a nested dict, keys included."""
    yield type(node)
    if isinstance(node, dict):
        yield from map(type, node)
    if isinstance(node, dict | list | tuple):
        for part in node.values() if isinstance(node, dict) else node:
            yield from types_in(part)


@pytest.mark.parametrize("start", RUNS)
def test_a_file_that_was_cut_off_anywhere_is_refused_by_torch(start: Start) -> None:
    file = file_of(start)
    assert [size for size in range(len(file)) if contents(file[:size])] == []


@pytest.mark.parametrize("start", RUNS)
def test_checksums_find_any_flipped_bit_that_changes_what_is_loaded(start: Start) -> None:
    file = file_of(start)
    assert is_whole(file)
    # A prime, so that it is any bit of a byte.
    damaged = (flipped(file, bit) for bit in range(0, 8 * len(file), 101))
    right = trace(contents(file))
    unnoticed = [each for each in damaged if is_whole(each) and contents(each)]
    assert [trace(contents(each)) for each in unnoticed if trace(contents(each)) != right] == []


@given(start=st.sampled_from(RUNS), place=st.floats(0, 1, exclude_max=True))
def test_a_file_with_a_flipped_bit_is_loaded_as_torch_reads_it_or_refused(
    start: Start, place: float
) -> None:
    file = file_of(start)
    for saved in contents(flipped(file, int(place * 8 * len(file)))):
        refusal_of(saved, start)
