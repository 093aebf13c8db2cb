"""The notebooks run, find what their text says, and are kept with their outputs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest
from execute import NOTEBOOKS, executed
from pages import ROOT


def kinds_of_output(cell: Any) -> list[str]:
    """Return what a cell shows; text that is printed in parts is one."""
    kinds = [key for output in cell.get("outputs", []) for key in output.get("data", ["text"])]
    return sorted(set(kinds))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_reproduces_its_outputs(path: Path, tmp_path: Path) -> None:
    """Its last cell holds the claims of its text as assertions."""
    kept = nbformat.read(path, as_version=4)
    *_, claims = [cell for cell in kept.cells if cell.cell_type == "code"]
    assert "assert " in claims.source
    found = executed(path, tmp_path)
    assert list(map(kinds_of_output, kept.cells)) == list(map(kinds_of_output, found.cells))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_asks_a_question_and_is_small(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    title, *_ = notebook.cells[0].source.splitlines()
    assert title.startswith("# ")
    assert title.endswith("?")
    assert 10 <= len(notebook.cells) <= 20
    assert path.stat().st_size < 200_000


def test_what_the_second_notebook_quotes_of_the_large_experiment_is_its_output() -> None:
    output = (ROOT / "examples" / "random_labels.txt").read_text()
    (row,) = re.findall(r"^\| mean +\|(.*)\|$", output, re.MULTILINE)
    text = (ROOT / "notebooks" / "2-ema-swa-t-adema.ipynb").read_text()
    own, swa, ema, t_adema, _ = (float(percent) for percent in re.findall(r"[\d.]+", row))
    quote = f"{own} % (training weights), {swa} % (SWA), {ema} % (EMA) and {t_adema} % (T_ADEMA)"
    assert quote in text


def test_all_four_notebooks_are_there() -> None:
    assert [path.name[0] for path in NOTEBOOKS] == ["1", "2", "3", "4"]
