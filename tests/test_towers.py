"""Models of several stacks of layers: their towers are solved, saved, applied, inspected and merged as blocks too."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import load, merge_config, merged
from more_models import MORE, family_for, more_model
from test_more_families import Twins, _picture

from mergekit_symalign.alignment_file import AlignmentFile
from mergekit_symalign.alignments.fit import require_fits
from mergekit_symalign.cli import main
from mergekit_symalign.errors import AlignmentFileError, GeometryError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.towers import TowerLayer
from mergekit_symalign.graph.merge_report import REPORT
from mergekit_symalign.trial.models import outputs, relative_deviation, small_model, with_weights

NAME = "llava"
BLOCKS = {f"vision layer {i} {kind}" for i in range(2) for kind in ("attention", "mlp")}


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins(NAME, tmp_path_factory.mktemp("twins"))


@pytest.fixture(scope="module")
def solved(twins: Twins, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("solved") / "twin.safetensors"
    _run("solve", *map(str, twins.paths), "-o", str(path))
    return path


def _run(*args: str) -> str:
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    return result.output


def _seen(twins: Twins, out: Path) -> float:
    """How far a merge of the twin is from the sibling it was made from, on a prompt with a picture."""
    see = partial(outputs, **_picture(NAME))
    found = type(twins.anchor).from_pretrained(out).double().eval()
    return relative_deviation(see(twins.sibling), see(with_weights(twins.anchor, found.state_dict())))


def test_a_file_has_the_blocks_of_towers(twins: Twins, solved: Path) -> None:
    file, layout = AlignmentFile.open(solved), resolve(twins.anchor.config, model=NAME)
    assert set(file.blocks) > BLOCKS
    assert {name for name in file.origin.sizes if "." in name} >= {"vision.layers", "vision.neurons"}
    assert require_fits(file, layout)
    without = {name: of for name, of in file.blocks.items() if name not in BLOCKS}
    with pytest.raises(AlignmentFileError, match="nothing for vision layer 0 attention"):
        require_fits(AlignmentFile(file.path, file.origin, without, file.sha256), layout)


def test_apply_moves_towers_and_back(twins: Twins, solved: Path, tmp_path: Path) -> None:
    _run("apply", str(solved), str(twins.paths[1]), "-o", str(tmp_path / "aligned"))
    assert _seen(twins, tmp_path / "aligned") < 1e-4
    twins.require_recovered(tmp_path / "aligned")
    _run("apply", str(solved), str(tmp_path / "aligned"), "-o", str(tmp_path / "back"), "--invert")
    back, twin = load(tmp_path / "back"), load(twins.paths[1])
    assert all((back[name] - x).abs().max() < 1e-4 for name, x in twin.items())


@pytest.mark.parametrize("residual", ["none", "permutation"])
def test_a_merge_aligns_towers_whatever_the_stream_does(twins: Twins, tmp_path: Path, residual: str) -> None:
    config = merge_config("rotation_match", twins.paths[0], [twins.paths[1]], parameters={"residual": residual})
    merged(config, tmp_path / "out")
    twins.require_recovered(tmp_path / "out")
    assert _seen(twins, tmp_path / "out") < 1e-4
    report = json.loads((tmp_path / "out" / REPORT).read_text("utf-8"))
    blocks = report["models"][str(twins.paths[1])]["blocks"]
    assert [(b["tower"], b["layer"]) for b in blocks if "tower" in b] == [("vision", i // 2) for i in range(4)]


def test_a_merge_reads_towers_from_a_file(twins: Twins, solved: Path, tmp_path: Path) -> None:
    source = {"model": twins.paths[1], "parameters": {"alignment": str(solved)}}
    merged(merge_config("rotation_match", twins.paths[0], [source]), tmp_path / "out")
    twins.require_recovered(tmp_path / "out")


def test_inspect_tells_towers_apart(twins: Twins) -> None:
    lines = _run("inspect", *map(str, twins.paths)).splitlines()
    vision = lines.index("vision:")
    assert [line.split()[:2] for line in lines[vision + 1 : vision + 3]] == [["0", "attention"], ["0", "mlp"]]


def test_layers_of_towers_are_in_order() -> None:
    layout = resolve(more_model(NAME).config, model=NAME)
    assert [layer for layer, _ in layout.blocks()][-2:] == [TowerLayer("vision", 1)] * 2


def test_towers_of_other_sizes_are_refused(twins: Twins, tmp_path: Path) -> None:
    class_name, settings = MORE[NAME]
    wider = settings | {"vision_config": {"intermediate_size": 56}}
    small_model(class_name, family_for(class_name), wider).float().save_pretrained(tmp_path / "wider")
    with pytest.raises(GeometryError, match=r"vision of model .*: its sizes differ.*neurons 56 != 40"):
        merged(merge_config("rotation_match", twins.paths[0], [tmp_path / "wider"]), tmp_path / "out")
