"""The demo's table in README is what ``make demo`` measured (examples/demo/results.json)."""

from __future__ import annotations

import json
from pathlib import Path

from mergekit_symalign.demo.run import Row, render

ROOT = Path(__file__).parent.parent


def test_the_demos_table_is_the_one_in_readme() -> None:
    results = json.loads((ROOT / "examples" / "demo" / "results.json").read_text("utf-8"))
    table = render([Row(**row) for row in results["rows"]], results["logit_deviation_twin"])
    assert table.strip() in (ROOT / "README.md").read_text("utf-8")
