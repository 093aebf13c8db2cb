"""All averages of one optimizer: which weights they are of, their updates, and their entries."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from weakref import ref

import torch
from torch import Tensor
from torch.optim import Optimizer

from averaging_optim._averages.average import Average, Counter
from averaging_optim._averages.copies import Given
from averaging_optim._averages.entries import AVERAGE, Entries
from averaging_optim._averages.moving import move_toward
from averaging_optim._averages.past import TrainedPast, trains
from averaging_optim._averages.rounding import move_toward_at_random, seed_of
from averaging_optim._averages.sources import Buffers, Sources
from averaging_optim._averages.state import State
from averaging_optim._averages.store import GroupedTensors, sums_in_place_of
from averaging_optim._averages.swap import Combination, SwapPart, SwapState
from averaging_optim._checks import check_real
from averaging_optim._rules import Rule
from averaging_optim._warnings import is_called_by, warn_user

STEPS = "averaging_steps"
SKIPPED = "n_skipped"
COUNT = "n_averaged_"


def is_count(key: object) -> bool:
    """Return whether a key in a parameter group is that of an average's count."""
    return isinstance(key, str) and key.startswith(COUNT)


class Averages(Mapping[str, Average]):
    """Name → average, updated together.

    steps: optimizer steps so far.
    skipped: updates left out because of numbers that are not finite.
    each: all averages, as `values()` has them.
    stores: key after "averaged_" → where that average or snapshot is kept.
    sources: what is averaged.
    kept_buffers: name → the updates that its averages of buffers stand for, if these were loaded
        before the others.
    """

    def __init__(
        self,
        rules: Mapping[str, Rule],
        optimizer: Optimizer,
        buffers: Buffers,
        is_excluded: Callable[[Tensor], bool],
        dtype: torch.dtype | None,
        device: torch.device | None,
        rounds_at_random: bool,
        skip_nonfinite: bool,
    ) -> None:
        self._by_name = {
            name: Average(name, rule, Counter(COUNT + name, optimizer), dtype, device)
            for name, rule in rules.items()
        }
        self.each = tuple(self._by_name.values())
        self.rules = rules
        self.steps = Counter(STEPS, optimizer)
        self.skipped = Counter(SKIPPED, optimizer)
        self.stores = {
            key: store for average in self.values() for key, store in average.stores.items()
        }
        self.buffers = buffers
        self.sources = Sources(optimizer, buffers, is_excluded, self.stores.values())
        self._optimizer = optimizer
        self._rounds_at_random = rounds_at_random
        self._skip_nonfinite = skip_nonfinite
        self.swap = SwapState()
        self._entries = Entries(self.stores, buffers, self.swap)
        self.kept_buffers: dict[str, int] = {}
        self._unchecked: set[Tensor] = set()
        self._ready: tuple[object, ...] = ()
        self._grouped: dict[tuple[str, ...], GroupedTensors] = {}
        self._own_state: MutableMapping[Any, Any] = defaultdict(dict)
        self._state: State | None = None
        self.is_stepping = False
        self._has_told_of_frozen = False
        self._past = TrainedPast()
        self.given = Given(self._parameters())
        self._count_from_state()

    def __getitem__(self, name: str) -> Average:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self._by_name)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_state": None}

    def _count_from_state(self) -> None:
        """Begin at 0, or where the state was saved that the optimizer has loaded."""
        self.drop_counts_of_others()
        is_loaded = any(map(self._entries.of, self.state))
        for average in self.values():
            average.n_averaged.value = average.n_averaged.value if average.tensors.tensors else 0
        for counter in (self.steps, self.skipped):
            counter.value = counter.value if is_loaded else 0

    def counters(self) -> list[Counter]:
        return [self.steps, self.skipped, *(average.n_averaged for average in self.values())]

    def spread_counters(self) -> None:
        """Let groups that were added by hand have the counters too."""
        for counter in self.counters():
            counter.value = counter.value

    def drop_counts_of_others(self) -> None:
        """Remove the counts of averages that there are none of here."""
        for group in self._optimizer.param_groups:
            for key in list(filter(is_count, group)):
                if key.removeprefix(COUNT) not in self:
                    del group[key]

    def look_up(self) -> Sources:
        """Return what is averaged, as it is now."""
        _ = self.state  # takes over averages that the wrapped optimizer has loaded by itself
        self.sources.look_up()
        return self.sources

    def begin(self) -> None:
        """Average by the rules that begin with the weights before the first step."""
        due = [each for each in self.each if each.rule.is_due(0)]
        if shares := {each: 1.0 for each in due if each.n_averaged.value == 0}:
            self.update(shares)

    def update(self, shares: Mapping[Average, float]) -> None:
        """Update these averages, or skip them all."""
        self.make()
        if not shares:
            return
        sources = self.sources.moving
        if self._skip_nonfinite and not self._stay_finite(sources):
            self.skipped.value += 1
            return
        writing = {
            each: share
            for each, share in shares.items()
            if each.rule.writes_back(each.n_averaged.value + 1)
        }
        for average, share in writing.items():  # first, so that the others average the result
            self._move(sources, {average: share})
            average.tensors.copy_to(sources)
        if len(writing) < len(shares):
            self._move(sources, {each: shares[each] for each in shares if each not in writing})
        if copied := self.buffers.copied:
            for average in shares:
                average.tensors.copy_from(copied)
        self.kept_buffers = {}
        for average in shares:
            if average.teachers:
                average.teach()

    def update_when_asked(self, averages: Iterable[Average]) -> None:
        """Update these averages, or let the weights switch to those that only wait for that."""
        switching = [
            each for each in averages if each.rule.switches_when_asked and each.n_averaged.value > 0
        ]
        # First, so that the others average the result.
        for average in switching:
            self.make()
            average.tensors.copy_to(self.sources.moving)
        self.update({each: each.share() for each in averages if each not in switching})

    def _move(self, sources: Sequence[Tensor], shares: Mapping[Average, float]) -> None:
        for average in shares:
            if average.snapshots:
                average.rebuild_from_snapshots(sources, at_random=self._rounds_at_random)
        # A share of 0 changes nothing, not even an average whose weights are infinite.
        moving = [average for average in shares if shares[average] > 0]
        if moving:
            names = tuple([average.name for average in moving])
            grouped = self._grouped.get(names)
            if grouped is None:
                grouped = self._grouped[names] = GroupedTensors()
            groups = grouped.groups(sources, [average.tensors for average in moving])
            factors = [shares[average] for average in moving]
            if self._rounds_at_random:
                seeds = [seed_of(each.name, each.n_averaged.value) for each in moving]
                move_toward_at_random(groups, factors, seeds)
            else:
                move_toward(groups, factors)
        for average in shares:
            average.count_update(sources, at_random=self._rounds_at_random)

    def _stay_finite(self, sources: Sequence[Tensor]) -> bool:
        # All averages are of the same dtypes, so that one speaks for the others.
        if not self.each[0].tensors.stays_finite(sources):
            return False
        # Those that were begun while their weights were not finite.
        unchecked = [source for source in sources if source in self._unchecked]
        for store in self.stores.values() if unchecked else ():
            store.restart_nonfinite(unchecked)
        self._unchecked.clear()
        return True

    def note_training(self) -> None:
        """Note that training begins, with the parameters that are there now."""
        if not self.given.has_begun:
            self.given.compare(self._parameters())
            self.given.has_begun = True

    def watch_steps(self) -> None:
        """See steps of the wrapped optimizer that are not taken through this one."""
        weak = ref(self)

        def note(*_: Any) -> None:
            # Not in a graph, which would be compiled again whenever what is noted changes.
            averages = None if torch.compiler.is_compiling() else weak()
            if averages is not None and not averages.is_stepping:
                averages._past.step = True

        if hasattr(self._optimizer, "_optimizer_step_post_hooks"):
            self._optimizer.register_step_post_hook(note)

    def note_use(self, name: str, value: object) -> None:
        """Note that an attribute of the wrapped optimizer was asked for."""
        if trains(name, value):
            self._past.method = name

    def note_update(self) -> None:
        self._past.step, self._past.method = False, ""

    def note_state(self) -> None:
        """Note that the wrapped optimizer has its state by loading, or in order to load."""
        self._past.has_state = bool(self.state.kept)
        self.state.list_averages()
        if self._skip_nonfinite:
            self._unchecked.update(self.sources.all)

    def note_loading(self, average: Average, n_averaged: int) -> None:
        """Note that an average was loaded, in part or whole, and stands for so many updates."""
        average.n_averaged.value = int(n_averaged)
        self.make(only_begun=True)
        average.teach()

    def note_buffers(self, counts: Mapping[str, int]) -> None:
        """Note that averages of buffers were loaded, which stand for so many updates."""
        self.kept_buffers = dict(counts)
        for average in self.each:
            average.teach()

    def tell_if_left_out(self) -> None:
        """Warn, once, if a checkpoint is being made that will not bring all averages back."""
        frozen = [each for each in self.sources.weights if not each.requires_grad]
        if not frozen or self._has_told_of_frozen:
            return
        if is_called_by("torch.distributed.checkpoint.state_dict"):
            self._has_told_of_frozen = True
            warn_user(
                f"{len(frozen)} parameters were averaged before they were frozen, and "
                "torch.distributed.checkpoint loads no state of frozen parameters. To get their "
                "averages back, load the checkpoint before you freeze them."
            )

    def tell_if_trained_past(self, average: Average) -> None:
        """Warn, once, if weights were trained that the average lacks."""
        if told := self._past.message(average, self.steps.value, bool(self.state.kept)):
            warn_user(told)
        if not self.given.has_begun:
            self.given.compare(self._parameters())
        if told := self.given.message():
            warn_user(told)

    def _parameters(self) -> list[Tensor]:
        return [p for group in self._optimizer.param_groups for p in group["params"]]

    def named(self, name: str | None) -> Average:
        """Return the average of this name, which may be None if there is only one.

        Raises:
            ValueError: there is none, or several and no name.
        """
        chosen = next(iter(self)) if name is None and len(self) == 1 else name
        if not isinstance(chosen, str) or chosen not in self:
            raise ValueError(f"`name` must be one of {', '.join(map(repr, self))}, got {name!r}.")
        return self[chosen]

    def restart(self, average: Average) -> None:
        """Start an average over at the present weights."""
        self.make()
        average.n_averaged.value = 0
        average.start_afresh()

    def let_go(self, parameters: Sequence[Tensor]) -> None:
        """Keep no averages of these, until some are needed, which start at the present values."""
        for store in self.stores.values():
            store.drop(parameters)
        self._ready = ()

    def make(self, *, only_begun: bool = False) -> None:
        """Let every source have averages that fit it, and no other.

        Args:
            only_begun: leave out averages that have no tensors yet.
        """
        _ = self.state  # see `look_up`
        (sources := self.sources).look_up()
        shapes = [source.shape for source in sources.all]
        ready = sources.changes, shapes, self._entries.changes
        if ready == self._ready:
            return
        if only_begun:
            self._fit([each for each in self.each if each.tensors.tensors])
        else:
            self._refuse_foreign_keys()
            self._fit(self.each)
            self._ready = ready

    def _fit(self, averages: Iterable[Average]) -> None:
        self._let_go_of_left()
        sources = self.sources.all
        if self._skip_nonfinite:
            begun = self.each[0].tensors.tensors
            self._unchecked |= {source for source in sources if source not in begun}
        misfits: dict[str, list[Tensor]] = {}
        for average in averages:
            is_here = average.has_counted or average.tensors.changes > 0
            if not is_here and sources and average.n_averaged.value > 0:
                average.n_averaged.value = 0
                warn_user(
                    f"The parameter groups count updates of {average.name!r}, but the average "
                    "was not loaded: it starts at the present weights."
                )
            # Buffers may have another shape each time, as caches have.
            if misfit := [each for each in average.fit(sources) if each not in self.buffers]:
                misfits[average.name] = misfit
        if misfits:
            names = ", ".join(map(repr, misfits))
            found = (tuple(each.shape) for misfit in misfits.values() for each in misfit)
            shapes = ", ".join(map(str, dict.fromkeys(found)))
            warn_user(
                f"Parameters changed their shapes to {shapes}: their averages {names} start at the "
                "present values. To keep an average, resize it too: "
                '`optimizer.state[parameter]["averaged_<name>"]`.'
            )

    def _let_go_of_left(self) -> None:
        """Drop the averages of what has left the parameter groups or the model."""
        present = self.sources.present()
        left = [parameter for parameter in self._entries.parameters() if parameter not in present]
        if left:
            self.state.take_out(left)
            self.let_go(left)

    def _refuse_foreign_keys(self) -> None:
        for entry in self.state.kept.values():
            if isinstance(entry, dict):
                for key in self._entries.stores.keys() & entry.keys():
                    raise ValueError(
                        f"`rule` must not name an average {key.removeprefix(AVERAGE)!r}: "
                        f"{type(self._optimizer).__name__} has its own state {key!r}. Choose "
                        "another name."
                    )

    @property
    def state(self) -> State:
        """The state of the optimizer with the averages in it, one object until it is replaced."""
        kept = getattr(self._optimizer, "state", self._own_state)
        if self._state is None or self._state.kept is not kept:
            # Made, or replaced by a loading of its own, the wrapped optimizer's state is no sign.
            self._past.has_state = bool(kept)
            has_stepped = self.steps.value > 0
            self._state = State(
                kept,
                self._entries,
                lists_averages=has_stepped or bool(kept),
                is_fresh=not has_stepped,
            )
            self._take_over(kept)
        return self._state

    @state.setter
    def state(self, value: Mapping[Any, Any]) -> None:
        old, parts = self.state, {}
        if not (isinstance(value, State) and value.belongs_to(self._entries)):
            parts = {key: each for key, each in value.items() if self._entries.are_in(each)}
            for key, entry in parts.items():
                self._entries.check(key, entry)
            kept = (
                value
                if not parts and isinstance(value, dict)
                else defaultdict(
                    getattr(value, "default_factory", None),
                    {key: each for key, each in value.items() if key not in parts},
                )
            )
            value = State(kept, self._entries, lists_averages=False, is_fresh=old.is_fresh)
        old.put_aside()
        # Any mapping will do, as with a bare optimizer.
        optimizer: Any = self._optimizer
        optimizer.state = value.kept
        self._state = value
        value.put_back()
        value.update(parts)

    def combined(self, factors: Mapping[str, float]) -> Combination:
        """Return the sum of averages, and of the weights, by name.

        Raises:
            TypeError, ValueError: a name or a factor is none.
        """
        names = ", ".join(map(repr, [*self, "weights"]))
        if not factors or "weights" in self:
            raise ValueError(f"`name` must map some of {names} to factors, got {factors!r}.")
        for name, factor in factors.items():
            if name not in self and name != "weights":
                raise ValueError(f"`name` must map some of {names} to factors, got {name!r}.")
            check_real(f"name[{name!r}]", factor, "(-∞, ∞)")
        return Combination({name: float(factor) for name, factor in factors.items()})

    def swap_to(self, average: Average | Combination, *, in_place: bool) -> SwapPart:
        """Return what enters and leaves a swap to the average, or the sum of some."""

        @contextmanager
        def move() -> Iterator[None]:
            if self.is_stepping:
                raise RuntimeError(
                    f"`swap_to_averaged({average.name!r})` is not allowed while `step` runs. "
                    "Swap before or after it, not in its closure or hooks."
                )
            if torch._C._are_functorch_transforms_active():
                # Whose gradients would be of the weights that are there after the block.
                raise RuntimeError(
                    f"`swap_to_averaged({average.name!r})` is not allowed inside a function that "
                    "torch.func transforms. Call the transformed function inside the block."
                )
            if isinstance(average, Combination):
                with self._summed(average.name):
                    yield
                return
            if average.n_averaged.value == 0:
                yield
                return
            self.make(only_begun=True)
            sources = self.sources
            with average.tensors.in_place_of(
                sources.weights, self.buffers.by_key.values(), sources.places(), exchanging=in_place
            ):
                yield

        return SwapPart(self.swap, average, move)

    def _summed(self, factors: Mapping[str, float]) -> AbstractContextManager[None]:
        self.make(only_begun=True)
        # What has not averaged yet is the weights.
        begun = {
            name: factor
            for name, factor in factors.items()
            if name in self and self[name].n_averaged.value > 0
        }
        own = sum(factors[name] for name in factors if name not in begun)
        return sums_in_place_of(
            self.sources.weights,
            self.buffers.averaged,
            own,
            [(factor, self[name].tensors) for name, factor in begun.items()],
            self.sources.places(),
        )

    @contextmanager
    def writing(self, call: str) -> Iterator[None]:
        """Keep swaps from being entered, or raise a RuntimeError that names the call inside one."""
        with self.swap.lock:
            self.swap.refuse(call)
            yield

    def _take_over(self, kept: MutableMapping[Any, Any]) -> None:
        """Move averages here from where the optimizer itself has loaded them."""
        for parameter in [key for key, entry in kept.items() if self._entries.are_in(entry)]:
            entry = kept[parameter]
            averages = {key: entry[key] for key in self._entries.stores if key in entry}
            self._entries.write(parameter, averages)
            for key in averages:
                del entry[key]
            if not entry:  # optimizers take an entry for initialised
                del kept[parameter]
