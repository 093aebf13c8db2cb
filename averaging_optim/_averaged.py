"""What you can do with averages: evaluate, copy, export and load them."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar, cast

from torch import Tensor, nn

from averaging_optim._averages.average import Average
from averaging_optim._averages.averages import Averages
from averaging_optim._averages.moving import detached_copy
from averaging_optim._averages.sharding import fsdp_modules
from averaging_optim._averages.sources import module_inside
from averaging_optim._averages.swap import Swap
from averaging_optim._averages.teachers import Teacher, averaged_copy, bind
from averaging_optim._checkpoints.exports import IncompatibleKeys, plain_keys, read_exported
from averaging_optim._checks import check_bool, check_integer, short_list

_Model = TypeVar("_Model", bound=nn.Module)
_Result = TypeVar("_Result")


class Averaged:
    """One optimizer, or several whose averages of one name are used as one."""

    def swap_to_averaged(
        self, name: str | Mapping[str, float] | None = None, *, in_place: bool = False
    ) -> Swap:
        """Evaluate with averaged weights: inside the block, they are in the model.

        Example:
            >>> import torch
            >>> from averaging_optim import SWA, AveragingOptimizer
            >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
            >>> optimizer = AveragingOptimizer(torch.optim.SGD([weight], lr=1.0), SWA())
            >>> optimizer.update_averages()
            >>> _ = weight.data.fill_(4.0)
            >>> with optimizer.swap_to_averaged():
            ...     weight.item()
            2.0
            >>> weight.item()
            4.0

        After the block, weights and buffers are bit for bit what they were before it, even after
        an exception or if code inside writes into them, as `torch.optim.swa_utils.update_bn`,
        `Embedding(max_norm=...)` and adapters that merge in `eval()` do. Averages are only read.
        Casting or moving the model inside is fine: the training weights come back in the new dtype
        and on the new device.

        The weights are backed up on the averages' device, which takes as much memory as they do.
        The parameters stay the same tensors in the same memory; only their values change. Ctrl-C
        and other signals with a Python handler are deferred while values move.

        Until a rule's first update, swapping to it has no effect. Swaps to the same average may
        overlap, in one thread or several: the weights come back at the end of the last one.

        Args:
            name: which average. You may leave it out if there is only one. A mapping
                name → factor, where "weights" is a name too, gives a weighted sum, computed in
                float32 or higher precision.
            in_place: exchange weights and averages through a few MiB of scratch memory instead of
                making a backup. Use it if memory is short, and then don't write into the weights
                inside: that would change the average. Tensors that you got earlier from a state
                dict or `averaged_model` hold the training weights inside, and an error on leaving
                can't be undone. Averages whose dtype or device differs from their weights', or that
                share memory, are backed up anyway.

        Raises:
            ValueError: there is no average of this name, or several and no name, or `in_place` is
                True for a weighted sum.
            RuntimeError: inside a swap to another average, while `step` runs, inside a function
                that torch.func transforms, or if you enter or leave the returned object twice.
            torch.OutOfMemoryError: there is no memory for the backup. Nothing has changed.
        """
        check_bool("in_place", in_place)
        if isinstance(name, Mapping):
            return self._swap_to_sum(name, in_place)
        chosen = self._chosen(name)
        for averages, average in chosen:
            averages.swap.refuse_if_superseded("swap_to_averaged")
            averages.tell_if_trained_past(average)
        return Swap([averages.swap_to(average, in_place=in_place) for averages, average in chosen])

    def evaluate_averages(self, evaluate: Callable[[], _Result]) -> dict[str, _Result]:
        """Call `evaluate` with the training weights and with each average; return the results.

        Example:
            >>> import torch
            >>> from averaging_optim import EMA, SWA, AveragingOptimizer
            >>> weight = torch.nn.Parameter(torch.tensor([2.0]))
            >>> sgd = torch.optim.SGD([weight], lr=1.0)
            >>> optimizer = AveragingOptimizer(sgd, {"fast": EMA(0.5), "mean": SWA()})
            >>> optimizer.update_averages()
            >>> _ = weight.data.fill_(4.0)
            >>> optimizer.evaluate_averages(weight.item)
            {'weights': 4.0, 'fast': 2.0, 'mean': 2.0}

        An average that has had no update yet gives the result of the training weights.

        Args:
            evaluate: called once for each. If it returns tensors of the model, it must copy them:
                `model.state_dict` would show the training weights afterwards.

        Returns:
            name → result. The first is "weights", for the training weights.

        Raises:
            RuntimeError: inside `swap_to_averaged`.
            ValueError: a rule is named "weights".
        """
        names = list(self._each[0].rules)
        for averages in self._each:
            averages.swap.refuse("evaluate_averages")
            if averages.rules.keys() != set(names):
                raise ValueError(
                    "`optimizers` must have averages of the same names, got "
                    f"{names} and {list(averages.rules)}. Evaluate inside `swap_to_averaged`."
                )
        if "weights" in names:
            raise ValueError(
                "`rule` must not name an average 'weights', the key of the training weights here. "
                "Choose another name."
            )
        results = {"weights": evaluate()}
        for name in names:
            with self.swap_to_averaged(name):
                results[name] = evaluate()
        return results

    def averaged_model(
        self, model: _Model, name: str | None = None, *, into: _Model | None = None
    ) -> _Model:
        """Return a copy of the model whose parameters are the averages.

        Example:
            >>> import torch
            >>> from averaging_optim import EMA, AveragingOptimizer
            >>> model = torch.nn.Linear(1, 1)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> optimizer = AveragingOptimizer(sgd, EMA(decay=0.99))
            >>> teacher = optimizer.averaged_model(model)
            >>> teacher.weight.requires_grad
            False

        The parameters share memory with the averages, so the copy is always up to date: use it as a
        teacher or target network, or to evaluate while training. They require no gradient, and have
        the dtype and device of the averages. Parameters that are not averaged are shared with the
        model. Until its first update, an average holds the weights from when it was made.

        Buffers are copied at each update: their averages if there are any, otherwise the model's. A
        module that updates its own buffers in train mode, such as BatchNorm, keeps its values as
        long as it stays in train mode.

        If you cast or move the copy, it stops following the average; the next update warns you.
        Don't use it inside `swap_to_averaged(in_place=True)`, where it holds the training weights.

        Args:
            model: a module whose trained parameters are averaged. If it is wrapped in
                DistributedDataParallel, DataParallel or torch.compile, the module inside is used.
            name: which average. You may leave it out if there is only one.
            into: another instance of the model, to use instead of a copy. For models that
                `copy.deepcopy` can't copy: with `torch.nn.utils.weight_norm`, locks or process
                groups, in TorchScript, or sharded by `fully_shard` (if all ranks have equal parts).

        Raises:
            ValueError: there is no such average; a parameter of the model requires a gradient and
                is neither averaged nor left out by `average=False` or `exclude`; the model can't be
                copied; or `into` is not another instance of it.
            TypeError: `into` is not a module.
            RuntimeError: the wrapped optimizer has been wrapped again.
        """
        chosen = self._chosen(name)
        inside = self.check_model(model)
        for averages, average in chosen:
            averages.swap.refuse_if_superseded("averaged_model")
            averages.tell_if_trained_past(average)
            averages.make()
        # Of a buffer that several optimizers average, a swap leaves the last one's average there.
        stores = [average.tensors for _, average in reversed(chosen)]
        made = averaged_copy(inside, stores) if into is None else bind(into, inside, stores)
        teacher = Teacher(made, inside, stores)
        for _, average in chosen:
            average.teachers[made] = teacher
        return cast("_Model", made)

    def averaged_state_dict(
        self,
        model: nn.Module,
        name: str | Mapping[str, float] | None = None,
        *,
        only_averaged: bool = False,
    ) -> dict[str, Any]:
        """Return `model.state_dict()` with averaged weights, as independent tensors.

        Example:
            >>> import torch
            >>> from averaging_optim import EMA, AveragingOptimizer
            >>> model = torch.nn.Linear(2, 1)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> optimizer = AveragingOptimizer(sgd, EMA(decay=0.99))
            >>> list(optimizer.averaged_state_dict(model))
            ['weight', 'bias']

        It loads into the plain model: names don't have the prefixes of DistributedDataParallel,
        DataParallel and torch.compile.

        Args:
            model: a module whose trained parameters are averaged.
            name: which average, or a weighted sum of several. See `swap_to_averaged`.
            only_averaged: leave out what is not averaged, such as the frozen weights under a LoRA.

        Raises:
            ValueError: there is no such average, or a parameter of the model requires a gradient
                and is neither averaged nor left out by `average=False` or `exclude`.
            RuntimeError: inside a swap to another average.
        """
        check_bool("only_averaged", only_averaged)
        inside = self.check_model(model)
        with self.swap_to_averaged(name):
            present = plain_keys(inside, inside.state_dict(keep_vars=True))
            averaged = {each for averages in self._each for each in averages.sources.all}
            return {
                key: detached_copy(value).contiguous()
                if isinstance(value, Tensor)
                else copy.deepcopy(value)
                for key, value in present.items()
                if not only_averaged or (isinstance(value, Tensor) and value in averaged)
            }

    def load_averaged_state_dict(
        self,
        model: nn.Module,
        state_dict: Mapping[str, Any],
        name: str | None = None,
        *,
        n_averaged: int = 1,
        strict: bool = True,
    ) -> IncompatibleKeys:
        """Start an average from exported weights. Inverse of `averaged_state_dict`.

        Example:
            >>> import torch
            >>> from averaging_optim import EMA, AveragingOptimizer
            >>> model = torch.nn.Linear(2, 1)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> optimizer = AveragingOptimizer(sgd, EMA(decay=0.99))
            >>> exported = {"weight": torch.ones(1, 2), "bias": torch.zeros(1)}
            >>> optimizer.load_averaged_state_dict(model, exported, n_averaged=1000)
            IncompatibleKeys(missing_keys=[], unexpected_keys=[])
            >>> optimizer.averaged_state_dict(model)["weight"]
            tensor([[1., 1.]])

        Args:
            model: a module with all parameters and buffers that are averaged.
            state_dict: from `averaged_state_dict`, or any state dict of the model. Entries of
                tensors that are not averaged are ignored. It is not modified.
            name: which average. You may leave it out if there is only one.
            n_averaged: how many updates the average represents, at least 1; with 0 the next update
                would overwrite it. `SWA` and other rules that count continue from here.
            strict: if False, load the entries that match. The other averages keep their values, or
                start at the present weights, and count as loaded too, except those of an optimizer
                for which no entry matched.

        Returns:
            `missing_keys`, which are averaged and were not loaded, and `unexpected_keys`, which
            were not used, as `torch.nn.Module.load_state_dict` does. An entry of the wrong shape is
            in both. With `strict=True` both are empty.

        Raises:
            ValueError: an argument is wrong or an entry doesn't match. Nothing has changed.
            TypeError: `n_averaged` is not an integer.
            RuntimeError: inside `swap_to_averaged`.
        """
        with ExitStack() as writing:
            for averages in self._each:
                writing.enter_context(averages.writing("load_averaged_state_dict"))
            chosen = self._chosen(name)
            check_integer("n_averaged", n_averaged, at_least=1)
            check_bool("strict", strict)
            inside = module_inside("model", model)
            sources = [averages.look_up() for averages, _ in chosen]
            values, incompatible = read_exported(inside, state_dict, sources, strict)
            for some in sources:
                some.tell_of_left_buffers(inside)
            targets = [
                (store, store.load_targets(each for each in averages.sources.all if each in values))
                for averages, average in chosen
                for store in average.stores.values()
            ]
            for store, target in targets:
                store.load(target, values)
            for averages, average in chosen:
                if not values.keys().isdisjoint(averages.sources.all):
                    averages.note_loading(average, n_averaged)
        return incompatible

    def check_model(self, model: nn.Module) -> nn.Module:
        """Check that every trained parameter of a model is averaged, or left out on purpose.

        Args:
            model: a module whose trained parameters are averaged.

        Returns:
            the module inside DistributedDataParallel, DataParallel or torch.compile.

        Raises:
            ValueError: a parameter requires a gradient and is neither averaged nor left out by
                `average=False` or `exclude`, or no parameter of the model is averaged.
        """
        inside = module_inside("model", model)
        for each in fsdp_modules(inside):
            each.reshard()  # after a forward alone, the root has other parameters
        sources = [averages.look_up() for averages in self._each]
        averaged = {source for some in sources for source in (*some.listed, *some.all)}
        if averaged.isdisjoint([*inside.parameters(), *inside.buffers()]):
            raise ValueError(
                "`model` must have parameters that this optimizer averages, got a "
                f"{type(inside).__name__} with none. Pass the model it was made for. If the "
                "optimizer trains copies of the weights, as DeepSpeed's does, use "
                "`AveragingOptimizer.of(model, rule)`."
            )
        raw = [
            name
            for name, each in inside.named_parameters()
            if each.requires_grad
            and each not in averaged
            and not any(some.leaves_out(each) for some in sources)
        ]
        if raw:
            raise ValueError(
                f"`model` must have no parameter that is trained and not averaged, got "
                f"{short_list(raw)}. If another optimizer averages it, use `together`. To leave it "
                "out, set `average=False` in its group, name it in `exclude`, or freeze it."
            )
        for some in sources:
            some.tell_of_left_buffers(inside)
        return inside

    @property
    @abstractmethod
    def _each(self) -> Sequence[Averages]:
        """The averages of each optimizer."""

    def _swap_to_sum(self, factors: Mapping[str, float], in_place: bool) -> Swap:
        if in_place:
            raise ValueError("`in_place` must be False for a weighted sum, got True.")
        sums = [(averages, averages.combined(factors)) for averages in self._each]
        for averages, _ in sums:
            averages.swap.refuse_if_superseded("swap_to_averaged")
            for name in averages.keys() & factors.keys():
                averages.tell_if_trained_past(averages[name])
        return Swap([averages.swap_to(sum_, in_place=False) for averages, sum_ in sums])

    def _chosen(self, name: str | None) -> list[tuple[Averages, Average]]:
        return [(averages, averages.named(name)) for averages in self._each]
