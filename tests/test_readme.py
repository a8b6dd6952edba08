"""README.md and the pages it leads to are current, and are read as their author meant them."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from cogapp import Cog
from markdown_it import MarkdownIt

ROOT = Path(__file__).parent.parent
MADE = ["README.md", *sorted(f"examples/{path.name}" for path in ROOT.glob("examples/*.md"))]
PAGES = [*MADE, ".github/CONTRIBUTING.md"]


def tokens(page):
    return MarkdownIt("commonmark").enable("table").parse((ROOT / page).read_text())


def inline(page, kind):
    return [child for token in tokens(page) for child in token.children or [] if child.type == kind]


def links(page):
    """Where the page leads to in this repository: path from its root, and anchor."""
    hrefs = [token.attrs["href"] for token in inline(page, "link_open")]
    for href in hrefs:
        if not href.startswith("https://"):
            path, _, anchor = href.partition("#")
            target = (ROOT / page).parent / path if path else ROOT / page
            yield str(target.resolve().relative_to(ROOT)), anchor


def anchors(page):
    """The names that GitHub gives the headings."""
    found = tokens(page)
    for opening, heading in pairwise(found):
        if opening.type == "heading_open":
            text = "".join(child.content for child in heading.children)
            yield re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")


@pytest.mark.parametrize("page", MADE)
def test_what_is_made_by_a_program_is_current(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert Cog().main(["cog", "--check", page]) == 0


@pytest.mark.parametrize("page", PAGES)
def test_no_markup_and_no_source_of_the_page_is_shown(page):
    for token in tokens(page):
        if token.type == "html_block":
            assert token.content.rstrip().endswith("-->")
            assert token.content.split("\n")[0] in ("<!-- [[[cog", "<!-- [[[end]]] -->")
    shown = [token.content for token in inline(page, "text")]
    assert len(shown) > 10 or page == "examples/commands.md"
    for text in shown:
        assert not any(mark in text for mark in ("<!--", "-->", "]]]", "cog.", "```", "**", "]("))
    assert not inline(page, "html_inline")


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_to_a_file_and_a_heading_that_exist(page):
    found = list(links(page))
    assert found
    for path, anchor in found:
        assert (ROOT / path).exists(), path
        assert not anchor or anchor in anchors(path), f"{path}#{anchor}"


def test_the_readme_is_short_and_leads_to_every_page():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200
    assert {*PAGES[1:]} <= {path for path, _ in links("README.md")}


def test_the_readme_names_the_two_commands_that_set_everything_up():
    blocks = [token.content for token in tokens("README.md") if token.type == "fence"]
    for command in ("make demo ", "make test "):
        assert any(f"\n{command}" in f"\n{block}" for block in blocks)
