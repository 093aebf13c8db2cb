"""What the README, the pages of the site and the demo promise, run as they stand."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from accelerate_state import forget_accelerators
from pages import OF_CLIENTS, PAGES, ROOT, blocks, broken_promises, run

import averaging_optim
from averaging_optim import post_hoc, testing

README = (ROOT / "README.md").read_text()
GETTING_STARTED = "docs/getting-started.md"
DISTRIBUTED = "docs/how-to/distributed.md"
REFERENCE = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.rst"))
# Needs what other libraries have saved: see test_migration.py.
MIGRATION = "docs/how-to/migration.md"
OF_THEIR_OWN = {GETTING_STARTED, DISTRIBUTED, MIGRATION, *OF_CLIENTS}
OTHERS = [page for page in PAGES if blocks(PAGES[page]) and page not in OF_THEIR_OWN]

pytestmark = [
    # opacus says that its noise is drawn by torch, and torch that data needs no gradient.
    pytest.mark.filterwarnings("ignore:Secure RNG turned off:UserWarning"),
    pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning"),
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_the_code_of_the_readme_runs_from_top_to_bottom(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(README, "README.md")
    losses = [float(line.split()[-1]) for line in capsys.readouterr().out.splitlines()]
    assert len(losses) == 5
    # The noise of the targets has variance 1.
    assert losses[0] < 1.2


@pytest.mark.parametrize("page", OTHERS)
def test_the_code_of_a_page_runs_from_top_to_bottom_and_prints_what_it_says(
    page: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if "torch.optim.Muon" in PAGES[page] and torch.__version__ < "2.9":
        pytest.skip("torch has Muon from 2.9 on")
    forget_accelerators()
    run(PAGES[page], page)
    assert broken_promises(PAGES[page], capsys.readouterr().out) == []


def test_the_average_lags_at_first_and_is_better_in_the_end_as_shown_to_those_getting_started(
    capsys: pytest.CaptureFixture[str],
) -> None:
    run(PAGES[GETTING_STARTED], GETTING_STARTED)
    pattern = r"epoch \d: (\d\.\d+) raw, (\d\.\d+) averaged"
    texts = PAGES[GETTING_STARTED], capsys.readouterr().out
    shown, found = (
        torch.tensor([[*map(float, row)] for row in re.findall(pattern, text)]) for text in texts
    )
    # Another processor or version of torch rounds otherwise, and the weights wander otherwise.
    torch.testing.assert_close(found, shown, rtol=0, atol=0.1)
    raw, averaged = found.T
    assert raw[0] < averaged[0]
    assert averaged[4:].mean() < raw[4:].mean()


@pytest.mark.skipif(
    torch.__version__ < "2.9", reason="FSDP2 averages gradients on CPUs from torch 2.9 on"
)
def test_the_code_for_several_processes_runs_in_two(tmp_path: Path) -> None:
    program = tmp_path / "train.py"
    program.write_text("\n".join(blocks(PAGES[DISTRIBUTED])))
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*torchrun, str(program)], check=True, cwd=tmp_path, timeout=300)
    assert "0.weight" in torch.load(tmp_path / "averaged.pt", weights_only=True)


def test_the_first_program_fits_the_first_screen() -> None:
    assert README.splitlines().index("```python") < 8
    assert 12 <= len(blocks(README)[0].strip().splitlines()) <= 15


def test_everything_the_readme_links_to_is_there() -> None:
    links = set(re.findall(r"\]\(([^)#:]+)\)", README))
    assert {link for link in links if not (ROOT / link).exists()} == set()


@pytest.mark.parametrize("name", [*averaging_optim.__all__, *post_hoc.__all__, *testing.__all__])
def test_the_reference_lists_and_describes_what_is_public(name: str) -> None:
    assert re.search(rf"^   {name}$", REFERENCE, re.MULTILINE)
    assert re.search(rf"^\.\. auto\w+:: (\S+\.)?{name}$", REFERENCE, re.MULTILINE)


def test_each_test_of_a_library_has_a_row_in_the_table_of_what_works() -> None:
    linked = set(re.findall(r"\]\(\.\./(tests/[^)#]+)\)", PAGES["docs/works-with.md"]))
    assert {link for link in linked if not (ROOT / link).exists()} == set()
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "tests/clients").glob("test_*.py")}
    assert found - linked == {"tests/clients/test_pages.py"}


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
