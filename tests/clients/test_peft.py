"""peft's adapters, trained by transformers' Trainer, saved with the average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

from clients.driven import Wrap, check_driven, check_resumed, seeded, wrapped
from clients.language import TOKENS, arguments, finished, language_model

DATA: Any = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]


def adapted() -> Any:
    return get_peft_model(
        language_model(), LoraConfig(task_type="CAUSAL_LM", r=2, fan_in_fan_out=True)
    )


def trainer(wrap: Wrap, folder: Path) -> Any:
    model = adapted()
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = wrap(torch.optim.AdamW(trained, lr=0.01))
    return Trainer(
        model,
        TrainingArguments(**arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)),
        train_dataset=DATA,
        optimizers=(optimizer, None),
    )


def test_an_adapter_trains_as_without_the_wrapper(tmp_path: Path) -> None:
    check_driven(lambda wrap: finished(trainer(wrap, tmp_path)), steps=4)


def test_an_adapter_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    whole = seeded(lambda: finished(trainer(wrapped, tmp_path)))
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = seeded(
        lambda: finished(trainer(wrapped, tmp_path), resume_from_checkpoint=checkpoint)
    )
    check_resumed(resumed, whole)


def test_an_adapter_saved_inside_a_swap_has_the_average(tmp_path: Path) -> None:
    run = seeded(lambda: finished(trainer(wrapped, tmp_path)))
    with run.optimizer.swap_to_averaged():
        expected = run.evaluate()
        run.model.save_pretrained(tmp_path / "averaged")
    loaded = PeftModel.from_pretrained(seeded(language_model), tmp_path / "averaged").eval()
    assert torch.equal(loaded(TOKENS).logits, expected)
