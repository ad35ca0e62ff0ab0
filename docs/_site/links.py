"""A hook of mkdocs: links from a page to files outside docs/ (examples, CONTRIBUTING.md) have no place on the site.

They become the path as code. A path that does not exist is a warning, and warnings end a strict build.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

LOG = logging.getLogger("mkdocs.hooks.links")
ROOT = Path(__file__).parent.parent.parent
OUTSIDE = re.compile(r"(?<!!)\[([^\]]+)\]\(\.\./([^)#]+)(?:#[^)]*)?\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """The page with its links out of docs/ as text."""

    def shown(link: re.Match[str]) -> str:
        label, path = link[1].strip("`"), link[2].rstrip("/")
        if not (ROOT / path).exists():
            LOG.warning("%s links to ../%s, which does not exist", page.file.src_uri, path)
        return f"`{path}`" if label.rstrip("/") == path else f"{link[1]} (`{path}`)"

    return OUTSIDE.sub(shown, markdown)
