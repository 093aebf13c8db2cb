"""A small language model, its text, and one training run that keeps dozens of averages.

A decoder of 0.46 million weights learns to predict the bytes of Python's standard library. Muon
trains its matrices and AdamW the rest, with the same averages, which `together` evaluates as one.
"""

from __future__ import annotations

import hashlib
import math
import platform
import shutil
import sysconfig
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import language_plan as plan
import torch
from language_plan import Run, Scale
from language_results import best_rate, read_results, write_atomically, write_result
from torch import Tensor, nn

from averaging_optim import AveragingOptimizer, PowerEMA, Rule, together
from averaging_optim.post_hoc import decay_shares, merge, reconstruct

BYTES = 256
HEAD_WIDTH = 32
NOT_TRAINED_ON = {"test", "tests", "idle_test", "site-packages", "dist-packages"}
SPLIT_SEED = 0
PARTS = ("train", "choose", "report")

Losses = dict[str, float]


class Block(nn.Module):
    """Attention and a multilayer perceptron, each beside the residual stream."""

    turns: Tensor

    def __init__(self, width: int, heads: int, context: int) -> None:
        super().__init__()
        self.heads = heads
        # Rotary positions. Source: Su et al.: RoFormer, 2021, arXiv 2104.09864.
        speeds = 10_000 ** -torch.linspace(0, 1, width // heads // 2)
        angles = torch.outer(torch.arange(context), speeds)
        turns = torch.stack([angles.cos(), angles.sin()])
        self.register_buffer("turns", turns, persistent=False)
        self.before_attention = nn.RMSNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.attended = nn.Linear(width, width, bias=False)
        self.before_mlp = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attended(self.attention(self.before_attention(x)))
        hidden = self.up(self.before_mlp(x)).relu().square()
        added: Tensor = self.down(hidden)
        return x + added

    def attention(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        by_head = self.query_key_value(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = by_head.permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(
            self.turned(query), self.turned(key), value, is_causal=True
        )
        return mixed.transpose(1, 2).reshape(batch, length, width)

    def turned(self, x: Tensor) -> Tensor:
        """Turn each pair of coordinates by an angle that grows with the position."""
        cos, sin = self.turns[:, : x.shape[-2]]
        one, other = x.chunk(2, dim=-1)
        return torch.cat([one * cos - other * sin, one * sin + other * cos], dim=-1)


class Decoder(nn.Module):
    """Scores of the next byte after each byte of a text."""

    def __init__(self, width: int, layers: int, context: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(BYTES, width)
        heads = width // HEAD_WIDTH
        self.blocks = nn.Sequential(*(Block(width, heads, context) for _ in range(layers)))
        self.before_head = nn.RMSNorm(width)
        self.head = nn.Linear(width, BYTES, bias=False)

    def forward(self, text: Tensor) -> Tensor:
        scores: Tensor = self.head(self.before_head(self.blocks(self.embedding(text))))
        return scores


def bits_a_byte(model: nn.Module, text: Tensor) -> Tensor:
    """Return the loss of predicting each byte of these rows but the first."""
    scores = model(text[:, :-1]).flatten(0, 1)
    return nn.functional.cross_entropy(scores, text[:, 1:].flatten()) / math.log(2)


@dataclass(frozen=True)
class Corpus:
    """The text of each part, and what identifies it: other Pythons have other sources."""

    texts: dict[str, Tensor]
    about: dict[str, Any]

    def batch(self, scale: Scale, seed: int, step: int) -> Tensor:
        """Return random windows of the training text, which depend on nothing but the arguments."""
        generator = torch.Generator().manual_seed(1_000_000 * seed + step)
        text = self.texts["train"]
        starts = torch.randint(len(text) - scale.context, (scale.batch,), generator=generator)
        return torch.stack([text[start : start + scale.context + 1] for start in starts]).long()

    def windows(self, part: str, scale: Scale) -> Tensor:
        """Return windows of this part of the text, evenly spaced from its begin to its end."""
        text = self.texts[part]
        starts = torch.linspace(0, len(text) - scale.context - 1, scale.windows).long()
        return torch.stack([text[start : start + scale.context + 1] for start in starts]).long()


def standard_library() -> Corpus:
    """Read the library's source files without its tests; each belongs to one part, by its path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    sources: dict[str, list[bytes]] = {part: [] for part in PARTS}
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if NOT_TRAINED_ON.isdisjoint(relative.parts):
            sources[part_of(relative.as_posix())].append(path.read_bytes())
    texts = {part: b"\n".join(files) for part, files in sources.items()}
    about = {
        "python": platform.python_version(),
        "files": {part: len(files) for part, files in sources.items()},
        "bytes": {part: len(text) for part, text in texts.items()},
        "sha256": hashlib.sha256(b"".join(texts.values())).hexdigest(),
    }
    return Corpus({part: as_tensor(text) for part, text in texts.items()}, about)


def as_tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def part_of(path: str) -> str:
    twentieth = int(hashlib.sha256(f"{SPLIT_SEED}/{path}".encode()).hexdigest(), 16) % 20
    return {0: "choose", 1: "report"}.get(twentieth, "train")


class Training:
    """A model, what trains it, and its averages. All of it is saved and resumed."""

    def __init__(self, run: Run, scale: Scale, corpus: Corpus) -> None:
        torch.manual_seed(run.seed)
        self.run, self.scale, self.corpus = run, scale, corpus
        self.model = Decoder(scale.width, scale.layers, scale.context)
        kept = plan.rules(run.schedule, scale.steps)
        self.muon, self.adamw = averaging_optimizers(self.model, kept)
        self.averages = together(self.muon, self.adamw)
        # Averages of a model that others train. They have a dtype, or checkpoints, of their own.
        self.others: dict[str, AveragingOptimizer] = {}
        if run.schedule == "constant":
            self.others = averages_beside(self.model, kept)
            for optimizer in (self.muon, self.adamw):
                optimizer.update_averages("first")
        self.step_number, self.seconds = 0, 0.0
        self.points: list[dict[str, Any]] = []

    @property
    def optimizers(self) -> dict[str, AveragingOptimizer]:
        return {"muon": self.muon, "adamw": self.adamw, **self.others}

    @cached_property
    def steps(self) -> int:
        return self.scale.steps_of(self.run.percent)

    @cached_property
    def windows(self) -> dict[str, Tensor]:
        return {part: self.corpus.windows(part, self.scale) for part in PARTS[1:]}

    def step(self, rate: float) -> None:
        rate *= plan.relative_rate(self.run.schedule, self.step_number, self.steps)
        for optimizer in (self.muon, self.adamw):
            optimizer.zero_grad()
            for group in optimizer.param_groups:
                group["lr"] = rate
        batch = self.corpus.batch(self.scale, self.run.seed, self.step_number)
        bits_a_byte(self.model, batch).backward()
        for optimizer in self.optimizers.values():
            optimizer.step()
        self.step_number += 1

    def evaluate(self, kept: Path) -> None:
        """Add a point: the losses of the weights, of all averages and of what is made of them."""
        found = {
            name: losses
            for name, losses in self.averages.evaluate_averages(self.losses).items()
            if name == "weights" or self.muon.n_averaged(name)
        }
        if self.run.schedule == "constant":
            with self.averages.swap_to_averaged(plan.bema(self.step_number)):
                found["BEMA"] = self.losses()
            for dtype in ("bfloat16", "stochastic bfloat16"):
                for name in plan.IN_BFLOAT16:
                    with self.others[dtype].swap_to_averaged(name):
                        found[f"{name}, {dtype}"] = self.losses()
            if self.scale.is_mark(self.step_number):
                found |= self.merged(kept)
            if self.step_number == self.steps:
                found |= self.reconstructed(kept)
        by_part = {part: {name: each[part] for name, each in found.items()} for part in PARTS[1:]}
        self.points.append({"step": self.step_number, **by_part})

    def merged(self, kept: Path) -> dict[str, Losses]:
        """Return the losses of merged checkpoints, as though the run ended here."""
        steps = self.scale.merged_steps(self.step_number)
        last = [checkpoint_at(kept, step) for step in steps]
        return {
            plan.merged(kind): self.losses(merge(last, decay_shares(kind, len(last)), key="model"))
            for kind in plan.MERGES
        }

    def reconstructed(self, kept: Path) -> dict[str, Losses]:
        """Return the losses of averages of each width, made from those that were saved."""
        paths, saved = sorted(kept.glob("*.pt")), self.others["saved"]
        return {
            plan.made(width): self.losses(reconstruct(paths, self.model, width, saved))
            for width in plan.WIDTHS
        }

    @torch.no_grad()
    def losses(self, weights: dict[str, Tensor] | None = None) -> Losses:
        """Return the loss on each part of the text, of the model's weights or of others."""
        model = self.model
        if weights is not None:
            model = Decoder(self.scale.width, self.scale.layers, self.scale.context)
            model.load_state_dict(weights)
        return {part: bits_a_byte(model, text).item() for part, text in self.windows.items()}

    def keep(self, path: Path) -> None:
        """Save what `merge` and `reconstruct` need."""
        path.parent.mkdir(exist_ok=True)
        averages = self.others["saved"].state_dict()
        save({"model": self.model.state_dict(), "optimizer": averages}, path)

    def state_dict(self) -> dict[str, Any]:
        states = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        counts = {"step": self.step_number, "seconds": self.seconds, "points": self.points}
        return {"model": self.model.state_dict(), **states, **counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state[name])
        self.step_number, self.seconds = state["step"], state["seconds"]
        self.points = state["points"]


def averaging_optimizers(
    model: Decoder, rules: dict[str, Rule]
) -> tuple[AveragingOptimizer, AveragingOptimizer]:
    """Return Muon of the blocks' matrices and AdamW of the rest, which keep the same averages."""
    muon, adamw = plain_optimizers(model)
    return AveragingOptimizer(muon, rules), AveragingOptimizer(adamw, rules)


def plain_optimizers(model: Decoder) -> tuple[torch.optim.Muon, torch.optim.AdamW]:
    matrices = [weight for weight in model.blocks.parameters() if weight.ndim == 2]
    others = [weight for weight in model.parameters() if all(weight is not m for m in matrices)]
    # Updates of Muon as large as AdamW's: one rate serves both.
    muon = torch.optim.Muon(matrices, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    return muon, torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0)


def averages_beside(model: Decoder, rules: dict[str, Rule]) -> dict[str, AveragingOptimizer]:
    chosen = {name: rules[name] for name in plan.IN_BFLOAT16}
    widths = {plan.kept(width): PowerEMA.from_width(width) for width in plan.SAVED_WIDTHS}
    # Buffers are copied: in bfloat16 the angles of positions would be rounded.
    half = partial(AveragingOptimizer.of, model, chosen, use_buffers=False, dtype=torch.bfloat16)
    return {
        "bfloat16": half(),
        "stochastic bfloat16": half(rounding="stochastic"),
        "saved": AveragingOptimizer.of(model, widths, use_buffers=False),
    }


def train(
    run: Run,
    scale: Scale,
    corpus: Corpus,
    folder: Path,
    *,
    resume: bool = False,
    progress: Callable[[], object] = lambda: None,
) -> Path:
    """Train once and write the result, as JSON. Return its path.

    Args:
        resume: continue at the last point of a run that was stopped, if there is one.
        progress: called after each step.
    """
    rate = best_rate(run, read_results(folder)) if run.rate is None else run.rate
    training = Training(run, scale, corpus)
    checkpoint, kept = folder / f"{run.name}.pt", folder / f"{run.name}.kept"
    folder.mkdir(parents=True, exist_ok=True)
    if resume and checkpoint.exists():
        training.load_state_dict(torch.load(checkpoint, weights_only=True))
    keeps = set(scale.kept_steps()) if run.schedule == "constant" else set()
    begin = time.perf_counter() - training.seconds
    while training.step_number < training.steps:
        training.step(rate)
        if training.step_number in keeps:
            training.keep(checkpoint_at(kept, training.step_number))
        if scale.is_point(training.step_number):
            training.evaluate(kept)
            training.seconds = time.perf_counter() - begin
            save(training.state_dict(), checkpoint)
        progress()
    about = {"corpus": corpus.about, "seconds": training.seconds}
    path = write_result(folder, run, scale, about | {"rate": rate, "points": training.points})
    checkpoint.unlink()
    shutil.rmtree(kept, ignore_errors=True)
    return path


def checkpoint_at(kept: Path, step: int) -> Path:
    return kept / f"{step:06}.pt"


def save(state: dict[str, Any], path: Path) -> None:
    write_atomically(path, lambda file: torch.save(state, file))
