"""check_trainer passes trainers that drive the wrapper rightly, and says what others do wrong."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate_state import forget_accelerators
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader, TensorDataset
from training import first_layer, gradients_of, loss_of_batch, model_with_batch_norm, small_model
from transformers import Trainer as HuggingFaceTrainer
from transformers_runs import DATA, arguments_for, language_model

from averaging_optim import EMA, AveragingOptimizer
from averaging_optim.testing import check_trainer

Wrap = Callable[[Optimizer], Any]

ALIKE = "Two runs without averages are alike."
ONCE = "`step()` is called once for each step."
WEIGHTS = "Weights train as without averages."
KEPT = "Weights stay what `step()` makes them."
AVERAGED = "Every step is averaged."
SWAP = "A swap puts the averages into the model."
RESUMED_WEIGHTS = "Resumed weights train as without averages."
CONTINUE = "Resumed averages continue."
RESUMING = "Resuming equals never stopping."
CLAIMS = [ALIKE, ONCE, WEIGHTS, KEPT, AVERAGED, SWAP, RESUMED_WEIGHTS, CONTINUE, RESUMING]


class Loop:
    """A loop as people write it."""

    dtype = torch.float32
    model: nn.Sequential
    optimizer: Any

    def __call__(self, wrap: Wrap, steps: int, checkpoint: Any = None) -> tuple[nn.Module, Any]:
        self.model = self.make_model().to(self.dtype)
        self.start(wrap)
        first = 0 if checkpoint is None else self.load(checkpoint)
        for step in range(first, steps):
            self.step(step)
        return self.model, self.save(steps)

    def make_model(self) -> nn.Sequential:
        return small_model()

    def make_optimizer(self) -> Optimizer:
        return SGD(self.model.parameters(), lr=0.1, momentum=0.9)

    def start(self, wrap: Wrap) -> None:
        self.optimizer = wrap(self.make_optimizer())

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        loss_of_batch(self.model, step).backward()
        self.optimizer.step()

    def save(self, steps: int) -> Any:
        model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
        return {"model": model, "optimizer": optimizer, "step": steps}

    def load(self, checkpoint: Any) -> int:
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        return int(checkpoint["step"])


class InBfloat16(Loop):
    dtype = torch.bfloat16


class WithBatchNorm(Loop):
    def make_model(self) -> nn.Sequential:
        return model_with_batch_norm()


class WithGradScaler(Loop):
    def start(self, wrap: Wrap) -> None:
        super().start(wrap)
        self.scaler = torch.amp.GradScaler("cpu")

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(loss_of_batch(self.model, step)).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


class OverflowingOnce(WithGradScaler):
    """Its optimizer is fused, which is called for a step that it skips."""

    def make_optimizer(self) -> Optimizer:
        return SGD(self.model.parameters(), lr=0.1, fused=True)

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        loss = loss_of_batch(self.model, step) * (torch.inf if step == 1 else 1)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


class WithAWeightThatIsNaN(Loop):
    """It takes no part in the loss."""

    def make_model(self) -> nn.Sequential:
        model = super().make_model()
        model.register_parameter("unused", nn.Parameter(torch.tensor(torch.nan)))
        return model


class UnfreezingALayer(Loop):
    def step(self, step: int) -> None:
        first_layer(self.model).requires_grad_(step >= 2)
        super().step(step)


class AddingALayer(Loop):
    def make_optimizer(self) -> Optimizer:
        return SGD(self.model[2].parameters(), lr=0.1, momentum=0.9)

    def step(self, step: int) -> None:
        if step == 1:
            self.optimizer.add_param_group({"params": first_layer(self.model).parameters()})
        super().step(step)

    def load(self, checkpoint: Any) -> int:
        self.optimizer.add_param_group({"params": first_layer(self.model).parameters()})
        return super().load(checkpoint)


class LeavingALayerOut(Loop):
    def make_optimizer(self) -> Optimizer:
        groups: list[dict[str, Any]] = [
            {"params": first_layer(self.model).parameters(), "average": False},
            {"params": self.model[2].parameters()},
        ]
        return SGD(groups, lr=0.1)


class WithTwoOptimizers(Loop):
    def start(self, wrap: Wrap) -> None:
        self.optimizer = wrap(SGD(first_layer(self.model).parameters(), lr=0.1))
        self.other = wrap(AdamW(self.model[2].parameters(), lr=0.1))

    def step(self, step: int) -> None:
        self.other.zero_grad()
        super().step(step)
        self.other.step()

    def save(self, steps: int) -> Any:
        return {**super().save(steps), "other": self.other.state_dict()}

    def load(self, checkpoint: Any) -> int:
        self.other.load_state_dict(checkpoint["other"])
        return super().load(checkpoint)


class SteppingOneOfTwoMoreOften(WithTwoOptimizers):
    """As a discriminator of a GAN."""

    def step(self, step: int) -> None:
        super().step(step)
        self.other.step()


class TryingALearningRateFirst(Loop):
    def start(self, wrap: Wrap) -> None:
        super().start(wrap)
        self.step(0)
        self.model.load_state_dict(self.make_model().state_dict())
        super().start(wrap)


class Sharding(Loop):
    def start(self, wrap: Wrap) -> None:
        # Imported here, as it takes half a second.
        from torch.distributed.fsdp import fully_shard

        fully_shard(self.model)
        super().start(wrap)


class ClampingInAHook(Loop):
    """Constrains the weights before they are averaged."""

    def make_optimizer(self) -> Optimizer:
        optimizer = super().make_optimizer()
        optimizer.register_step_post_hook(self.clamp)
        return optimizer

    @torch.no_grad()
    def clamp(self, *_: object) -> None:
        for weight in self.model.parameters():
            weight.clamp_(-0.1, 0.1)


class ClampingInALaterHook(ClampingInAHook):
    def make_optimizer(self) -> Optimizer:
        return Loop.make_optimizer(self)

    def start(self, wrap: Wrap) -> None:
        bare = self.make_optimizer()
        self.optimizer = wrap(bare)
        bare.register_step_post_hook(self.clamp)


class Network(LightningModule):
    """Trains on numbered batches."""

    def __init__(self, wrap: Wrap) -> None:
        super().__init__()
        self.net, self.wrap = small_model(), wrap

    def configure_optimizers(self) -> Any:
        return self.wrap(AdamW(self.net.parameters(), lr=0.01))

    def training_step(self, batch: int) -> Tensor:
        return loss_of_batch(self.net, self.global_step)


def with_lightning(wrap: Wrap, steps: int, checkpoint: Any = None) -> tuple[nn.Module, Any]:
    model = Network(wrap)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=steps,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(model, list(range(3)), ckpt_path=checkpoint)
    trainer.save_checkpoint("lightning.ckpt")
    return model, "lightning.ckpt"


def with_transformers(wrap: Wrap, steps: int, checkpoint: Any = None) -> tuple[nn.Module, Any]:
    model = language_model()
    optimizer = wrap(AdamW(model.parameters(), lr=0.01))
    trainer = HuggingFaceTrainer(
        model,
        arguments_for(
            Path("transformers"),
            max_steps=steps,
            save_strategy="steps",
            save_steps=steps,
            gradient_accumulation_steps=2,
        ),
        train_dataset=DATA,
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: 0.9**step)),
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    return model, f"transformers/checkpoint-{steps}"


def with_accelerate(wrap: Wrap, steps: int, checkpoint: Any = None) -> tuple[nn.Module, Any]:
    forget_accelerators()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = small_model()
    data = TensorDataset(torch.arange(4 * steps))
    model, optimizer, batches = accelerator.prepare(
        model, wrap(AdamW(model.parameters(), lr=0.01)), DataLoader(data, batch_size=2)
    )
    if checkpoint is not None:
        accelerator.load_state(checkpoint)
        batches = accelerator.skip_first_batches(batches, 2 * (steps // 2))
    for (numbers,) in batches:
        with accelerator.accumulate(model):
            accelerator.backward(loss_of_batch(model, int(numbers[0])))
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    accelerator.save_state("accelerate")
    return model, "accelerate"


def verdicts(report: str) -> dict[str, str]:
    """Return claim → verdict."""
    found = re.findall(r"^(ok|differs|not compared) +(.*)$", report, re.MULTILINE)
    return {claim: verdict for verdict, claim in found}


RIGHT: list[Any] = [
    Loop(),
    InBfloat16(),
    WithBatchNorm(),
    WithGradScaler(),
    WithAWeightThatIsNaN(),
    UnfreezingALayer(),
    AddingALayer(),
    LeavingALayerOut(),
    WithTwoOptimizers(),
    SteppingOneOfTwoMoreOften(),
    TryingALearningRateFirst(),
    ClampingInAHook(),
    ClampingInALaterHook(),
    with_accelerate,
    with_lightning,
    with_transformers,
]


class DrawingAtRandom(Loop):
    generator = torch.Generator().manual_seed(0)

    def step(self, step: int) -> None:
        super().step(int(torch.randint(1000, (), generator=self.generator)))


class SteppingForEachMicroBatch(Loop):
    def step(self, step: int) -> None:
        super().step(2 * step)
        super().step(2 * step + 1)


class SteppingTheOptimizerInside(Loop):
    def start(self, wrap: Wrap) -> None:
        self.inside = self.make_optimizer()
        self.optimizer = wrap(self.inside)

    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        loss_of_batch(self.model, step).backward()
        self.inside.step()


class SteppingWhatItUnwraps(Loop):
    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        loss_of_batch(self.model, step).backward()
        getattr(self.optimizer, "wrapped", self.optimizer).step()


class SteppingByItself(Loop):
    @torch.no_grad()
    def step(self, step: int) -> None:
        with torch.enable_grad():
            loss_of_batch(self.model, step).backward()
        for weight, gradient in zip(self.model.parameters(), gradients_of(self.model), strict=True):
            weight.sub_(gradient, alpha=0.1)
        self.model.zero_grad()


class Clamping(Loop):
    @torch.no_grad()
    def step(self, step: int) -> None:
        with torch.enable_grad():
            super().step(step)
        for weight in self.model.parameters():
            weight.clamp_(-0.1, 0.1)


class ClippingForOneClassOnly(Loop):
    def step(self, step: int) -> None:
        self.optimizer.zero_grad()
        loss_of_batch(self.model, step).backward()
        if type(self.optimizer) is SGD:
            clip_grad_norm_(self.model.parameters(), 0.1)
        self.optimizer.step()


class RefusingOtherClasses(Loop):
    def step(self, step: int) -> None:
        if type(self.optimizer) is not SGD:
            raise TypeError("unknown optimizer")
        super().step(step)


class AveragingMoreOften(Loop):
    def step(self, step: int) -> None:
        super().step(step)
        if isinstance(self.optimizer, AveragingOptimizer):
            self.optimizer.update_averages()


class KeepingMasterCopies(Loop):
    """As DeepSpeed: one flat copy in float32, which is stepped and copied back."""

    dtype = torch.bfloat16

    def start(self, wrap: Wrap) -> None:
        super().start(wrap)
        weights = list(self.model.parameters())
        self.master = nn.Parameter(nn.utils.parameters_to_vector(weights).detach().float())
        self.optimizer.param_groups[0]["params"] = [self.master]

    def step(self, step: int) -> None:
        self.model.zero_grad()
        loss_of_batch(self.model, step).backward()
        self.master.grad = nn.utils.parameters_to_vector(gradients_of(self.model)).float()
        self.optimizer.step()
        self.copy_back()

    @torch.no_grad()
    def copy_back(self) -> None:
        parts = self.master.split([weight.numel() for weight in self.model.parameters()])
        for weight, part in zip(self.model.parameters(), parts, strict=True):
            weight.copy_(part.view_as(weight))

    def save(self, steps: int) -> Any:
        return {**super().save(steps), "master": self.master.detach().clone()}

    def load(self, checkpoint: Any) -> int:
        self.master.data.copy_(checkpoint["master"])
        return super().load(checkpoint)


class ReturningACopy(Loop):
    def __call__(self, wrap: Wrap, steps: int, checkpoint: Any = None) -> tuple[nn.Module, Any]:
        model, saved = super().__call__(wrap, steps, checkpoint)
        return copy.deepcopy(model), saved


class AtALearningRateOfZero(Loop):
    def make_optimizer(self) -> Optimizer:
        return SGD(self.model.parameters(), lr=0.0)


class SavingNoOptimizer(Loop):
    def load(self, checkpoint: Any) -> int:
        self.model.load_state_dict(checkpoint["model"])
        return int(checkpoint["step"])


class ClampingAndSavingNoOptimizer(Clamping, SavingNoOptimizer):
    """What the page shows the report of."""


class SavingTheOptimizerInside(Loop):
    def save(self, steps: int) -> Any:
        inside = getattr(self.optimizer, "wrapped", self.optimizer)
        return {**super().save(steps), "optimizer": inside.state_dict()}


class MakingTheOptimizerAfterLoading(Loop):
    def start(self, wrap: Wrap) -> None:
        self.wrap = wrap
        super().start(wrap)

    def load(self, checkpoint: Any) -> int:
        step = super().load(checkpoint)
        self.optimizer = self.wrap(self.make_optimizer())
        return step


class CastingTheStateThatItLoads(Loop):
    def load(self, checkpoint: Any) -> int:
        step = super().load(checkpoint)
        for entry in self.optimizer.state.values():
            entry.update({key: value.bfloat16().float() for key, value in entry.items()})
        return step


class LeavingTheAverageInTheModel(Loop):
    def __call__(self, wrap: Wrap, steps: int, checkpoint: Any = None) -> tuple[nn.Module, Any]:
        model, saved = super().__call__(wrap, steps, checkpoint)
        if isinstance(self.optimizer, AveragingOptimizer):
            model.load_state_dict(self.optimizer.averaged_state_dict(model))
        return model, saved


class WithAnotherOptimizerForOneClassOnly(Loop):
    def start(self, wrap: Wrap) -> None:
        super().start(wrap)
        if type(self.optimizer) is SGD:
            self.another = wrap(SGD([nn.Parameter(torch.ones(1))]))


class TakingFewerStepsWithOtherClasses(Loop):
    def step(self, step: int) -> None:
        if type(self.optimizer) is SGD or step < 4:
            super().step(step)


class BeginningWithTheFirstBatchAgain(Loop):
    def start(self, wrap: Wrap) -> None:
        super().start(wrap)
        self.first = 0

    def load(self, checkpoint: Any) -> int:
        self.first = super().load(checkpoint)
        return self.first

    def step(self, step: int) -> None:
        super().step(step - self.first)


class TakingAllStepsAgain(Loop):
    def load(self, checkpoint: Any) -> int:
        super().load(checkpoint)
        return 0


INEXACT = [BeginningWithTheFirstBatchAgain(), TakingAllStepsAgain()]
# Trainer, claims that do not hold, words that say why.
WRONG: list[tuple[Any, list[str], str]] = [
    (DrawingAtRandom(), [ALIKE], "The weights differ after step 1. Build the model inside `train`"),
    (SteppingForEachMicroBatch(), [ONCE], r"Steps taken: 12 instead of 6. Call `step\(\)` of what"),
    (SteppingByItself(), [ONCE, AVERAGED], r"Steps taken: 0 instead of 6. Call `step\(\)` of what"),
    (
        WithAnotherOptimizerForOneClassOnly(),
        [ONCE, WEIGHTS],
        "Steps taken: 6 and 0 instead of 6. .* Optimizers: 1 instead of 2. Look where",
    ),
    (ClippingForOneClassOnly(), [WEIGHTS], "differ after step 1. Look where the trainer asks"),
    (TakingFewerStepsWithOtherClasses(), [WEIGHTS], "Steps taken: 4 instead of 6. Look where"),
    (
        LeavingTheAverageInTheModel(),
        [WEIGHTS, SWAP],
        "differ after training, though not after each .* equal their averages without it. Train at",
    ),
    (Clamping(), [KEPT], "Something changes them after step 1. Averages are of the weights before"),
    (
        SteppingTheOptimizerInside(),
        [AVERAGED],
        r"`n_averaged\(\)` is 0 after 6 steps. Call `step\(\)` of what `wrap` returns",
    ),
    (
        SteppingWhatItUnwraps(),
        [AVERAGED],
        r"`n_averaged\(\)` is 0 after 6 steps. Call `step\(\)` of what `wrap` returns",
    ),
    (AveragingMoreOften(), [AVERAGED], "is 12 after 6 steps. Leave updates to `step"),
    (KeepingMasterCopies(), [SWAP], "put other weights into `param_groups`, such as flat copies"),
    (ReturningACopy(), [SWAP], "Let `train` return the model that is trained."),
    (AtALearningRateOfZero(), [SWAP], "equal their averages without it. Train at a learning rate"),
    (SavingNoOptimizer(), [CONTINUE], "is 3 after 6 steps. Save the state dict of what `wrap`"),
    (SavingTheOptimizerInside(), [CONTINUE], "is 3 after 6 steps. Save the state dict of what"),
    (MakingTheOptimizerAfterLoading(), [CONTINUE], "is 3 after 6 steps. Save the state dict of"),
    (CastingTheStateThatItLoads(), [CONTINUE], "values are not. Leave its state to `load_state"),
]


def name_of(train: Any) -> str:
    return train.__name__ if isinstance(train, FunctionType) else type(train).__name__


def names(cases: Iterable[tuple[Any, ...]]) -> list[str]:
    return [name_of(train) for train, *_ in cases]


@pytest.mark.parametrize("train", RIGHT, ids=name_of)
def test_all_claims_hold_of_a_trainer_that_drives_the_wrapper_rightly(
    train: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert verdicts(check_trainer(train)) == dict.fromkeys(CLAIMS, "ok")


@pytest.mark.skipif(
    torch.__version__ < "2.9", reason="FSDP2 averages gradients on CPUs from torch 2.9 on"
)
@pytest.mark.usefixtures("process_group")
def test_all_claims_hold_of_a_loop_that_shards_its_weights() -> None:
    assert verdicts(check_trainer(Sharding())) == dict.fromkeys(CLAIMS, "ok")


# The averages that are not in the checkpoint: the report says so too.
@pytest.mark.filterwarnings("ignore:The state dict has no average:UserWarning")
@pytest.mark.parametrize(("train", "claims", "words"), WRONG, ids=names(WRONG))
def test_the_report_says_what_a_trainer_does_wrong(
    train: Any, claims: list[str], words: str
) -> None:
    with pytest.raises(AssertionError, match="Some claims do not hold of this trainer") as raised:
        check_trainer(train)
    report = str(raised.value)
    found = verdicts(report)
    assert [claim for claim in found if found[claim] == "differs"] == claims
    assert list(found) == CLAIMS
    assert re.search(words, " ".join(report.split()))


@pytest.mark.parametrize("train", INEXACT, ids=name_of)
def test_resuming_that_is_inexact_without_averages_too_is_not_reported(train: Any) -> None:
    report = check_trainer(train)
    assert verdicts(report) == {**dict.fromkeys(CLAIMS, "ok"), RESUMING: "not compared"}
    assert "So it is without averages. Something is not saved" in " ".join(report.split())


def test_a_claim_is_not_compared_where_one_that_it_needs_does_not_hold() -> None:
    with pytest.raises(AssertionError) as raised:
        check_trainer(DrawingAtRandom())
    found = verdicts(str(raised.value))
    passed_over = [claim for claim in found if found[claim] == "not compared"]
    assert passed_over == [WEIGHTS, RESUMED_WEIGHTS, RESUMING]
    assert f"must hold first: {ALIKE}" in str(raised.value)


def test_only_training_is_compared_without_a_checkpoint() -> None:
    def train(wrap: Wrap, steps: int) -> tuple[nn.Module, None]:
        return Loop()(wrap, steps)[0], None

    report = check_trainer(train)
    assert verdicts(report) == {**dict.fromkeys(CLAIMS[:6], "ok"), RESUMING: "not compared"}
    assert "`train` returns no checkpoint." in report


def test_steps_that_grad_scaler_skips_are_not_missed() -> None:
    with pytest.raises(AssertionError, match="Steps taken: 5 instead of 6") as raised:
        check_trainer(OverflowingOnce())
    found = verdicts(str(raised.value))
    assert found == {**dict.fromkeys(CLAIMS, "ok"), ONCE: "differs"}


def test_a_trainer_that_refuses_the_wrapper_is_said_to_and_its_error_is_the_cause() -> None:
    words = r"`train` raises with an AveragingOptimizer only: TypeError\('unknown optimizer'\)"
    with pytest.raises(AssertionError, match=words) as raised:
        check_trainer(RefusingOtherClasses())
    assert isinstance(raised.value.__cause__, TypeError)


def test_what_a_trainer_raises_without_averages_is_raised() -> None:
    def train(wrap: Wrap, steps: int) -> None:
        raise ArithmeticError("crashed on purpose")

    with pytest.raises(ArithmeticError, match="crashed on purpose"):
        check_trainer(train)  # type: ignore[arg-type]  # returns nothing


def without_wrapping(wrap: Wrap, steps: int, checkpoint: Any = None) -> Any:
    return small_model(), None


def returning_a_model(wrap: Wrap, steps: int, checkpoint: Any = None) -> Any:
    return Loop()(wrap, steps)[0]


def wrapping_a_method(wrap: Wrap, steps: int, checkpoint: Any = None) -> Any:
    wrap(small_model().parameters)  # type: ignore[arg-type]  # what is wrong


def wrapping_what_is_wrapped(wrap: Wrap, steps: int, checkpoint: Any = None) -> Any:
    wrap(AveragingOptimizer(SGD(small_model().parameters()), EMA()))


BAD: list[tuple[Any, int, type[Exception], str]] = [
    (without_wrapping, 6, ValueError, "`train` must call `wrap` with its optimizer"),
    (returning_a_model, 6, TypeError, r"`train` must return .* got Sequential\("),
    (
        wrapping_a_method,
        6,
        TypeError,
        "`wrap` must be given a bare torch.optim.Optimizer, got <bou",
    ),
    (wrapping_what_is_wrapped, 6, TypeError, "bare torch.optim.Optimizer, got AveragingOptimizer"),
    (Loop(), 1, ValueError, "`steps` must be at least 2, got 1"),
]


@pytest.mark.parametrize(("train", "steps", "error", "words"), BAD, ids=names(BAD))
def test_a_function_that_cannot_be_compared_is_refused(
    train: Any, steps: int, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        check_trainer(train, steps)


def test_the_page_explains_every_claim_and_shows_reports_as_they_are() -> None:
    page = (Path(__file__).parent.parent / "docs" / "how-to" / "trainers.md").read_text()
    assert re.findall(r"^\| ([^|]*\.) \|", page, re.MULTILINE) == CLAIMS
    assert f"```text\n{check_trainer(Loop())}\n```" in page
    with pytest.raises(AssertionError) as raised:
        check_trainer(ClampingAndSavingNoOptimizer())
    _, report = str(raised.value).split("\n", 1)
    assert f"```text\n{report}\n```" in page


def test_an_optimizer_is_made_for_parameters() -> None:
    def train(make_optimizer: Any, steps: int, checkpoint: Any = None) -> Any:
        model = small_model()
        optimizer = make_optimizer(model.parameters())
        for step in range(steps):
            optimizer.zero_grad()
            loss_of_batch(model, step).backward()
            optimizer.step()
        return model, None

    assert "ok            Every step is averaged." in check_trainer(train)
