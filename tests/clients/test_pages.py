"""The programs of the pages about these libraries."""

from __future__ import annotations

from pathlib import Path

import pytest
from pages import OF_ONE_PROCESS, PAGES, broken_promises, run


@pytest.mark.parametrize("page", sorted(OF_ONE_PROCESS))
def test_the_code_of_a_page_runs_from_top_to_bottom_and_prints_what_it_says(
    page: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    run(PAGES[page], page)
    assert broken_promises(PAGES[page], capsys.readouterr().out) == []
