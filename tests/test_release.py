"""What a release is made of: metadata, citation, bug form, and that the files of a source distribution are there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import yaml

import refreshkv

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))


def test_the_changelog_has_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text("utf-8")
    assert re.search(
        rf"^## {re.escape(refreshkv.__version__)} - \d{{4}}-\d\d-\d\d$", changelog, re.M
    )


def test_what_goes_into_a_source_distribution_is_there() -> None:
    included = PROJECT["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
    assert all((ROOT / name.strip("/")).exists() for name in included)
    for name in ("/examples", "/SECURITY.md", "/CITATION.cff"):
        assert name in included


def test_the_page_of_a_package_index_has_no_relative_link() -> None:
    assert not re.findall(r"\]\((?!https://)", PROJECT["project"]["readme"]["text"])


def test_links_of_the_documents_lead_somewhere() -> None:
    for page in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")):
        for link in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text("utf-8")):
            assert link.startswith("https://") or (page.parent / link).exists(), (page.name, link)


def test_citation_names_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text("utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["preferred-citation"]["url"] == PROJECT["project"]["urls"]["Paper"]


def test_a_bug_report_is_asked_for_the_line_of_info() -> None:
    form = yaml.safe_load((ROOT / ".github/ISSUE_TEMPLATE/bug.yml").read_text("utf-8"))
    assert any("refreshkv info --json" in field["attributes"]["label"] for field in form["body"])
