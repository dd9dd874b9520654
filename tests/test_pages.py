"""What the pages for people must have: tables with their origin, links that lead somewhere."""

from __future__ import annotations

import re

import pytest
from conftest import ROOT

from experiments import keys_page


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


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "results/README.md",
    "data/README.md",
    *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]


@pytest.mark.parametrize("page", PAGES)
def test_links_between_pages_lead_somewhere(page: str) -> None:
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", (ROOT / page).read_text(encoding="utf-8")):
        path = (ROOT / page).parent / target if target else ROOT / page
        assert path.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", one.lower()).replace(" ", "-") for one in headings], anchor


@pytest.mark.parametrize("page", PAGES)
def test_commands_name_what_is_there(page: str) -> None:
    if page == "docs/LOG.md":  # it tells of what was there
        return
    text = (ROOT / page).read_text(encoding="utf-8")
    for path in re.findall(
        r"(?:python3?|bash|run\.py|test\.py|nproc_per_node \d+|train\.sh|sbatch) ((?:[\w]+/)*\w+\.(?:py|sh|bash|yaml|sbatch))",
        text,
    ):
        assert (ROOT / path).is_file() or path in EXAMPLES, path
    for module in re.findall(r"python -m ((?:experiments|systems|preprocessing)[\w.]*)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), module


@pytest.mark.parametrize("page", [*PAGES, "benchmarks/RESULTS.md"])
def test_tests_that_a_page_names_are_there(page: str) -> None:
    for file, test in re.findall(r"\b(test_\w+\.py)(?:::(\w+))?", (ROOT / page).read_text(encoding="utf-8")):
        path = ROOT / "tests" / file
        assert path.is_file(), file
        assert not test or f"def {test}(" in path.read_text(encoding="utf-8"), f"{file}::{test}"


def test_every_module_of_systems_has_its_place_in_contributing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    modules = [path.name for path in (ROOT / "systems").glob("*.py") if path.name != "__init__.py"]
    assert [name for name in modules if f"`{name}`" not in text] == []


EXAMPLES = {
    "my_map.py",
    "my_method.py",
    "my_noise.py",
    "my_data.py",
    "my_benchmark.py",
    "my_control.py",
}  # of docs/EXTENDING.md


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) <= 1100


def test_the_page_of_keys_is_what_the_configurations_say() -> None:
    """Made anew by `python -m experiments.keys_page docs/KEYS.md`."""
    assert (ROOT / "docs" / "KEYS.md").read_text(encoding="utf-8") == keys_page.page()
