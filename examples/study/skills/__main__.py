"""Parts 7 and 8: ``PYTHONPATH=examples python -m study.skills language --device cuda --workers 6``.

What was measured before is kept, so a killed run goes on where it was.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from ..settings import HERE
from ..store import Store
from .compare import compare
from .comparison import Comparison, Models
from .encoders import Encoders
from .jobs import settle
from .language import LanguageModels
from .settings import Skills

SETTINGS = {"language": "skills", "encoders": "skill-encoders"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=SETTINGS)
    parser.add_argument("--settings", type=Path, help="other settings than those of the study")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="directory of the results file")
    parser.add_argument("--work", type=Path, default=Path(".cache/study"), help="directory for models and merges")
    parser.add_argument("--device", default="cpu", help="where models are trained, merged and measured")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the work")
    parser.add_argument("--text", type=Path, help="a text file, for settings with the kind `file` (part language)")
    args = parser.parse_args()
    settle()
    settings = Skills.read(SETTINGS[args.part], args.settings)
    work = args.work.resolve() / settings.name
    if args.part == "language":
        models: Models = LanguageModels(settings, work, args.device, args.text)
    else:
        models = Encoders(settings, work, args.device)
    compare(Comparison(models), Store.open(args.out / f"{settings.name}.json", settings), args.workers)


if __name__ == "__main__":
    main()
