"""Executes the notebooks beside this file, and keeps them with their new outputs."""

from __future__ import annotations

import base64
import io
import os
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from PIL import Image
from tqdm import tqdm

FOLDER = Path(__file__).parent
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def executed(path: Path, folder: Path = FOLDER) -> Any:
    """Return the notebook with new outputs, executed in this folder. Raises what a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    # One thread: sums are then formed in one order on any number of cores.
    kernel = {**os.environ, "OMP_NUM_THREADS": "1"}
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute(env=kernel)
    notebook.metadata["language_info"] = {"name": "python"}  # without the version that ran it
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)  # when it was run
        for output in cell.get("outputs", []):
            _shrink_picture(output.get("data", {}))
    return notebook


def _shrink_picture(data: dict[str, str]) -> None:
    """Give a PNG 128 colours, which takes half the bytes and is not to be seen."""
    if "image/png" in data:
        file = io.BytesIO()
        picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).convert("RGB")
        picture.quantize(128, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
        data["image/png"] = base64.b64encode(file.getvalue()).decode()


if __name__ == "__main__":
    for path in tqdm(NOTEBOOKS, unit="notebook"):
        nbformat.write(executed(path), path)
