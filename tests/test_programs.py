"""Programs that torch makes of a model under its average: whose values they compute with."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from training import averaging_sgd, small_model, train

from averaging_optim import EMA

Program = Callable[[Tensor], Tensor]
BATCH = torch.linspace(-1, 1, 12).reshape(4, 3)

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")


def exported(model: nn.Module) -> torch.export.ExportedProgram:
    return torch.export.export(model, (BATCH,))


def traced(model: nn.Module) -> torch.jit.ScriptModule:
    program: torch.jit.ScriptModule = torch.jit.trace(model, BATCH)
    return program


def scripted(model: nn.Module) -> torch.jit.ScriptModule:
    program: torch.jit.ScriptModule = torch.jit.script(model)
    return program


def frozen(model: nn.Module) -> torch.jit.ScriptModule:
    program: torch.jit.ScriptModule = torch.jit.freeze(traced(model.eval()))
    return program


Made = torch.export.ExportedProgram | torch.jit.ScriptModule
MAKE = [exported, traced, scripted, frozen]


def run(program: Made) -> Tensor:
    is_exported = isinstance(program, torch.export.ExportedProgram)
    output: Tensor = (program.module() if is_exported else program)(BATCH)
    return output


def through_a_file(program: Made) -> Made:
    file = io.BytesIO()
    if isinstance(program, torch.export.ExportedProgram):
        torch.export.save(program, file)
    else:
        torch.jit.save(program, file)
    file.seek(0)
    if isinstance(program, torch.export.ExportedProgram):
        return torch.export.load(file)
    loaded: torch.jit.ScriptModule = torch.jit.load(file)
    return loaded


@pytest.mark.parametrize("make", MAKE)
def test_a_program_of_an_averaged_model_in_a_file_is_the_average(
    make: Callable[[nn.Module], Made],
) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9))
    train(model, optimizer, 3)
    with optimizer.swap_to_averaged():
        expected = model(BATCH)
    program = through_a_file(make(optimizer.averaged_model(model)))
    train(model, optimizer, 3)
    assert torch.equal(run(program), expected)


@pytest.mark.parametrize("make", MAKE)
def test_a_program_saved_inside_a_swap_is_the_average(make: Callable[[nn.Module], Made]) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9))
    train(model, optimizer, 3)
    with optimizer.swap_to_averaged():
        expected = model(BATCH)
        program = through_a_file(make(model))
    assert torch.equal(run(program), expected)


@pytest.mark.parametrize("make", MAKE)
def test_a_program_made_inside_a_swap_is_the_training_weights_after_it(
    make: Callable[[nn.Module], Made],
) -> None:
    model = small_model()
    optimizer = averaging_sgd(model, EMA(0.9))
    train(model, optimizer, 3)
    with optimizer.swap_to_averaged():
        expected = model(BATCH)
        program = make(model)
        assert torch.equal(run(program), expected)
    assert torch.equal(run(program), model(BATCH))
