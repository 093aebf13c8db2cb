"""The pages of the site, and their Python blocks, run as they stand."""

from __future__ import annotations

import doctest
import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parent.parent
_FOUND = [*(ROOT / "docs").glob("*.md"), *(ROOT / "docs" / "how-to").glob("*.md")]
PAGES = {str(page.relative_to(ROOT)): page.read_text() for page in sorted(_FOUND)}

# Of libraries that only the clients' environment has: see tests/clients/test_pages.py, and
# test_deepspeed.py for the one that needs several processes.
DEEPSPEED = "docs/how-to/deepspeed.md"
OF_ONE_PROCESS = {f"docs/how-to/{name}.md" for name in ("fastai", "ignite", "keras", "mmengine")}
OF_CLIENTS = {DEEPSPEED, *OF_ONE_PROCESS}


def blocks(text: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def run(text: str, page: str) -> None:
    torch.manual_seed(0)
    namespace: dict[str, Any] = {}
    for block in blocks(text):
        exec(compile(block, page, "exec"), namespace)


def broken_promises(text: str, printed: str) -> list[str]:
    """Return what a page says that it prints, as far as it isn't printed in that order."""
    lines = iter(printed.splitlines())
    promises = re.findall(r"print\(.*\)  # prints (.*)$", text, re.MULTILINE)
    return [promise for promise in promises if not any(_matches(promise, line) for line in lines)]


def _matches(promise: str, line: str) -> bool:
    return doctest.OutputChecker().check_output(f"{promise}\n", f"{line}\n", doctest.ELLIPSIS)
