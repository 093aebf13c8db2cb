"""A language model and a tokenizer, both made on the spot, and what every Trainer is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from clients.driven import Run

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "one", "dog", "run"]
SENTENCES = [" ".join(WORDS[i:] + WORDS[:i]) for i in range(len(WORDS))]


def word_tokenizer() -> Tokenizer:
    words = ["<pad>", "<eos>", "<unk>", *WORDS]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


def pretrained_tokenizer() -> Any:
    return PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )


def language_model() -> Any:
    config = GPT2Config(
        vocab_size=16, n_positions=32, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    return GPT2LMHeadModel(config)


TOKENS = torch.randint(16, (8, 6), generator=torch.Generator().manual_seed(0))


def finished(trainer: Any, **resuming: Any) -> Run:
    trainer.train(**resuming)
    model = trainer.model.eval()
    return Run(model, trainer.optimizer.optimizer, lambda: model(TOKENS).logits.detach())


def arguments(folder: Path, **others: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        "save_strategy": "no",
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        **others,
    }
