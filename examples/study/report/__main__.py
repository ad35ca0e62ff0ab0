"""Write docs/evidence.md, its figures and README's paragraph: ``PYTHONPATH=examples python -m study.report``."""

from __future__ import annotations

from pathlib import Path

from ..findings import Findings
from ..settings import HERE
from .figures import draw
from .page import page, readme_paragraph, replaced

ROOT = HERE.parent.parent


def write(results: Path, root: Path) -> None:
    """Write the page of these results under ``root``."""
    findings = Findings.read(results)
    draw(findings, root / "docs" / "figures")
    (root / "docs" / "evidence.md").write_text(page(findings))
    readme = root / "README.md"
    readme.write_text(replaced(readme.read_text(), readme_paragraph(findings)))


if __name__ == "__main__":
    write(HERE / "results" / "full.json", ROOT)
