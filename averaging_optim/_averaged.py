"""What may be done with averages: evaluate, copy, export and load them."""

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
from averaging_optim._averages.sources import unwrapped
from averaging_optim._averages.swap import Swap
from averaging_optim._averages.teachers import Teacher, averaged_copy, bind
from averaging_optim._checkpoints.exports import IncompatibleKeys, plain_keys, read_exported
from averaging_optim._checks import check_bool, check_integer, short_list

_Model = TypeVar("_Model", bound=nn.Module)
_Result = TypeVar("_Result")


class Averaged:
    """One optimizer or several, whose averages of one name are one average of all they train."""

    def swap_to_averaged(
        self, name: str | Mapping[str, float] | None = None, *, in_place: bool = False
    ) -> Swap:
        """Evaluate with averaged weights: they are in the model until the block is left.

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

        On leaving, weights and buffers are bit for bit what they were on entering, also after
        an exception and whatever has been written into them inside, as by
        `torch.optim.swa_utils.update_bn`, by `Embedding(max_norm=...)` or by adapters that
        merge in `eval()`. Casting or moving the model inside is fine: the training weights
        come back in the new dtype and place. Averages are only read.

        Values move, tensors stay where they are. The weights are backed up where the averages
        are, which takes their memory once more. Ctrl-C and other signals with a handler in
        Python wait while values move.

        Until a rule's first update, swapping to it has no effect. Swaps to the same average
        may overlap, nested or not, in one thread or several: the weights come back when the
        last of them is left.

        Args:
            name: which average; may be left out if there is only one. A mapping name → factor,
                "weights" among the names, gives their weighted sum, in at least float32.
            in_place: exchange weights and averages, through a scratch of a few MiB, instead
                of backing the weights up. Then nothing inside may write into the weights, or
                it is in the average for good; what was handed out of the averages before
                (a state dict, `averaged_model`) holds the weights inside; and leaving a swap
                must not fail. Only for averages of the dtype and device of their weights,
                which share no memory; others are backed up all the same.

        Raises:
            ValueError: there is no average of this name, or several and no name, or a sum is to be
                exchanged `in_place`.
            RuntimeError: inside a swap to another average, while `step` runs, inside a
                function that torch.func transforms, or if what is returned is entered or
                left twice.
            torch.OutOfMemoryError: there is no room for the backup; nothing has changed.
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
        """Return what `evaluate` returns of the weights as they are, and under each average.

        An average that has no updates yet, as before its `start`, is the weights.

        Args:
            evaluate: called once for each; under the average as in `swap_to_averaged`. Tensors
                that it returns must be copies: `model.state_dict` would return the weights
                that are there afterwards.

        Returns:
            name of the rule → result, with that of the training weights under "weights",
            the first.

        Raises:
            RuntimeError: inside `swap_to_averaged`.
            ValueError: a rule is named "weights".

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
        """
        names = list(self._each[0].rules)
        for averages in self._each:
            averages.swap.refuse("evaluate_averages")
            if averages.rules.keys() != set(names):
                raise ValueError(
                    "`evaluate_averages` needs averages of the same names in each optimizer, got "
                    f"{names} and {list(averages.rules)}. Evaluate inside `swap_to_averaged`."
                )
        if "weights" in names:
            raise ValueError("`rules` must name no average 'weights', the key of the weights.")
        results = {"weights": evaluate()}
        for name in names:
            with self.swap_to_averaged(name):
                results[name] = evaluate()
        return results

    def averaged_model(
        self, model: _Model, name: str | None = None, *, into: _Model | None = None
    ) -> _Model:
        """Return a copy of the model whose parameters are the averages.

        They are the same memory, without gradients: always up to date, for teachers and
        for evaluating beside training. Parameters that are not averaged are the model's own,
        in its memory. The others and buffers have the dtype and device of the averages. Until
        its first update, an average holds the weights at the time it was made.

        Buffers are copied at each update: their averages, or else the model's. A module that
        has written into its buffers in train mode, as BatchNorm does, keeps them while it stays
        in train mode.

        A model that you cast or move does not follow the average any more, which a warning
        tells you at the next update. Not for use inside `swap_to_averaged(in_place=True)`, where
        the memory of the averages holds the weights.

        Args:
            model: a module with parameters that are averaged. Of a DistributedDataParallel,
                DataParallel or compiled model the module inside is taken.
            name: which average; may be left out if there is only one.
            into: another instance of the model to use instead of a copy, for models that
                `copy.deepcopy` can't copy: those with hooks of `torch.nn.utils.weight_norm`, with
                locks or process groups, of TorchScript, and those that `fully_shard` has
                sharded, if all ranks have parts of one size.

        Raises:
            ValueError: there is no such average; a parameter of the model requires a gradient
                and is neither averaged nor left out by `average=False` or `exclude`; the model
                can't be copied; `into` is no other instance of it.
            TypeError: `into` is no module.
            RuntimeError: the wrapped optimizer has been wrapped again.

        Example:
            >>> import torch
            >>> from averaging_optim import EMA, AveragingOptimizer
            >>> model = torch.nn.Linear(1, 1)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> optimizer = AveragingOptimizer(sgd, EMA(decay=0.99))
            >>> teacher = optimizer.averaged_model(model)
            >>> teacher.weight.requires_grad
            False
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
        """Return `model.state_dict()` under the average, as independent tensors.

        It loads into the plain model: the names are those inside DistributedDataParallel,
        DataParallel and torch.compile.

        Args:
            model: a module with parameters that are averaged.
            name: which average, or a weighted sum of some; see `swap_to_averaged`.
            only_averaged: leave out what has no average, such as the frozen weights of a LoRA.

        Raises:
            ValueError: there is no such average; a parameter of the model requires a gradient
                and is neither averaged nor left out by `average=False` or `exclude`.
            RuntimeError: inside a swap to another average.

        Example:
            >>> import torch
            >>> from averaging_optim import EMA, AveragingOptimizer
            >>> model = torch.nn.Linear(2, 1)
            >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> optimizer = AveragingOptimizer(sgd, EMA(decay=0.99))
            >>> list(optimizer.averaged_state_dict(model))
            ['weight', 'bias']
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

        Entries of tensors that are not averaged are passed over.

        Args:
            model: a module with all parameters and buffers that are averaged.
            state_dict: what `averaged_state_dict` returned, or a state dict of the model, also of
                one that is wrapped otherwise; left as it is.
            name: which average; may be left out if there is only one.
            n_averaged: updates the average stands for, at least 1, so that the next
                update does not copy over it.
            strict: if False, load the entries that fit. Averages of which there is none stay
                what they are, or start at the present values, and count as loaded too; those of
                an optimizer that nothing was loaded of stay as they are.

        Returns:
            `missing_keys`, of tensors that are averaged and were not loaded, and
            `unexpected_keys`, which were not taken, as `torch.nn.Module.load_state_dict` does. An
            entry of another shape than its tensor's is in both. Both are empty if `strict`.

        Raises:
            ValueError: an argument or an entry does not fit; nothing has changed.
            TypeError: `n_averaged` is not an integer.
            RuntimeError: inside `swap_to_averaged`.

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
        """
        with ExitStack() as writing:
            for averages in self._each:
                writing.enter_context(averages.writing("load_averaged_state_dict"))
            chosen = self._chosen(name)
            check_integer("n_averaged", n_averaged, at_least=1)
            check_bool("strict", strict)
            sources, inside = [averages.look_up() for averages, _ in chosen], unwrapped(model)
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
        """Raise unless what is trained of the model is averaged, or was said not to be.

        Args:
            model: a module with parameters that are averaged.

        Returns:
            the module inside DistributedDataParallel, DataParallel or torch.compile.

        Raises:
            ValueError: a parameter requires a gradient and is neither averaged nor left out by
                `average=False` or `exclude`, or none of the model's is averaged.
        """
        if not isinstance(model, nn.Module):
            raise TypeError(f"`model` must be a torch.nn.Module, got {model!r}.")
        inside = unwrapped(model)
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
