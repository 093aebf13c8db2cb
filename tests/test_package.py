"""What tells others about the package agrees: page, citation, forms, workflow and changelog."""

from __future__ import annotations

import re
import sys
from typing import Any

import pytest
from pages import ROOT

import averaging_optim

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROJECT = PYPROJECT["project"]
HOME = PROJECT["urls"]["Home"]
WORKFLOW = (ROOT / ".github" / "workflows" / "tests.yml").read_text()
THAT_LINK = [
    "CITATION.cff",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "pyproject.toml",
    ".github/ISSUE_TEMPLATE/config.yml",
]


def found(pattern: str, file: str) -> list[str]:
    return re.findall(pattern, (ROOT / file).read_text(), re.MULTILINE)


def readme_of_the_package_page() -> str:
    text = (ROOT / "README.md").read_text()
    page = PYPROJECT["tool"]["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]
    for each in page["substitutions"]:
        text = re.sub(each["pattern"], each["replacement"], text)
    return text


def test_links_of_the_package_page_lead_to_what_the_repository_has() -> None:
    links = re.findall(r"\]\(([^)#]+)", readme_of_the_package_page())
    of_a_release = re.compile(rf"{HOME}/(?:blob|raw)/v\$HFPR_VERSION/(.+)")
    paths = [match[1] for match in map(of_a_release.fullmatch, links) if match]
    assert [link for link in links if not link.startswith("https://")] == []
    assert [path for path in paths if not (ROOT / path).exists()] == []
    assert paths


def test_pictures_of_the_package_page_are_files_not_pages_about_them() -> None:
    pictures = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", readme_of_the_package_page())
    assert pictures
    assert [link for link in pictures if not link.startswith(f"{HOME}/raw/")] == []


@pytest.mark.parametrize("file", THAT_LINK)
def test_addresses_of_the_project_begin_with_its_home(file: str) -> None:
    addresses = found(r"https://github\.com/[^\s\"')>]*averaging[^\s\"')>]*", file)
    assert addresses
    assert [each for each in addresses if not f"{each}/".startswith(f"{HOME}/")] == []


def test_the_citation_and_the_changelog_name_the_version_and_its_day() -> None:
    version = averaging_optim.__version__
    (day,) = found(r"^date-released: (\d{4}-\d\d-\d\d)$", "CITATION.cff")
    assert found(r"^version: (.*)$", "CITATION.cff") == [version]
    assert found(r"^## \[(\d.*)$", "CHANGELOG.md")[0] == f"{version}] - {day}"


def test_the_workflow_calls_targets_of_the_makefile() -> None:
    called = re.findall(r"\btarget: \[?([\w, -]+)", WORKFLOW)
    targets = {target for group in called for target in group.split(", ")}
    assert targets - set(found(r"^([\w-]+):(?!=)", "Makefile")) == set()
    assert "test" in targets


def test_the_workflow_runs_every_python_that_the_package_page_lists() -> None:
    (matrix,) = re.findall(r"python: \[(.*)\]", WORKFLOW)
    listed = [each.rpartition(" :: ")[2] for each in PROJECT["classifiers"] if ":: 3." in each]
    assert matrix.replace('"', "").split(", ") == listed
    assert PROJECT["requires-python"] == f">={listed[0]}"


def test_commits_are_checked_by_the_ruff_that_the_tests_run() -> None:
    assert found(r"^ruff==(.*)$", "constraints.txt") == found(
        r"ruff-pre-commit\n    rev: v(\S+)", ".pre-commit-config.yaml"
    )
