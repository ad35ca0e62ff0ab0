"""The benchmark runs from end to end on tiny models; how fast is not checked here."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import tables
from measure import Cost


@pytest.mark.skipif(sys.platform != "linux", reason="the benchmark reads memory from /proc")
def test_small_benchmark_runs(tmp_path: Path) -> None:
    """A plain and an aligned merge in fresh processes, and the file of results, which a second run adds to."""
    from run import main

    out = tmp_path / "results.json"
    known = {"whole": [{"name": "another"}, {"name": "siblings, 10 % noise", "plain": []}], "layers": [{"name": "x"}]}
    out.write_text(json.dumps(known), "utf-8")
    options = ["--small", "--no-depths", "--no-growth", "--no-layer", "--only", "siblings, 10"]
    paths = ["--cache", str(tmp_path / "cache"), "--out", str(out)]
    shown = CliRunner().invoke(main, [*options, *paths], catch_exceptions=False).output
    for expected in ("| siblings, 10 % noise |", "prefix 1 100.0%", "heads identity"):
        assert expected in shown, shown
    assert list((tmp_path / "cache").glob("*/model.safetensors"))
    found = json.loads(out.read_text("utf-8"))
    assert [x["name"] for x in found["whole"]] == ["another", "siblings, 10 % noise"]
    (line,) = found["whole"][1:]
    assert line["ratio"]["wall"] == pytest.approx(line["aligned"][0]["wall"] / line["plain"][0]["wall"], rel=0.01)
    assert found["layers"] == [{"name": "x"}]
    assert found["machine"]["torch"] == torch.__version__


def test_large_models_are_written_in_files_and_need_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import large
    from checkpoints import SMALL

    shape = SMALL.with_layers(2)
    large._write(tmp_path / "model", shape, 0.1, 10**6)
    index = json.loads((tmp_path / "model" / "model.safetensors.index.json").read_text("utf-8"))
    files = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 2
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    stored = {name: x for file in files for name, x in load_file(file).items()}
    assert {name: x.shape for name, x in stored.items()} == large._sizes(shape)
    assert sum(2 * x.numel() for x in stored.values()) == index["metadata"]["total_size"]
    large._write(tmp_path / "base", shape, 0.0, 10**6)
    name = "model.layers.1.mlp.up_proj.weight"
    base = load_file(tmp_path / "base" / index["weight_map"][name])[name].float()
    assert float((stored[name].float() - base).norm() / base.norm()) == pytest.approx(0.1, rel=0.05)
    monkeypatch.setattr("large.shutil.disk_usage", lambda _: SimpleNamespace(free=10**9))
    done = CliRunner().invoke(large.main, ["--cache", str(tmp_path)])
    assert done.exit_code == 1
    assert "has 1 GB free, and this needs 50" in done.output


def test_tables_of_the_page(tmp_path: Path) -> None:
    """Each processor's tables, from its file; the page in the repository is the one that is written today."""
    import write_page

    page = write_page.PAGE.read_text("utf-8")
    assert write_page.page(page, write_page.section(write_page.RESULTS)) == page
    assert "Not yet measured" in write_page.section(tmp_path)
    cost = {"wall": 10.0, "cpu": 20.0, "peak_rss": 2.0**30, "peak_own": 1.0}
    ratio = {"wall": 1.0, "cpu": 1.0, "peak_rss": 1.0, "peak_own": 1.0}
    line = {"name": "siblings", "plain": [cost], "aligned": [cost], "ratio": ratio, "settled_by": {"heads_identity": 3}}
    machine = {"processor": "A", "units": ["avx2"], "threads": 2, "memory_gib": 8, "torch": "2.13", "numba": "0.68"}
    (tmp_path / "a.json").write_text(json.dumps({"machine": machine, "whole": [line]}), "utf-8")
    written = write_page.section(tmp_path)
    assert "| siblings | 10.0 → 10.0 | 1.00 | 20.0 → 20.0 | 1.00 | 1.00 → 1.00 | 1.00 | heads identity 3 |" in written
    assert "2 threads, 8 GiB, torch 2.13, numba 0.68" in written


def test_depths_and_growth_are_differences_of_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    import run
    from workloads import depths, growth, shapes

    plain, aligned = (
        Cost(wall, cpu, 3 * run.MIB, own * run.MIB, Counter()) for wall, cpu, own in ((4, 6, 1), (5, 9, 2))
    )
    monkeypatch.setattr(run, "_measured", lambda workload, *_: run.Line(workload, [plain], [aligned]))
    shape, layers = shapes(True)
    depth, more = run._depth(depths(shape, layers)[0], Path(), 1), run._growth(growth(shape)[0], Path(), 1)
    assert tables.cells("depth", depth) == "| 2 layers | 1 | 2 | 1 | 3 | 3 |"
    assert tables.cells("growth", more) == "| 3 layers | 4.0 | 1.0 | 3.0 | 0.50 |"


def test_one_layer_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import_module("layer").main(True)
    assert "| yes |" in capsys.readouterr().out
    out = tmp_path / "results.json"
    done = CliRunner().invoke(import_module("shapes").main, ["--small", "--out", str(out)], catch_exceptions=False)
    found = json.loads(out.read_text("utf-8"))["layers"]
    assert [x["model"] for x in found] == ["sibling, 10 % noise", "the same, permuted, rotated, rescaled", "unrelated"]
    assert all(tables.cells("layers", x) in done.output for x in found)


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
