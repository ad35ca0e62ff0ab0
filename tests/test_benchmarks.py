"""The benchmark runs from end to end on tiny models; how fast is not checked here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))


def test_small_benchmark_runs(tmp_path: Path) -> None:
    script = Path(__file__).parent / "benchmarks" / "run.py"
    command = [sys.executable, script, "--small", "--cache", tmp_path / "cache"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    for expected in (
        "siblings, 10 % noise",
        "prefix_1 100.0%",
        "heads identity",
        "full 100.0%",
        "2 layers",
        "hidden 512",
        "-j 4",
        "| yes |",
        "| small |",
    ):
        assert expected in done.stdout, done.stdout
    assert list((tmp_path / "cache").glob("*/model.safetensors"))


def test_recipes_are_what_their_names_say() -> None:
    """Noise of the size that is named, independent of the base and of other noise; other models unrelated."""
    from checkpoints import BASE, Recipe, weights

    size = torch.Size((300, 200))
    base, target, skill, other = (weights(r, "x", size) for r in (BASE, Recipe(1, 0.1), Recipe(2, 0.1), Recipe(11)))

    def correlation(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a * b).sum() / (a.norm() * b.norm()))

    for noise in (target - base, skill - base):
        assert float(noise.norm() / base.norm()) == pytest.approx(0.1, rel=0.05)
        assert abs(correlation(noise, base)) < 0.02
    assert abs(correlation(target - base, skill - base)) < 0.02
    assert abs(correlation(other, base)) < 0.02
