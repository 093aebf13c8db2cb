"""Write a new version where it is named: python release.py 0.2.0. `make release` does the rest."""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parent
CHANGELOG = ROOT / "CHANGELOG.md"
CITATION = ROOT / "CITATION.cff"
PACKAGE = ROOT / "averaging_optim" / "__init__.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="three numbers, such as 0.2.0")
    version: str = parser.parse_args().version
    problem = what_speaks_against(version)
    if problem:
        parser.error(problem)
    today = f"{datetime.datetime.now(datetime.timezone.utc):%Y-%m-%d}"
    substitute(PACKAGE, r'(?<=^__version__ = ").*(?=")', version)
    substitute(CITATION, r"(?<=^version: ).*", version)
    substitute(CITATION, r"(?<=^date-released: ).*", today)
    substitute(CHANGELOG, r"(?<=^## \[Unreleased\]\n)", f"\n## [{version}] - {today}\n")


def what_speaks_against(version: str) -> str | None:
    """Return what keeps this version from being released, with what to do, or None."""
    if not re.fullmatch(r"\d+\.\d+\.\d+", version):
        return f"`version` must be three numbers, got {version!r}. Say, for example, 0.2.0."
    last = found(PACKAGE, r'^__version__ = "(.*)"')
    if numbers(version) <= numbers(last):
        return f"`version` must be later than {last}, got {version}."
    if not found(CHANGELOG, r"^## \[Unreleased\]\n(.*?)^## ").strip():
        return "CHANGELOG.md has nothing under Unreleased. Write what changes for users."
    uncommitted = git("status", "--porcelain")
    if uncommitted:
        return f"There are changes that are not committed. Commit or stash them:\n{uncommitted}"
    return None


def numbers(version: str) -> list[int]:
    return [int(number) for number in version.split(".")]


def found(path: Path, pattern: str) -> str:
    (match,) = re.findall(pattern, path.read_text(), re.MULTILINE | re.DOTALL)
    return str(match)


def substitute(path: Path, pattern: str, replacement: str) -> None:
    path.write_text(re.sub(pattern, replacement, path.read_text(), flags=re.MULTILINE))


def git(*arguments: str) -> str:
    return subprocess.run(
        ["git", *arguments], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout


if __name__ == "__main__":
    main()
