"""Write docs/evidence.md, its figures and README's paragraph: ``PYTHONPATH=examples python -m study.report``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..settings import HERE
from .figures import draw
from .page import Study, page, readme_paragraph, replaced


def write(study: Study, root: Path) -> None:
    """Write the page and its figures under ``root``, and README's paragraph if there is a README."""
    draw(study.main, root / "docs" / "figures")
    (root / "docs" / "evidence.md").write_text(page(study), "utf-8")
    readme = root / "README.md"
    if readme.exists():
        readme.write_text(replaced(readme.read_text("utf-8"), readme_paragraph(study)), "utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--settings", default="full", help="name of the results of parts 1 to 3")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="directory of the results files")
    parser.add_argument("--root", type=Path, default=HERE.parent.parent, help="where docs/ and README.md are")
    args = parser.parse_args()
    write(Study.read(args.results, args.settings), args.root)


if __name__ == "__main__":
    main()
