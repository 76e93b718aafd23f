"""References: the committed file is what the docstrings cite, and CITATION.cff names this version."""

import re
from pathlib import Path

import pytest
import references

import fusedloss

ROOT = Path(__file__).parents[2]


def test_the_file_is_what_the_docstrings_cite():
    assert references.PAGE.read_text() == references.written(), "run python tools/references.py"


def test_works_are_told_apart():
    """Two works of one surname and year by the file that cites them; every key and every title once."""
    named = dict(references.citations())
    assert "Wang et al. 2018" in named and "Wang et al. 2018; margin_softmax" in named
    for field in ("key", "title"):
        values = [getattr(work, field) for work in references.WORKS.values()]
        assert len(values) == len(set(values))
    for cited, work in references.WORKS.items():
        surname = re.sub(r"( et al\.| (&|and) .*)? \d{4}.*", "", cited)
        assert work.authors.startswith(f"{surname},") and re.findall(r"\d{4}", cited)[0] in work.key
        more_than_one, two = "et al." in cited, re.search(" (&|and) ", cited) is not None
        assert len(work.authors.split("; ")) == (2 if two else 1) or more_than_one


def test_a_citation_without_a_work_is_an_error(monkeypatch):
    works = {cited: work for cited, work in references.WORKS.items() if cited != "Zhai et al. 2023"}
    monkeypatch.setattr(references, "WORKS", works)
    with pytest.raises(SystemExit, match=r"lacks \['Zhai et al. 2023'\], and \[\] are not cited"):
        references.written()


def test_the_citation_and_the_changelog_have_this_version():
    version = fusedloss.__version__
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    sections = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d{2}-\d{2}))?$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert sections[0] == ("Unreleased", "") and version == sections[1][0]
    dated = [date for _, date in sections[1:]]
    assert dated == sorted(dated, reverse=True) and all(dated)
    (released,) = re.findall(r"^date-released: \"?([\d-]+)", (ROOT / "CITATION.cff").read_text(), re.M)
    assert released == dated[0]
