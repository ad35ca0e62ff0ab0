"""The benchmark runs from end to end on tiny models; how fast is not checked here."""

from __future__ import annotations

import sys
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

from measure import Cost


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads memory from /proc")
def test_small_benchmark_runs(tmp_path: Path) -> None:
    """Plain and aligned merges of siblings and of unrelated models, in fresh processes."""
    from run import main

    options = ["--small", "--no-depths", "--no-growth", "--no-layer", "--cache", str(tmp_path / "cache")]
    shown = CliRunner().invoke(main, options, catch_exceptions=False).output
    for expected in ("siblings, 10 % noise", "prefix_1 100.0%", "heads identity", "full 100.0%"):
        assert expected in shown, shown
    assert list((tmp_path / "cache").glob("*/model.safetensors"))


def test_depths_and_growth_are_differences_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import run
    from workloads import depths, growth, shapes

    plain, aligned = (
        Cost(wall, cpu, 3 * run.MIB, own * run.MIB, Counter()) for wall, cpu, own in ((4, 6, 1), (5, 9, 2))
    )
    monkeypatch.setattr(run, "_measured", lambda workload, *_: run.Line(workload, [plain], [aligned]))
    shape, layers = shapes(True)
    assert run._depth(depths(shape, layers)[0], Path(), 1) == ["2 layers", "1", "2", "1", "3", "3"]
    assert run._growth(growth(shape)[0], Path(), 1) == ["3 layers", "4.0", "1.0", "3.0", "0.50"]


@pytest.mark.parametrize(("name", "expected"), [("layer", "| yes |"), ("shapes", "| small |")])
def test_one_layer_alone(name: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    import_module(name).main(True)
    assert expected in capsys.readouterr().out


def test_growth_varies_one_thing_at_a_time(tmp_path: Path) -> None:
    """Three sizes of each; every config is one that MergeKit reads."""
    from checkpoints import SMALL
    from mergekit.config import MergeConfiguration
    from workloads import growth

    found = growth(SMALL)
    assert len(found) == 12
    few = replace(SMALL, layers=3)
    assert [w.shape for w in found[:3]] == [few.with_layers(n) for n in (3, 6, 12)]
    assert [w.shape.hidden for w in found[3:6]] == [128, 256, 512]
    assert [len(w.models) for w in found[6:9]] == [1, 2, 3]
    assert [w.options for w in found[9:]] == [("-j", "1"), ("-j", "2"), ("-j", "4")]
    for config in found[8].configs(tmp_path):
        assert len(MergeConfiguration.model_validate(config).models) == 3


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
