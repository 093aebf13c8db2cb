"""Random lives of an optimizer, beside a bare one and averages kept in float64.

Weights, the wrapped optimizer's state, counters, loading and swapping are exact. Averages are
compared with the recurrence in float64, within the roundings that their dtype has made so far.
"""

from __future__ import annotations

import copy
import signal
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from threading import Thread
from typing import Any

import pytest
import torch
from faults import AtInstruction
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from ledger import Ledger
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer
from training import frozen, same, through_a_file

from averaging_optim import (
    EMA,
    LAWA,
    SWA,
    T_ADEMA,
    AveragingOptimizer,
    Lookahead,
    Rule,
    SwitchEMA,
)

Group = dict[str, Any]

# Some lives train under a rule that averages on demand alone, and never demand it.
pytestmark = pytest.mark.filterwarnings("ignore:The average .* misses training steps:UserWarning")


class Model(nn.Module):
    """Weights in groups that can be added to, and statistics."""

    mean: Tensor
    batches: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList()
        self.register_buffer("mean", torch.zeros(2))
        self.register_buffer("batches", torch.tensor(0))


GROUPS = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
        "shapes": st.lists(st.sampled_from([(), (3,), (2, 2)]), min_size=1, max_size=2),
        "average": st.booleans(),
    }
)
EVERY = st.sampled_from([1, 1, 2, 3, None])
RULES = st.one_of(
    st.builds(EMA, st.floats(0, 1), every=EVERY),
    st.builds(SWA, start=st.integers(0, 4), every=EVERY),
    st.builds(T_ADEMA, st.floats(0, 1), st.floats(0.1, 100), every=EVERY),
    st.builds(LAWA, st.integers(2, 4), every=EVERY),
    st.builds(Lookahead, st.floats(0, 1), start=st.integers(0, 2), every=EVERY),
    st.builds(SwitchEMA, st.floats(0, 1), start=st.integers(0, 2), every=st.integers(1, 3)),
)
OPTIMIZERS: dict[str, Callable[[list[Group]], Optimizer]] = {
    "sgd": lambda groups: SGD(groups, lr=0.1, momentum=0.9),
    "adam": lambda groups: Adam(groups, lr=0.1, amsgrad=True),
}
SEEDS = st.integers(0, 2**31)
CHOICES = st.integers(0, 3)
# Whether something is done in another thread, which has ended when it is.
ELSEWHERE = st.booleans()
SIGNALS = signal.SIGINT, signal.SIGTERM


class Life(RuleBasedStateMachine):
    """Everything that may happen to an optimizer, in any order."""

    @initialize(
        rules=st.dictionaries(st.sampled_from("abcd"), RULES, min_size=1, max_size=4),
        groups=st.lists(GROUPS, min_size=1, max_size=3),
        with_buffers=st.booleans(),
        inner=st.sampled_from(sorted(OPTIMIZERS)),
        dtype=st.sampled_from([None, None, torch.float64, torch.bfloat16]),
        skip_nonfinite=st.booleans(),
    )
    def is_born(
        self,
        rules: dict[str, Rule],
        groups: list[Group],
        with_buffers: bool,
        inner: str,
        dtype: torch.dtype | None,
        skip_nonfinite: bool,
    ) -> None:
        self.ledger = Ledger(rules, dtype, skip_nonfinite)
        self.with_buffers, self.inner = with_buffers, OPTIMIZERS[inner]
        self.model, self.twins = Model(), list[nn.Parameter]()
        self.groups, self.twin_groups = list[Group](), list[Group]()
        groups[0]["average"] = True
        for group in groups:
            self.new_group(group)
        self.optimizer, self.bare = self.wrapped(), self.inner(copied(self.twin_groups))
        self.saved: tuple[dict[str, Any], dict[str, Any], Ledger] | None = None
        self.teachers: list[tuple[str, nn.Module]] = []
        self.handlers = [signal.getsignal(number) for number in SIGNALS]
        self.is_outside()

    def is_outside(self) -> None:
        # The swaps that this thread is in, and those of another one.
        self.swaps: dict[bool, list[ExitStack]] = {False: [], True: []}
        self.swapped_to = ""
        self.is_in_place = self.is_written = False
        self.outside: dict[str, Any] = {}
        self.handed_out: list[Any] = []

    def new_group(self, drawn: Group) -> None:
        """Note a group of new weights, and of the same ones for the bare optimizer."""
        torch.manual_seed(len(self.model.weights))
        weights = [nn.Parameter(torch.randn(s).to(drawn["dtype"])) for s in drawn["shapes"]]
        twins = [nn.Parameter(weight.detach().clone()) for weight in weights]
        self.model.weights.extend(weights)
        self.twins += twins
        self.groups.append({"params": weights, "average": drawn["average"]})
        self.twin_groups.append({"params": twins, "average": drawn["average"]})

    def wrapped(self) -> AveragingOptimizer:
        return AveragingOptimizer(
            self.inner(copied(self.groups)),
            self.ledger.rules,
            buffers=self.model.buffers() if self.with_buffers else (),
            dtype=self.ledger.dtype,
            skip_nonfinite=self.ledger.skips_nonfinite,
        )

    @rule(
        seed=SEEDS, without=st.sets(st.integers(0, 7)), times=st.integers(1, 6), elsewhere=ELSEWHERE
    )
    def trains(self, seed: int, without: set[int], times: int, elsewhere: bool) -> None:
        for time in range(times):
            self.steps(seed + time, without, elsewhere)

    def steps(self, seed: int, without: set[int], elsewhere: bool) -> None:
        if not self.swapped_to:
            self.sees_a_batch(seed)
            give_gradients(self.model.weights, seed, without)
            give_gradients(self.twins, seed, without)
        present = self.present()
        if self.is_allowed("step", lambda: in_thread(elsewhere, self.optimizer.step)):
            can_move = any(group["lr"] for group in self.bare.param_groups) or any(
                twin.grad is not None and twin.grad.any() for twin in self.twins
            )
            self.ledger.begin(present, can_move)
            self.bare.step()
            self.ledger.step(present, can_move, self.writing_to(present))

    @rule(choice=CHOICES, all_of_them=st.booleans())
    def averages_now(self, choice: int, all_of_them: bool) -> None:
        name = None if all_of_them else self.name(choice)
        present = self.present()
        if self.is_allowed("update_averages", lambda: self.optimizer.update_averages(name)):
            names = self.ledger.rules if name is None else [name]
            self.ledger.update(names, present, self.writing_to(present))

    @rule(choice=CHOICES, in_place=st.booleans(), elsewhere=ELSEWHERE)
    def enters_a_swap(self, choice: int, in_place: bool, elsewhere: bool) -> None:
        name, swap = self.name(choice), ExitStack()

        def enter() -> None:
            swap.enter_context(self.optimizer.swap_to_averaged(name, in_place=in_place))

        if self.swapped_to not in ("", name):
            self.is_allowed(f"swap_to_averaged('{name}')", lambda: in_thread(elsewhere, enter))
            return
        if not self.swapped_to:
            self.outside, self.handed_out = self.everything(), self.hands_out()
            self.was_handed_out = frozen(self.handed_out)
            self.swapped_to, self.is_in_place = name, in_place
        in_thread(elsewhere, enter)
        self.swaps[elsewhere].append(swap)

    @precondition(lambda self: self.swapped_to)
    @rule(by_exception=st.booleans(), elsewhere=ELSEWHERE)
    def leaves_a_swap(self, by_exception: bool, elsewhere: bool) -> None:
        elsewhere = elsewhere if self.swaps[elsewhere] else not elsewhere
        swap = self.swaps[elsewhere].pop()
        if by_exception:
            with pytest.raises(KeyboardInterrupt):
                in_thread(elsewhere, lambda: leave_by_exception(swap))
        else:
            in_thread(elsewhere, swap.close)
        if not any(self.swaps.values()):
            assert self.everything() == self.outside
            assert frozen(self.seen_inside) == self.outside["optimizer"]
            assert frozen(self.handed_out) == self.was_handed_out
            self.is_outside()

    def hands_out(self) -> list[Any]:
        """Return tensors out of all that gives averages away."""
        state = self.optimizer.state
        entries = [dict(state[weight]) for weight in self.model.weights if weight in state]
        teachers = [teacher.state_dict() for _, teacher in self.teachers]
        return [self.optimizer.state_dict(), entries, teachers]

    @precondition(lambda self: any(self.ledger.counts.values()))
    @rule(
        choice=CHOICES,
        in_place=st.booleans(),
        number=st.sampled_from(SIGNALS),
        file=st.sampled_from(["caches.py", "moving.py", "signals.py", "store.py", "swap.py"]),
        instructions=st.sets(SEEDS, min_size=1, max_size=5),
    )
    def is_interrupted(
        self,
        choice: int,
        in_place: bool,
        number: signal.Signals,
        file: str,
        instructions: set[int],
    ) -> None:
        """While it enters or leaves a swap, at any instruction."""
        begun = [name for name, count in sorted(self.ledger.counts.items()) if count]
        name = self.swapped_to or begun[choice % len(begun)]
        before, saved = self.everything(), list[Any]()

        def save_and_stop(*_: object) -> None:
            saved.append(frozen(self.optimizer.state_dict()))
            raise SystemExit

        def swap(instruction: int) -> AtInstruction:
            at = AtInstruction(instruction, lambda: signal.raise_signal(number), file)
            with suppress(SystemExit), at:
                with self.optimizer.swap_to_averaged(name, in_place=in_place):
                    pass
                assert at.left > 0 or instruction == 0
            return at

        former = signal.signal(number, save_and_stop)
        try:
            count = -swap(0).left
            for instruction in instructions if count else ():
                fault = swap(instruction % count + 1)
                assert saved == [before["optimizer"]] * (fault.left <= 0)
                assert self.everything() == before
                saved.clear()
        finally:
            signal.signal(number, former)

    @precondition(
        lambda self: (
            self.swapped_to and not self.is_in_place and self.ledger.counts[self.swapped_to]
        )
    )
    @rule(choice=CHOICES, value=st.sampled_from([torch.nan, torch.inf, 7.0]))
    def writes_into_a_weight_inside(self, choice: int, value: float) -> None:
        flags = [group["average"] for group in self.groups for _ in group["params"]]
        averaged = [w for w, flag in zip(self.model.weights, flags, strict=True) if flag]
        averaged[choice % len(averaged)].data.fill_(value)
        self.is_written = True

    @precondition(lambda self: self.swapped_to and self.with_buffers)
    @rule(seed=SEEDS)
    def estimates_statistics_inside(self, seed: int) -> None:
        if self.ledger.counts[self.swapped_to]:
            self.sees_a_batch(seed)

    @rule(elsewhere=ELSEWHERE)
    def saves(self, elsewhere: bool) -> None:
        state_dict = through_a_file(in_thread(elsewhere, self.optimizer.state_dict))
        assert not self.swapped_to or frozen(state_dict) == self.outside["optimizer"]
        bare = copy.deepcopy(self.bare.state_dict())
        self.saved = state_dict, bare, copy.deepcopy(self.ledger)

    @precondition(lambda self: self.saved)
    @rule(fresh=st.booleans())
    def loads(self, fresh: bool) -> None:
        assert self.saved is not None
        # torch keeps the tensors that it is given, and trains them.
        state_dict, bare, ledger = copy.deepcopy(self.saved)
        if fresh and not self.swapped_to:
            self.starts_anew()
        given = frozen(state_dict)
        if len(state_dict["param_groups"]) != len(self.groups) and not self.swapped_to:
            self.is_refused(lambda: self.optimizer.load_state_dict(state_dict), "`param_groups`")
        elif self.is_allowed("load_state_dict", lambda: self.optimizer.load_state_dict(state_dict)):
            self.bare.load_state_dict(bare)
            self.ledger.load(ledger, self.present())
            self.ledger.make(self.averaged(), only_begun=True)
        assert frozen(state_dict) == given

    def starts_anew(self) -> None:
        """Have new optimizers, as a new process would."""
        self.optimizer, self.bare = self.wrapped(), self.inner(copied(self.twin_groups))
        ledger = self.ledger
        self.ledger = Ledger(ledger.rules, ledger.dtype, ledger.skips_nonfinite)
        self.teachers = []

    @precondition(lambda self: not self.swapped_to)
    @rule(choice=CHOICES, damage=st.sampled_from(["count", "shape", "lost", "unknown", "group"]))
    def loads_a_damaged_dict(self, choice: int, damage: str) -> None:
        key, state_dict = self.name(choice), copy.deepcopy(self.optimizer.state_dict())
        entry = state_dict["state"].get(0, {})
        if damage == "group":
            state_dict["param_groups"].append({"params": []})
        elif damage == "unknown":
            state_dict["state"][0] = {**entry, "averaged_x": torch.ones(())}
            state_dict["param_groups"][0]["n_averaged_x"] = 1
        elif damage == "count" or f"averaged_{key}" not in entry:
            state_dict["param_groups"][0][f"n_averaged_{key}"] = -1
        elif damage == "shape":
            entry[f"averaged_{key}"] = torch.ones(7)
        else:
            entry[f"averaged_{key}"] = None
        self.is_refused(lambda: self.optimizer.load_state_dict(state_dict), "`(state|param_group)")

    @precondition(lambda self: len(self.groups) < 5)
    @rule(drawn=GROUPS)
    def gets_more_weights(self, drawn: Group) -> None:
        if self.swapped_to:
            group = {"params": [nn.Parameter(torch.ones(1))]}
            self.is_allowed("add_param_group", lambda: self.optimizer.add_param_group(group))
            return
        self.new_group(drawn)
        self.optimizer.add_param_group(dict(self.groups[-1]))
        self.bare.add_param_group(dict(self.twin_groups[-1]))
        if any(self.ledger.averages.values()):
            self.ledger.make(self.averaged())

    @precondition(lambda self: not self.swapped_to)
    @rule(choice=CHOICES, trains=st.booleans())
    def freezes_or_thaws(self, choice: int, trains: bool) -> None:
        for weights in (self.model.weights, self.twins):
            weight = list(weights)[choice % len(weights)]
            weight.grad = None
            weight.requires_grad_(trains)
        self.ledger.make(self.averaged(), only_begun=True)

    @precondition(lambda self: not self.swapped_to)
    @rule(lr=st.sampled_from([0.0, 0.1]))
    def changes_its_learning_rate(self, lr: float) -> None:
        for group in [*self.optimizer.param_groups, *self.bare.param_groups]:
            group["lr"] = lr

    @precondition(lambda self: self.ledger.skips_nonfinite and not self.swapped_to)
    @rule(choice=CHOICES, value=st.sampled_from([torch.nan, torch.inf, -torch.inf, 1.0]))
    def diverges_or_heals(self, choice: int, value: float) -> None:
        for weights in (self.model.weights, self.twins):
            with torch.no_grad():
                list(weights)[choice % len(weights)].fill_(value)

    @rule()
    def is_copied(self) -> None:
        both = self.model, self.optimizer
        if self.is_allowed("copy or pickle", lambda: copy.deepcopy(both)):
            self.model, self.optimizer = copy.deepcopy(both)
            weights = iter(self.model.weights)
            for group in self.groups:
                group["params"] = [next(weights) for _ in group["params"]]
            self.teachers = []

    @rule(choice=CHOICES)
    def exports(self, choice: int) -> None:
        name = self.name(choice)
        if self.swapped_to not in ("", name):
            call = f"swap_to_averaged('{name}')"
            self.is_allowed(call, lambda: self.optimizer.averaged_state_dict(self.model, name))
            return
        if self.is_written:
            return
        exported = self.optimizer.averaged_state_dict(self.model, name)
        with self.optimizer.swap_to_averaged(name):
            assert same(exported.values(), self.model.state_dict().values())

    @rule(choice=CHOICES, source=CHOICES, n_averaged=st.integers(1, 5))
    def starts_an_average_from_another(self, choice: int, source: int, n_averaged: int) -> None:
        name, source_name = self.name(choice), self.swapped_to or self.name(source)
        exported = self.optimizer.averaged_state_dict(self.model, source_name)
        if self.is_allowed(
            "load_averaged_state_dict",
            lambda: self.optimizer.load_averaged_state_dict(
                self.model, exported, name, n_averaged=n_averaged
            ),
        ):
            self.ledger.start(name, {key: exported[key] for key in self.averaged()}, n_averaged)

    @precondition(lambda self: not self.swapped_to)
    @rule(choice=CHOICES)
    def gets_a_teacher(self, choice: int) -> None:
        name = self.name(choice)
        self.teachers.append((name, self.optimizer.averaged_model(self.model, name)))
        self.ledger.make(self.averaged())

    def teardown(self) -> None:
        for swap in [*self.swaps[False], *self.swaps[True]] if hasattr(self, "swaps") else []:
            swap.close()

    @invariant()
    def weights_and_state_are_those_of_the_bare_optimizer(self) -> None:
        if not self.swapped_to:
            assert same(self.model.weights, self.twins)
        state, bare = self.optimizer.wrapped.state_dict(), self.bare.state_dict()
        assert frozen(state["state"]) == frozen(bare["state"])

    @invariant()
    def counters_are_as_counted_in_every_group(self) -> None:
        expected = self.ledger.counters()
        for group in self.optimizer.state_dict()["param_groups"]:
            assert {key: group[key] for key in expected} == expected

    @invariant()
    def averages_are_as_averaged_in_float64(self) -> None:
        for name, expected in self.ledger.averages.items():
            kept = self.kept(name)
            assert kept.keys() == expected.keys()
            assert all(expected[key].is_near(average) for key, average in kept.items())

    @invariant()
    def averaged_models_hold_the_averages(self) -> None:
        if not self.is_in_place:
            for name, teacher in self.teachers:
                kept, held = self.kept(name), teacher.state_dict()
                shared = held.keys() & kept.keys()
                assert same([held[key] for key in shared], [kept[key] for key in shared])

    @invariant()
    def a_swap_shows_the_average_and_hides_from_the_state_dict(self) -> None:
        if self.swapped_to:
            self.seen_inside = self.optimizer.state_dict()
            assert frozen(self.seen_inside) == self.outside["optimizer"]
            assert self.is_in_place or frozen(self.handed_out) == self.was_handed_out
            if self.ledger.counts[self.swapped_to] and not self.is_written:
                kept, held = self.kept(self.swapped_to), dict(self.model.named_parameters())
                for key in kept.keys() & held.keys():
                    # Exactly, but that a NaN that is converted may have other bits.
                    torch.testing.assert_close(
                        held[key].detach(),
                        kept[key].to(held[key].dtype),
                        rtol=0,
                        atol=0,
                        equal_nan=True,
                    )

    @invariant()
    def signals_are_handled_as_before_outside_of_swaps_of_this_thread(self) -> None:
        if not self.swaps[False]:
            assert [signal.getsignal(number) for number in SIGNALS] == self.handlers

    def name(self, choice: int) -> str:
        return sorted(self.ledger.rules)[choice % len(self.ledger.rules)]

    def averaged(self) -> dict[str, Tensor]:
        """Return key in the model's state dict → tensor, for all that is averaged.

        A weight that was frozen before there were averages has none of its own.
        """
        flags = [group["average"] for group in self.groups for _ in group["params"]]
        begun = {key for averages in self.ledger.averages.values() for key in averages}
        weights = {
            f"weights.{i}": weight
            for i, weight in enumerate(self.model.weights)
            if flags[i] and (weight.requires_grad or f"weights.{i}" in begun)
        }
        return {**weights, **(dict(self.model.named_buffers()) if self.with_buffers else {})}

    def present(self) -> dict[str, Tensor]:
        """Return what `averaged` does, of the bare optimizer's weights and copied buffers."""
        twins = {f"weights.{i}": twin for i, twin in enumerate(self.twins)}
        return {key: twins.get(key, tensor.clone()) for key, tensor in self.averaged().items()}

    def writing_to(self, present: dict[str, Tensor]) -> Callable[[str], None]:
        def write_back(name: str) -> None:
            for key, average in self.kept(name).items():
                present[key].data.copy_(average)

        return write_back

    def kept(self, name: str) -> dict[str, Tensor]:
        """Return key → average, out of the state dict."""
        state_dict = self.optimizer.state_dict()
        buffers = state_dict.get("averaged_buffers", {}).get(name, [])
        of_buffers = zip(dict(self.model.named_buffers()), buffers, strict=False)
        entries = [state_dict["state"], state_dict.get("averaged_parameters", {})]
        of_weights = {
            f"weights.{i}": entry[f"averaged_{name}"]
            for each in entries
            for i, entry in each.items()
            if f"averaged_{name}" in entry
        }
        return {**of_weights, **dict(of_buffers)}

    def sees_a_batch(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.model.mean.normal_()
        self.model.batches += 1

    def everything(self) -> dict[str, Any]:
        optimizer = frozen(self.optimizer.state_dict())
        return {"model": frozen(self.model.state_dict()), "optimizer": optimizer}

    def is_allowed(self, call: str, act: Callable[[], Any]) -> bool:
        """Do it; inside a swap, let it be refused by name and change nothing."""
        if not self.swapped_to:
            act()
            return True
        before = self.everything()
        with pytest.raises(RuntimeError) as refusal:
            act()
        assert str(refusal.value).startswith(
            f"`{call}` is not allowed inside `swap_to_averaged({self.swapped_to!r})`."
        )
        assert self.everything() == before
        return False

    def is_refused(self, act: Callable[[], Any], message: str) -> None:
        before = self.everything()
        with pytest.raises(ValueError, match=message):
            act()
        assert self.everything() == before


def in_thread(elsewhere: bool, act: Callable[[], Any]) -> Any:
    """Return what this returns or raises in this thread, or in another one."""
    if not elsewhere:
        return act()
    outcome = Future[Any]()

    def run() -> None:
        try:
            outcome.set_result(act())
        except BaseException as error:
            outcome.set_exception(error)

    thread = Thread(target=run, daemon=True)
    thread.start()
    thread.join(60)  # which a lock that is never released would let wait for ever
    return outcome.result(0)


def leave_by_exception(swap: ExitStack) -> None:
    with swap:
        raise KeyboardInterrupt


def copied(groups: Iterable[Group]) -> list[Group]:
    return [dict(group) for group in groups]


def give_gradients(weights: Iterable[nn.Parameter], seed: int, without: set[int]) -> None:
    torch.manual_seed(seed)
    for i, weight in enumerate(weights):
        gradient = torch.randn_like(weight)
        weight.grad = gradient if weight.requires_grad and i not in without else None


TestLife = Life.TestCase
TestLife.settings = settings(stateful_step_count=50)


def test_hypothesis_tries_200_or_20000_lives_of_50_events_each() -> None:
    """Another module's import may set the number, as that of torch's own tests does."""
    assert TestLife.settings.max_examples in (200, 20_000)
    assert TestLife.settings.stateful_step_count == 50
