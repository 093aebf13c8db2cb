"""`release.py` gives the files that name it a new version, or changes nothing."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path

import pytest
from pages import ROOT

import averaging_optim

FILES = [ROOT / "release.py", ROOT / "CITATION.cff", ROOT / "CHANGELOG.md"]
PACKAGE = Path(averaging_optim.__file__)
NEW_ENTRY = "## [Unreleased]\n\n### Added\n\n- Something.\n"


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return a repository of what `release.py` reads, with an unreleased change."""
    (tmp_path / "averaging_optim").mkdir()
    shutil.copy(PACKAGE, tmp_path / "averaging_optim")
    for file in FILES:
        shutil.copy(file, tmp_path)
    changelog = tmp_path / "CHANGELOG.md"
    head, _, rest = changelog.read_text().partition("## [Unreleased]\n")
    last = rest[rest.index("\n## [") :]
    changelog.write_text(f"{head}{NEW_ENTRY}{last}")
    citation = tmp_path / "CITATION.cff"
    citation.write_text(re.sub(r"(?<=date-released: ).*", "2000-01-01", citation.read_text()))
    git(tmp_path, "init", "--quiet")
    commit(tmp_path)
    return tmp_path


def git(project: Path, *arguments: str) -> str:
    me = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    return subprocess.run(
        ["git", *me, *arguments], check=True, capture_output=True, text=True, cwd=project
    ).stdout


def commit(project: Path) -> None:
    git(project, "add", "--all")
    git(project, "commit", "--quiet", "--message", "Change something")


def release(project: Path, version: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "release.py", version]
    return subprocess.run(command, capture_output=True, text=True, cwd=project)


def test_a_release_names_its_version_and_day_wherever_they_are_named(project: Path) -> None:
    assert release(project, "99.0.0").returncode == 0
    added = re.findall(r"^\+([^+\n]+)$", git(project, "diff"), re.MULTILINE)
    today = added[0].removeprefix("## [99.0.0] - ")
    assert date.fromisoformat(today).year >= 2026
    assert added == [
        f"## [99.0.0] - {today}",
        "version: 99.0.0",
        f"date-released: {today}",
        '__version__ = "99.0.0"',
    ]


def test_a_release_takes_what_was_unreleased(project: Path) -> None:
    release(project, "99.0.0")
    text = (project / "CHANGELOG.md").read_text()
    assert re.search(
        r"^## \[Unreleased\]\n\n## \[99.0.0\] - .*\n\n### Added\n\n- Something", text, re.M
    )


@pytest.mark.parametrize(
    ("version", "message"),
    [
        ("99.0", "`version` must be three numbers, got '99.0'. Say, for example, 0.2.0."),
        ("v99.0.0", "`version` must be three numbers, got 'v99.0.0'."),
        ("0.0.10", "`version` must be later than "),
    ],
)
def test_a_version_that_is_none_or_not_later_is_refused(
    version: str, message: str, project: Path
) -> None:
    refused = release(project, version)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert git(project, "status", "--porcelain") == ""


def test_changes_that_are_not_committed_are_no_release(project: Path) -> None:
    (project / "notes.txt").write_text("to do")
    refused = release(project, "99.0.0")
    assert refused.returncode == 2
    assert "Commit or stash them:\n?? notes.txt" in refused.stderr
    assert git(project, "status", "--porcelain") == "?? notes.txt\n"


def test_a_release_of_nothing_is_refused(project: Path) -> None:
    changelog = project / "CHANGELOG.md"
    changelog.write_text(changelog.read_text().replace(NEW_ENTRY, "## [Unreleased]\n"))
    commit(project)
    refused = release(project, "99.0.0")
    assert refused.returncode == 2
    assert "CHANGELOG.md has nothing under Unreleased." in refused.stderr
    assert git(project, "status", "--porcelain") == ""
