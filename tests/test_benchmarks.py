"""The benchmark runs from end to end on tiny models; how fast is not checked here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def test_small_benchmark_runs(tmp_path: Path) -> None:
    script = Path(__file__).parent / "benchmarks" / "run.py"
    command = [sys.executable, script, "--small", "--cache", tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for expected in ("siblings, 10 % noise", "prefix_1 100.0%", "heads identity", "full 100.0%", "2 layers", "| yes |"):
        assert expected in done.stdout, done.stdout
    assert list((tmp_path / "cache").glob("*/model.safetensors"))
