"""Keras' models on its torch backend, fitted with an optimizer of torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import keras
import torch
from torch import Tensor
from training import recurrence, same, values

from averaging_optim import AveragingOptimizer
from clients.data import IMAGES, LABELS
from clients.driven import RULE, Run, Wrap, check_driven, wrapped

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


class Classifier(keras.Sequential):
    """Trains with an optimizer of torch, as "Customizing fit() with PyTorch" has it."""

    def train_step(self, data: Any) -> Any:
        images, labels = data
        self.torch_optimizer.zero_grad()
        loss = self.compute_loss(y=labels, y_pred=self(images, training=True))
        loss.backward()
        self.torch_optimizer.step()
        return {"loss": loss}


def classifier(wrap: Wrap) -> Any:
    keras.utils.set_random_seed(0)
    layers = keras.layers
    model = Classifier(
        [keras.Input((64,)), layers.Dense(8, "relu"), layers.Dropout(0.1), layers.Dense(10)]
    )
    model.torch_optimizer = wrap(torch.optim.Adam(model.parameters(), lr=0.01))
    model.compile(None, loss=LOSS)
    return model


def fitted(model: Any) -> Run:
    model.fit(IMAGES, LABELS, batch_size=16, epochs=2, shuffle=False, verbose=0)
    return Run(model, model.torch_optimizer, lambda: torch.tensor(model.predict(IMAGES, verbose=0)))


def test_fit_trains_as_without_the_wrapper() -> None:
    check_driven(lambda wrap: fitted(classifier(wrap)), steps=8)


def test_statistics_that_are_given_as_buffers_are_averaged() -> None:
    layer = keras.layers.BatchNormalization()
    model = Classifier([keras.Input((64,)), layer, keras.layers.Dense(10)])
    adam = torch.optim.Adam([weight.value for weight in model.trainable_variables], lr=0.01)
    snapshots: list[list[Tensor]] = []
    adam.register_step_post_hook(lambda *_: snapshots.append(values([layer.moving_mean.value])))
    statistics = [value.value for value in model.non_trainable_variables]
    model.torch_optimizer = AveragingOptimizer(adam, RULE, buffers=statistics)
    model.compile(None, loss=LOSS)
    run = fitted(model)
    with run.optimizer.swap_to_averaged():
        assert same([layer.moving_mean.value], recurrence(RULE, snapshots))
    assert same([layer.moving_mean.value], snapshots[-1])


def test_weights_saved_inside_a_swap_are_the_average(tmp_path: Path) -> None:
    run = fitted(classifier(wrapped))
    with run.optimizer.swap_to_averaged():
        expected = run.evaluate()
        run.model.save_weights(tmp_path / "averaged.weights.h5")
    loaded = classifier(wrapped)
    loaded.load_weights(tmp_path / "averaged.weights.h5")
    assert torch.equal(torch.tensor(loaded.predict(IMAGES, verbose=0)), expected)
