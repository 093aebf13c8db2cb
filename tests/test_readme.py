"""What the README and the demo promise, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def test_the_code_of_the_readme_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    for block in BLOCKS:
        exec(compile(block, "README.md", "exec"), namespace)
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 8
    # The noise of the targets has variance 1.
    assert losses[0] < 1.2


def test_the_first_program_fits_the_first_screen() -> None:
    assert README.splitlines().index("```python") < 8
    assert 12 <= len(BLOCKS[0].strip().splitlines()) <= 15


def test_everything_the_readme_links_to_is_there() -> None:
    links = set(re.findall(r"\]\(([^)#:]+)\)", README))
    assert {link for link in links if not (ROOT / link).exists()} == set()


def test_the_demo_prints_its_table_and_draws_its_picture(tmp_path: Path) -> None:
    picture = tmp_path / "digits.png"
    demo = str(ROOT / "examples" / "digits.py")
    command = [sys.executable, demo, "--seeds=1", "--epochs=2", f"--picture={picture}"]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    rows = re.findall(r"^\| (.*?) +\| +(\d+\.\d) ± 0\.0 % +\|$", done.stdout, re.MULTILINE)
    assert [row for row, _ in rows] == re.findall(r"^\| (.*?) +\| +\d.*± .*$", README, re.MULTILINE)
    # Ten classes: chance is 10 %.
    assert min(float(percent) for _, percent in rows) > 20
    assert picture.read_bytes().startswith(b"\x89PNG")
