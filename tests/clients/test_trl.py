"""trl's SFTTrainer and DPOTrainer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from clients.driven import Wrap, check_driven, check_resumed, seeded, wrapped
from clients.language import (
    SENTENCES,
    arguments,
    finished,
    language_model,
    pretrained_tokenizer,
)


def fine_tuner(wrap: Wrap, folder: Path) -> Any:
    model = language_model()
    return SFTTrainer(
        model,
        SFTConfig(**arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)),
        train_dataset=Dataset.from_list([{"text": sentence} for sentence in SENTENCES]),
        processing_class=pretrained_tokenizer(),
        optimizers=(wrap(torch.optim.AdamW(model.parameters(), lr=0.01)), None),
    )


def preference_tuner(wrap: Wrap, folder: Path) -> Any:
    model = language_model()
    pairs = [
        {"prompt": sentence, "chosen": " on a mat", "rejected": " dog run"}
        for sentence in SENTENCES
    ]
    return DPOTrainer(
        model,
        copy.deepcopy(model),
        DPOConfig(**arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)),
        train_dataset=Dataset.from_list(pairs),
        processing_class=pretrained_tokenizer(),
        optimizers=(wrap(torch.optim.AdamW(model.parameters(), lr=0.01)), None),
    )


MAKERS = pytest.mark.parametrize("maker", [fine_tuner, preference_tuner])


@MAKERS
def test_a_trainer_trains_as_without_the_wrapper(
    maker: Callable[[Wrap, Path], Any], tmp_path: Path
) -> None:
    check_driven(lambda wrap: finished(maker(wrap, tmp_path)), steps=4)


@MAKERS
def test_a_trainer_resumes_from_a_checkpoint(
    maker: Callable[[Wrap, Path], Any], tmp_path: Path
) -> None:
    whole = seeded(lambda: finished(maker(wrapped, tmp_path)))
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = seeded(lambda: finished(maker(wrapped, tmp_path), resume_from_checkpoint=checkpoint))
    check_resumed(resumed, whole)
