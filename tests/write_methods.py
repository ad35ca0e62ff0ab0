"""Writes the table of parameters in docs/methods.md from the methods themselves: ``make methods``."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from mergekit.merge_methods.base import ParameterScope, ParameterSpec

from mergekit_symalign.methods import ALIGNMENT_PARAMETERS

PAGE = Path(__file__).parent.parent / "docs" / "methods.md"
BEGIN, END = "<!-- parameters: written by make methods -->\n", "<!-- end of parameters -->"
KINDS = {bool: "bool", int: "int", float: "number", str | None: "path"}


def table() -> str:
    """All parameters that the aligned methods add to those of their inner method, in Markdown."""
    rows = (f"| `{p.name}` | {_values(p)} | {_default(p)} | {_escaped(p.description)} |" for p in ALIGNMENT_PARAMETERS)
    return "\n".join(["| parameter | values | default | meaning |", "|---|---|---|---|", *rows, ""])


def page(text: str) -> str:
    """The page with the table of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + table() + END + after


def _values(p: ParameterSpec) -> str:
    kind = KINDS.get(p.value_type) or ", ".join(f"`{value}`" for value in get_args(p.value_type))
    return kind + (", per model" if p.scope is not ParameterScope.SHARED else "")


def _default(p: ParameterSpec) -> str:
    shown = str(p.default).lower() if isinstance(p.default, bool) else p.default
    return "–" if p.default is None else f"`{shown}`"


def _escaped(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
