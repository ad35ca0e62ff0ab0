"""Writes the tables of parameters in docs/ from the methods themselves: ``make methods``."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

from mergekit import merge_methods
from mergekit.merge_methods.base import ParameterScope, ParameterSpec

from mergekit_symalign.methods import ALIGNMENT_PARAMETERS

DOCS = Path(__file__).parent.parent / "docs"
PAGE = DOCS / "methods.md"
DATA_PAGE = DOCS / "data-methods.md"
DATA_METHODS = ("regmean_task_arithmetic", "regmean", "fisher")
BEGIN, END = "<!-- parameters: written by make methods -->\n", "<!-- end of parameters -->"
KINDS = {bool: "bool", int: "int", float: "number", str: "path", str | None: "path"}


def table() -> str:
    """All parameters that the aligned methods add to those of their inner method, in Markdown."""
    rows = (f"| `{p.name}` | {_values(p)} | {_default(p)} | {_escaped(p.description)} |" for p in ALIGNMENT_PARAMETERS)
    return "\n".join(["| parameter | values | default | meaning |", "|---|---|---|---|", *rows, ""])


def data_table() -> str:
    """All parameters of the methods that use data, in Markdown."""
    rows = (
        f"| `{name}` | `{p.name}` | {_values(p)} | {_default(p)} | {_escaped(p.description)} |"
        for name in DATA_METHODS
        for p in merge_methods.get(name).spec.parameters
    )
    return "\n".join(["| method | parameter | values | default | meaning |", "|---|---|---|---|---|", *rows, ""])


def page(text: str, written: str) -> str:
    """The page with the table of today."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return before + BEGIN + written + END + after


def _values(p: ParameterSpec) -> str:
    kind = KINDS.get(p.value_type) or ", ".join(f"`{value}`" for value in get_args(p.value_type))
    return kind + (", per model" if p.scope is not ParameterScope.SHARED else "")


def _default(p: ParameterSpec) -> str:
    shown = str(p.default).lower() if isinstance(p.default, bool) else p.default
    return "–" if p.default is None else f"`{shown}`"


def _escaped(text: str | None) -> str:
    return (text or "").replace("|", "\\|").replace("<", "&lt;")


if __name__ == "__main__":
    for path, written in ((PAGE, table()), (DATA_PAGE, data_table())):
        path.write_text(page(path.read_text("utf-8"), written), "utf-8")
