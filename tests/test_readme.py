"""What the README shows is current, and is read as its author meant it."""

from pathlib import Path

from cogapp import Cog
from markdown_it import MarkdownIt

README = Path(__file__).parent.parent / "README.md"


def test_what_is_made_from_the_help_is_current(monkeypatch):
    monkeypatch.chdir(README.parent)
    assert Cog().main(["cog", "--check", "README.md"]) == 0


def test_no_markup_and_no_source_of_the_page_is_shown():
    shown, kinds = [], set()
    for token in MarkdownIt("commonmark").enable("table").parse(README.read_text()):
        if token.type == "inline":
            shown += [child.content for child in token.children if child.type == "text"]
        elif token.type == "html_block":
            assert token.content.rstrip().endswith("-->")
            kinds.add(token.content.split("\n")[0])
    assert len(shown) > 100
    assert kinds == {"<!-- [[[cog", "<!-- [[[end]]] -->"}
    for text in shown:
        assert not any(mark in text for mark in ("<!--", "-->", "]]]", "cog.", "```", "**"))
