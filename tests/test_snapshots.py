"""LAWA: the mean of the last weights, and the snapshots it takes to know them."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD
from training import (
    averages,
    averaging_sgd,
    model_with_batch_norm,
    recurrence,
    same,
    small_model,
    train,
    update_with,
    values,
)

from averaging_optim import EMA, LAWA, SWA, AveragingOptimizer, Rule


@pytest.mark.parametrize("k", [2, 3, 5])
@pytest.mark.parametrize("steps", range(1, 12))
def test_lawa_is_the_mean_of_the_last_k_weights(k: int, steps: int) -> None:
    model = small_model(torch.float64)
    optimizer = averaging_sgd(model, {"one": LAWA(k)})
    last = train(model, optimizer, steps)[-k:]
    for average, snapshots in zip(averages(optimizer, "one"), zip(*last, strict=True), strict=True):
        # A few roundings of values near 1.
        torch.testing.assert_close(average, torch.stack(snapshots).mean(0), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lawa_is_swa_of_the_last_k_weights_bit_for_bit(dtype: torch.dtype) -> None:
    model = small_model(dtype)
    optimizer = averaging_sgd(model, {"one": LAWA(k=3, start=2, every=2)})
    snapshots = train(model, optimizer, 13)
    last = [[weight.float() for weight in snapshots[step - 1]] for step in (8, 10, 12)]
    assert same(averages(optimizer, "one"), recurrence(SWA(), last))


def test_a_window_forgets_what_was_not_finite() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = AveragingOptimizer(SGD([weight], lr=1.0), LAWA(k=2))
    update_with(optimizer, weight, 1.0, torch.inf, 3.0, 5.0)
    assert averages(optimizer, "lawa") == [4.0]


def test_lawa_keeps_k_tensors_for_each_weight_and_buffer() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, {"one": LAWA(k=4)}, buffers=model.buffers())
    train(model, optimizer, 1)
    names = ["averaged_one", "averaged_one_1", "averaged_one_2", "averaged_one_3"]
    state_dict = optimizer.state_dict()
    for entry in [*state_dict["state"].values(), *optimizer.state.values()]:
        assert [key for key in entry if key.startswith("averaged")] == names
    assert [f"averaged_{name}" for name in state_dict["averaged_buffers"]] == names
    assert {len(kept) for kept in state_dict["averaged_buffers"].values()} == {3}
    addresses = {entry[name].data_ptr() for entry in state_dict["state"].values() for name in names}
    assert len(addresses) == len(names) * len(list(model.parameters()))


def test_averaged_buffers_are_of_the_last_k_too() -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, LAWA(k=2), buffers=model.buffers())
    seen = []
    for step in range(4):
        train(model, optimizer, 1, first=step)
        seen.append(values(model.buffers()))
    with optimizer.swap_to_averaged():
        *statistics, batches = values(model.buffers())
    assert same(statistics, recurrence(SWA(), [each[:2] for each in seen[-2:]]))
    assert batches == 4


def test_the_swap_and_a_teacher_have_the_mean() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, LAWA(k=3))
    teacher = optimizer.averaged_model(model)
    snapshots = train(model, optimizer, 7)
    expected = recurrence(SWA(), snapshots[-3:])
    assert same(teacher.parameters(), expected)
    with optimizer.swap_to_averaged():
        assert same(model.parameters(), expected)
    assert same(model.parameters(), snapshots[-1])


@pytest.mark.parametrize("n_averaged", [1, 2, 5])
def test_an_exported_average_stands_for_as_many_snapshots_as_it_is_said_to(n_averaged: int) -> None:
    model = small_model()
    exported = {key: torch.full_like(value, 2.0) for key, value in model.state_dict().items()}
    optimizer = averaging_sgd(model, LAWA(k=3))
    optimizer.load_averaged_state_dict(model, exported, n_averaged=n_averaged)
    twos = [torch.full_like(weight, 2.0) for weight in model.parameters()]
    assert same(averages(optimizer, "lawa"), twos)
    (first, second) = train(model, optimizer, 2)
    stood_for = [twos] * min(n_averaged, 1)
    assert same(averages(optimizer, "lawa"), recurrence(SWA(), [*stood_for, first, second]))


def test_weights_that_are_added_had_always_their_present_values() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, LAWA(k=3))
    train(model, optimizer, 5)
    added = nn.Parameter(torch.full((1,), 6.0))
    optimizer.add_param_group({"params": [added]})
    update_with(optimizer, added, 9.0)
    assert optimizer.state[added]["averaged_lawa"].item() == 7


def saved(model: nn.Module, rule: Rule) -> dict[str, Any]:
    optimizer = averaging_sgd(model, {"one": rule})
    train(model, optimizer, 3)
    return optimizer.state_dict()


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        (
            LAWA(4),
            LAWA(3),
            "`state[0]['averaged_one_3']` belongs to no rule of this optimizer ('one').",
        ),
        (LAWA(3), LAWA(4), "`state[0]['averaged_one_3']` must be a tensor, got None."),
        (EMA(), LAWA(2), "`state[0]['averaged_one_1']` must be a tensor, got None."),
        (
            LAWA(2),
            EMA(),
            "`state[0]['averaged_one_1']` belongs to no rule of this optimizer ('one').",
        ),
    ],
    ids=["fewer", "more", "from_ema", "to_ema"],
)
def test_snapshots_of_another_rule_or_length_are_refused(
    before: Rule, after: Rule, message: str
) -> None:
    model = small_model()
    state_dict = saved(model, before)
    optimizer = averaging_sgd(model, {"one": after})
    with pytest.raises(ValueError, match=re.escape(message)):
        optimizer.load_state_dict(state_dict)
    assert len(optimizer.state) == 0


@pytest.mark.parametrize("key", ["averaged_one", "averaged_one_1"])
def test_a_checkpoint_without_one_of_its_snapshots_is_refused(key: str) -> None:
    model = small_model()
    state_dict = saved(model, LAWA(3))
    for entry in state_dict["state"].values():
        del entry[key]
    optimizer = averaging_sgd(model, {"one": LAWA(3)})
    with pytest.raises(ValueError, match=rf"`state\[0\]\['{key}'\]` must be a tensor, got None"):
        optimizer.load_state_dict(state_dict)


@pytest.mark.parametrize("key", ["one", "one_2"])
def test_a_checkpoint_without_snapshots_of_buffers_is_refused(key: str) -> None:
    model = model_with_batch_norm()
    optimizer = averaging_sgd(model, {"one": LAWA(3)}, buffers=model.buffers())
    train(model, optimizer, 3)
    state_dict = optimizer.state_dict()
    del state_dict["averaged_buffers"][key]
    with pytest.raises(ValueError, match=rf"`averaged_buffers\['{key}'\]` must be a list of 3"):
        optimizer.load_state_dict(state_dict)


def test_an_average_named_as_a_snapshot_is_refused() -> None:
    rules: dict[str, Rule] = {"last_1": EMA(), "last": LAWA(2), "last_2": EMA()}
    with pytest.raises(
        ValueError, match=r"`rule` must not name an average 'last_1', which is a snapshot of"
    ):
        averaging_sgd(small_model(), rules)


def test_a_rule_of_ones_own_may_be_over_the_last_weights() -> None:
    """Of the last three weights the latest has the share 1/4, the two before it the rest."""

    class Fading(Rule):
        snapshots = 2

        def weight(self, n_averaged: int) -> float:
            return 0.5**n_averaged

    weight = nn.Parameter(torch.zeros(1))
    optimizer = AveragingOptimizer(SGD([weight], lr=1.0), Fading())
    found: list[Tensor] = []
    for value in (4.0, 8.0, 16.0, 32.0, 64.0):
        update_with(optimizer, weight, value)
        found += averages(optimizer, "fading")
    # The last three: (4 + 8) / 2 and a quarter toward 16, (8 + 16) / 2 and a quarter toward 32, …
    assert [each.item() for each in found] == [4, 6, 8.5, 17, 34]


class Oldest(Rule):
    """The oldest of the last three weights, of which later ones have no share."""

    snapshots = 2

    def weight(self, n_averaged: int) -> float:
        return 0.0


def test_snapshots_of_share_0_leave_the_oldest_weights() -> None:
    model = small_model()
    optimizer = averaging_sgd(model, {"oldest": Oldest()})
    snapshots = train(model, optimizer, 6)
    assert same(averages(optimizer, "oldest"), snapshots[-3])
