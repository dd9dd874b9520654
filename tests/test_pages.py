"""What the pages for people must have: tables with their origin, links that lead somewhere."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT


def sections_with_tables(page: str) -> dict[str, str]:
    """Text by heading; a subsection stands for itself."""
    sections = re.split(r"^##+ ", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    return {one.split("\n")[0]: one for one in sections if re.search(r"^\|---", one, re.MULTILINE)}


def test_every_table_of_results_says_how_and_on_what_it_was_made_and_where_its_records_are() -> None:
    found = sections_with_tables("docs/RESULTS.md")
    assert len(found) > 6
    for heading, text in found.items():
        for needed in ("record", "machine", r"scripts/\w+\.sh|python |pytest |\w+\.py "):
            assert re.search(needed, text, re.IGNORECASE), (heading, needed)


@pytest.mark.parametrize("page", ["README.md", "NOISE_TYPES_GUIDE.md", "docs/RESULTS.md", "docs/LOG.md", "results/README.md"])
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", (ROOT / page).read_text(encoding="utf-8")):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings], anchor
