"""nanoGPT's loop: two parameter groups, tied weights, a rate written into them, accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped

TOKENS = torch.randint(16, (8, 9), generator=torch.Generator().manual_seed(0))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.wte = nn.Embedding(16, 8)
        self.block = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
        self.lm_head = nn.Linear(8, 16, bias=False)
        self.wte.weight = self.lm_head.weight

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.lm_head(self.block(self.wte(tokens)))
        return logits


def configured(model: nn.Module) -> torch.optim.AdamW:
    """Return the optimizer that `GPT.configure_optimizers` makes: matrices decay, vectors don't."""
    parameters = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [weight for weight in parameters if weight.dim() >= 2], "weight_decay": 0.1},
        {"params": [weight for weight in parameters if weight.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.01, betas=(0.9, 0.95), fused=True)


def started(wrap: Wrap) -> tuple[GPT, Any]:
    model = GPT()
    return model, wrap(configured(model))


def train(model: GPT, optimizer: Any, iterations: range) -> Run:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    for iteration in iterations:
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * (1 - iteration / 8)
        for micro_batch in TOKENS.chunk(2):
            logits = model(micro_batch[:, :-1]).flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, micro_batch[:, 1:].flatten()) / 2
            scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
    return Run(model, optimizer, lambda: model(TOKENS).detach())


def test_the_loop_of_nanogpt_trains_as_without_the_wrapper() -> None:
    check_driven(lambda wrap: train(*started(wrap), range(6)), steps=6)


def test_the_loop_of_nanogpt_resumes_from_its_checkpoint(tmp_path: Path) -> None:
    def halves() -> Run:
        model, optimizer = started(wrapped)
        train(model, optimizer, range(3))
        checkpoint = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(checkpoint, tmp_path / "ckpt.pt")
        model, optimizer = started(wrapped)
        checkpoint = torch.load(tmp_path / "ckpt.pt", map_location="cpu")
        model.load_state_dict(checkpoint["model"])
        optimizer.load_state_dict(checkpoint["optimizer"])
        return train(model, optimizer, range(3, 6))

    whole = seeded(lambda: train(*started(wrapped), range(6)))
    check_resumed(seeded(halves), whole)
