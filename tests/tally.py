"""What came of each optimizer in test_third_party.py, counted by package."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable

import pytest

# The name under which a test records which case it is about.
CASE = "case"
# How the reason of a skipped test begins.
NOT_ASKED = "not asked"
NOT_RUNNABLE = "not runnable bare"
RESULTS = ("passed", "failed", NOT_RUNNABLE)


def table(reports: Iterable[pytest.TestReport]) -> str:
    """Return the number of configurations by package and result, in Markdown."""
    packages: dict[str, Counter[str]] = defaultdict(Counter)
    for case, outcomes in outcomes_by_case(reports).items():
        packages[case.partition("-")[0]][result_of(outcomes)] += 1
    total = sum(packages.values(), Counter[str]())
    counts = [
        [package, str(results.total()), *(str(results[each]) for each in RESULTS)]
        for package, results in [*sorted(packages.items()), ("all", total)]
    ]
    rows = [["package", "configurations", *RESULTS], ["---"] * 5, *counts]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def outcomes_by_case(reports: Iterable[pytest.TestReport]) -> dict[str, set[str]]:
    outcomes: dict[str, set[str]] = defaultdict(set)
    for report in reports:
        for name, case in report.user_properties:
            if name == CASE:
                outcomes[str(case)].add(outcome_of(report))
    return outcomes


def outcome_of(report: pytest.TestReport) -> str:
    return NOT_RUNNABLE if NOT_RUNNABLE in report.longreprtext else report.outcome


def result_of(outcomes: set[str]) -> str:
    """Return what came of a case: it passes if it holds to all that is asked of it."""
    return next((each for each in ("failed", NOT_RUNNABLE) if each in outcomes), "passed")
