"""Runs of the Trainer of transformers that several files of tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from training import saved_averages, values
from transformers import GPT2Config, GPT2LMHeadModel, Seq2SeqTrainingArguments, Trainer

from averaging_optim.integrations.transformers import AveragedEvaluationMixin

TEXTS = torch.randint(8, (12, 5), generator=torch.Generator().manual_seed(0))
DATA = [{"input_ids": text, "labels": text} for text in TEXTS]


def language_model() -> GPT2LMHeadModel:
    """Return the same GPT-2 of about 1,000 weights, with dropout, at each call."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=8,
        n_positions=8,
        n_embd=8,
        n_layer=1,
        n_head=2,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


class Recording(AveragedEvaluationMixin, Trainer):
    """Keeps the weights that each evaluation step sees."""

    seen: list[list[Tensor]]
    crash_at: int = 0

    def prediction_step(self, *args: Any, **kwargs: Any) -> Any:
        self.seen = [*getattr(self, "seen", []), present_weights(self)]
        if len(self.seen) == self.crash_at:
            raise ArithmeticError("crashed on purpose")
        return super().prediction_step(*args, **kwargs)


def arguments_for(directory: Path, **arguments: Any) -> Seq2SeqTrainingArguments:
    chosen: dict[str, Any] = {
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "max_steps": 6,
    }
    return Seq2SeqTrainingArguments(str(directory), **{**chosen, **arguments})


def present_weights(trainer: Trainer) -> list[Tensor]:
    assert isinstance(trainer.model, nn.Module)
    return values(trainer.model.parameters())


def averages_in(checkpoint: Path, name: str = "ema") -> list[Tensor]:
    return saved_averages(torch.load(checkpoint / "optimizer.pt", weights_only=True), name)


def weights_in(checkpoint: Path) -> dict[str, Tensor]:
    return load_file(checkpoint / "model.safetensors")
