"""pytorch-forecasting's models make the wrapper, and Lightning drives and saves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import Trainer
from pytorch_forecasting import NBeats, TimeSeriesDataSet

from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped

SERIES = TimeSeriesDataSet(
    pd.DataFrame({"hour": range(40), "series": "a", "value": np.sin(np.arange(40) / 5)}),
    time_idx="hour",
    target="value",
    group_ids=["series"],
    time_varying_unknown_reals=["value"],
    max_encoder_length=8,
    max_prediction_length=2,
)
QUIET: Any = {
    "accelerator": "cpu",
    "enable_checkpointing": False,
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
}


def trained(wrap: Wrap, folder: Path, epochs: int = 2, **resuming: Any) -> Run:
    def adam(parameters: Any, **arguments: Any) -> Any:
        return wrap(torch.optim.Adam(parameters, **arguments))

    # Without dropout, whose random numbers Lightning does not resume.
    model = NBeats.from_dataset(
        SERIES, optimizer=adam, learning_rate=0.01, widths=[8, 8], dropout=0.0
    )
    trainer = Trainer(max_epochs=epochs, **QUIET)
    batches = SERIES.to_dataloader(batch_size=8, shuffle=False)
    evaluated = SERIES.to_dataloader(train=False, batch_size=8)
    trainer.fit(model, batches, evaluated, **resuming)
    trainer.save_checkpoint(folder / f"{epochs}.ckpt")

    def evaluate() -> Any:
        return model.predict(evaluated, trainer_kwargs={**QUIET})

    return Run(model, trainer.optimizers[0], evaluate)


def test_a_model_trains_as_without_the_wrapper(tmp_path: Path) -> None:
    check_driven(lambda wrap: trained(wrap, tmp_path), steps=6)


def test_a_model_resumes_from_a_checkpoint(tmp_path: Path) -> None:
    def halves() -> Run:
        trained(wrapped, tmp_path, epochs=1)
        # Normalizers of pytorch-forecasting are in it too.
        return trained(wrapped, tmp_path, ckpt_path=tmp_path / "1.ckpt", weights_only=False)

    check_resumed(seeded(halves), seeded(lambda: trained(wrapped, tmp_path)))
