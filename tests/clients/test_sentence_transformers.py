"""sentence-transformers' Trainer, and a model saved with the average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from sentence_transformers.sentence_transformer.modules import StaticEmbedding

from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped
from clients.language import SENTENCES, arguments, word_tokenizer

PAIRS = Dataset.from_dict({"anchor": SENTENCES, "positive": SENTENCES[1:] + SENTENCES[:1]})


def trainer(wrap: Wrap, folder: Path) -> Any:
    embedding = StaticEmbedding(word_tokenizer(), embedding_dim=8)
    model = SentenceTransformer(modules=[embedding], device="cpu")
    return SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(
            **arguments(folder, max_steps=4, save_strategy="steps", save_steps=2)
        ),
        train_dataset=PAIRS,
        loss=MultipleNegativesRankingLoss(model),
        optimizers=(wrap(torch.optim.AdamW(model.parameters(), lr=0.01)), None),
    )


def finished(trainer: Any, **resuming: Any) -> Run:
    trainer.train(**resuming)
    model: Any = trainer.model.eval()
    return Run(
        model, trainer.optimizer.optimizer, lambda: model.encode(SENTENCES, convert_to_tensor=True)
    )


def test_a_trainer_trains_as_without_the_wrapper(tmp_path: Path) -> None:
    check_driven(lambda wrap: finished(trainer(wrap, tmp_path)), steps=4)


def test_a_trainer_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    whole = seeded(lambda: finished(trainer(wrapped, tmp_path)))
    checkpoint = str(tmp_path / "checkpoint-2")
    resumed = seeded(
        lambda: finished(trainer(wrapped, tmp_path), resume_from_checkpoint=checkpoint)
    )
    check_resumed(resumed, whole)


def test_a_model_saved_inside_a_swap_has_the_average(tmp_path: Path) -> None:
    run = seeded(lambda: finished(trainer(wrapped, tmp_path)))
    with run.optimizer.swap_to_averaged():
        expected = run.evaluate()
        run.model.save_pretrained(str(tmp_path / "averaged"))
    loaded = SentenceTransformer(str(tmp_path / "averaged"), device="cpu")
    assert torch.equal(loaded.encode(SENTENCES, convert_to_tensor=True), expected)
