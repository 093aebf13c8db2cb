"""diffusers' training loop, and a pipeline saved with the average."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import Accelerator
from diffusers.optimization import get_cosine_schedule_with_warmup
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from clients.driven import Run, Wrap, check_driven, check_resumed, seeded, wrapped

IMAGES = torch.rand(8, 1, 8, 8, generator=torch.Generator().manual_seed(0))
NOISE: Any = diffusers.DDPMScheduler(num_train_timesteps=20)


def unet() -> Any:
    return diffusers.UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(4, 8),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=2,
        norm_num_groups=2,
    )


def prepared(wrap: Wrap) -> tuple[Any, ...]:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = unet()
    optimizer = wrap(torch.optim.AdamW(model.parameters(), lr=1e-3))
    scheduler = get_cosine_schedule_with_warmup(optimizer, 1, 8)
    loader: Any = DataLoader(TensorDataset(IMAGES), batch_size=2)
    return accelerator, *accelerator.prepare(model, optimizer, loader, scheduler)


def train_an_epoch(
    accelerator: Accelerator, model: Any, optimizer: Any, loader: Any, scheduler: Any
) -> Run:
    model.train()
    for (clean,) in loader:
        noise, steps = torch.randn(clean.shape), torch.randint(0, 20, (len(clean),))
        with accelerator.accumulate(model):
            predicted = model(NOISE.add_noise(clean, noise, steps), steps, return_dict=False)[0]
            accelerator.backward(nn.functional.mse_loss(predicted, noise))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
    model.eval()
    return Run(model, optimizer.optimizer, lambda: model(IMAGES, 3).sample.detach())


def test_the_loop_of_a_diffusion_model_trains_as_without_the_wrapper() -> None:
    check_driven(lambda wrap: train_an_epoch(*prepared(wrap)), steps=2)


def test_the_loop_of_a_diffusion_model_resumes_from_a_saved_state(tmp_path: Path) -> None:
    def whole() -> Run:
        parts = prepared(wrapped)
        train_an_epoch(*parts)
        torch.manual_seed(1)
        return train_an_epoch(*parts)

    def halves() -> Run:
        parts = prepared(wrapped)
        train_an_epoch(*parts)
        parts[0].save_state(str(tmp_path))
        parts = prepared(wrapped)
        parts[0].load_state(str(tmp_path))
        torch.manual_seed(1)
        return train_an_epoch(*parts)

    check_resumed(seeded(halves), seeded(whole))


def test_a_pipeline_saved_inside_a_swap_has_the_average(tmp_path: Path) -> None:
    run = seeded(lambda: train_an_epoch(*prepared(wrapped)))
    with run.optimizer.swap_to_averaged():
        expected = run.evaluate()
        pipeline: Any = diffusers.DDPMPipeline(run.model, NOISE)
        pipeline.save_pretrained(tmp_path)
    saved = diffusers.DDPMPipeline.from_pretrained(tmp_path)
    assert torch.equal(saved.unet(IMAGES, 3).sample, expected)
