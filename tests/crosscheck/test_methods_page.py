"""docs/methods.md names what the registry holds, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

from refreshkv.methods import METHODS

PAGE = Path(__file__).parents[2] / "docs" / "methods.md"


def rows() -> dict[str, str]:
    """Method -> its row in the table of methods, which is wider than that of their settings."""
    lines = PAGE.read_text("utf-8").splitlines()
    found = (re.match(r"\| `([\w-]+)` \|", line) for line in lines)
    return {match[1]: match.string for match in found if match and match.string.count("|") > 4}


def test_every_method_has_its_row_in_the_order_of_the_registry() -> None:
    assert list(rows()) == list(METHODS)


def test_every_row_names_the_paper_of_its_method() -> None:
    for name, method in METHODS.items():
        arxiv = re.search(r"arXiv (\d+\.\d+)", method.source)
        if arxiv:
            assert arxiv[1] in rows()[name], name
