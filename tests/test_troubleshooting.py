"""Every message that docs/troubleshooting.md quotes is in the code, and links between sections lead somewhere."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def _texts() -> list[str]:
    """Every string in the package's sources, as Python joins them; an f-string in the pieces between its fields."""
    trees = [ast.parse(path.read_text("utf-8")) for path in (ROOT / "mergekit_symalign").rglob("*.py")]
    nodes = (node for tree in trees for node in ast.walk(tree))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def _quoted() -> list[str]:
    """The messages in the first column of the tables."""
    return re.findall(r"^\| `([^`]+)`", (DOCS / "troubleshooting.md").read_text("utf-8"), flags=re.M)


def test_every_quoted_message_is_in_the_code() -> None:
    texts = _texts()
    assert len(_quoted()) >= 40
    for message in _quoted():
        for part in filter(None, map(str.strip, message.split("…"))):
            assert any(part in text for text in texts), f"{message!r}: no message has {part!r}"


def test_links_to_the_glossary_and_to_sections_lead_to_headings() -> None:
    pages = {page.name: page.read_text("utf-8") for page in DOCS.glob("*.md")}
    headings = {name: set(map(_anchor, re.findall(r"^#+ (.+)$", text, flags=re.M))) for name, text in pages.items()}
    found = {name: re.findall(r"\]\(([\w-]+\.md)?#([\w-]+)\)", text) for name, text in pages.items()}
    links = [(name, *link) for name, of_page in found.items() for link in of_page]
    assert len({anchor for _, target, anchor in links if target == "glossary.md"}) >= 10
    for name, target, anchor in links:
        assert anchor in headings[target or name], f"{name} links to {target}#{anchor}"


def _anchor(heading: str) -> str:
    """The anchor that GitHub and mkdocs give to a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
