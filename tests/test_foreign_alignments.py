"""Alignment files from strangers: refused by name, before anything is written, by the commands and by merges."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import pytest
import safetensors.torch
import torch
from click.testing import CliRunner, Result
from conftest import load, merge_config, merged
from fuzz.memory import guarded
from models import logits, make_model, perturbed, relative_deviation, save, with_weights
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_symalign.alignment_file import AlignmentFile, Origin, save_alignment
from mergekit_symalign.alignments.fit import require_fits
from mergekit_symalign.alignments.numbers import ENTRY, sealed
from mergekit_symalign.cli import main
from mergekit_symalign.errors import AlignmentFileError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import HeadRotation

Content = dict[str, Any]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Solved:
    """Two models on disk and the alignment of one to the other, as JSON and tensors."""

    anchor: Path
    twin: Path
    file: Path
    content: Content
    tensors: Tensors

    def changed(self, out: Path, change: Callable[[Content, Tensors], None], *, first: bool = False) -> Path:
        """The file after a change by somebody who knows how its digest is made (of format 1, or of today's)."""
        content, tensors = copy.deepcopy(self.content), dict(self.tensors)
        change(content, tensors)
        content = _first_format(content, tensors) if first else sealed(content, tensors)
        save_file(tensors, out, metadata={ENTRY: json.dumps(content)})
        return out


def _first_format(content: Content, tensors: Tensors) -> Content:
    rest = {name: value for name, value in content.items() if name != "tensors"} | {"format": 1}
    rest["origin"] = {name: value for name, value in rest["origin"].items() if name != "settings_by_block"}
    saved = safetensors.torch.save({name: tensors[name] for name in sorted(tensors)})
    return rest | {"sha256": hashlib.sha256(saved).hexdigest()}


@pytest.fixture(scope="module")
def solved(tmp_path_factory: pytest.TempPathFactory) -> Solved:
    folder, model = tmp_path_factory.mktemp("solved"), make_model("llama", 0)
    layout = resolve(model.config, model="llama")
    planted = random_elements(layout, 3, Planted(neuron_scaling=True))
    twin = with_weights(model, transform(perturbed(model, 0.1, 1).state_dict(), layout, planted))
    anchor, other, file = save(model, folder / "anchor"), save(twin, folder / "twin"), folder / "a.safetensors"
    done = _run("solve", anchor, other, "-o", file, "--neuron-scaling", "--quiet")
    assert done.exit_code == 0, done.output
    with safe_open(file, framework="pt") as opened:
        return Solved(anchor, other, file, json.loads(opened.metadata()[ENTRY]), load_file(file))


def _run(*args: Any) -> Result:
    return CliRunner().invoke(main, [str(arg) for arg in args])


def _step(content: Content, block: str, axis: str, kind: str) -> list[Any]:
    """The references of a step."""
    references: list[Any] = next(step[1] for step in content["blocks"][block][axis] if step[0] == kind)
    return references


def _gate_of_another_layer(content: Content, tensors: Tensors) -> None:
    content["blocks"]["layer 0 mlp"]["gate"] = content["blocks"]["layer 1 mlp"]["gate"]


def _gate_missing(content: Content, tensors: Tensors) -> None:
    del content["blocks"]["layer 0 mlp"]["gate"]


def _all_blocks_missing(content: Content, tensors: Tensors) -> None:
    content["blocks"], content["facts"] = {}, {}
    tensors.clear()
    tensors["x"] = torch.zeros(1)


def _blocks_a_list(content: Content, tensors: Tensors) -> None:
    content["blocks"] = []


def _block_missing(content: Content, tensors: Tensors) -> None:
    axes = content["blocks"].pop("layer 2 attention")
    del content["facts"]["layer 2 attention"]
    for name in {reference[0] for steps in axes.values() for _, references in steps for reference in references}:
        del tensors[name]


def _edit(block: str, axis: str, kind: str, which: int, value: float) -> Callable[[Content, Tensors], None]:
    def change(content: Content, tensors: Tensors) -> None:
        name = _step(content, block, axis, kind)[which][0]
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[0] = value

    return change


def _query_alone(content: Content, tensors: Tensors) -> None:
    """Another angle for the queries, which the keys do not have."""
    references = _step(content, "layer 0 attention", "query", "plane_rotation")
    tensors["new"] = tensors[references[0][0]] + 0.5
    references[0][0] = "new"


def _facts(**facts: Any) -> Callable[[Content, Tensors], None]:
    return lambda content, tensors: content["facts"]["layer 0 mlp"].update(facts)


def _repeats(content: Content, tensors: Tensors) -> None:
    _step(content, "layer 0 attention", "attended", "head_rotation")[0][1] = 10**9


def _some_repeats(content: Content, tensors: Tensors) -> None:
    _step(content, "layer 0 attention", "attended", "head_rotation")[0][1] = 1000


def _nested(content: Content, tensors: Tensors) -> None:
    deep: list[Any] = []
    for _ in range(900):
        deep = [deep]
    content["origin"]["settings"]["x"] = deep


_MLP, _HEADS = "layer 0 mlp", "layer 0 attention"
CASES: dict[str, tuple[Callable[[Content, Tensors], None], str]] = {
    "gate of another layer": (_gate_of_another_layer, r"layer 0 mlp, axis gate: .*order of the up rows"),
    "gate missing": (_gate_missing, r"layer 0 mlp, axis gate: .*order of the up rows"),
    "no blocks": (_all_blocks_missing, "metadata are damaged"),
    "blocks is a list": (_blocks_a_list, "metadata are damaged: blocks"),
    "a block missing": (_block_missing, "nothing for layer 2 attention"),
    "no permutation": (_edit(_MLP, "gate", "permutation", 0, 3), "its index is not a permutation"),
    "beyond the neurons": (_edit(_MLP, "gate", "permutation", 0, 80), "its index is not a permutation"),
    "nan": (_edit(_MLP, "up", "scaling", 0, torch.nan), "axis up: .*not finite"),
    "zero": (_edit(_MLP, "up", "scaling", 0, 0.0), "axis up: .*factor of 0"),
    "another scale": (_edit(_MLP, "up", "scaling", 0, 3.0), "axis down: .*not the inverse of up"),
    "no rotation": (_edit(_HEADS, "value", "head_rotation", 0, 2.0), "not orthogonal"),
    "a turn of queries only": (_query_alone, "axis key: .*inverse transpose of query"),
    "a huge repetition": (_repeats, "metadata are damaged"),
    "a large repetition": (_some_repeats, "layer 0 attention, axis attended: .*shapes"),
    "deep nesting": (_nested, "nested more than 16 deep"),
    "facts that are no numbers": (_facts(neurons="many"), "metadata are damaged: facts"),
    "facts below zero": (_facts(distance_before=-1.0), "metadata are damaged: facts"),
    "facts without their companions": (_facts(experts=4), "experts and experts_moved do not belong together"),
    "facts beyond all sums": (_facts(distance_after=1e300), "metadata are damaged: facts"),
    "facts that rename the block": (_facts(layer=5), "metadata are damaged: facts"),
}


@pytest.mark.parametrize("first", [False, True], ids=["today", "format 1"])
@pytest.mark.parametrize("case", CASES)
def test_what_is_no_symmetry_is_refused(case: str, first: bool, solved: Solved, tmp_path: Path) -> None:
    change, message = CASES[case]
    (tmp_path / "in").mkdir()
    file = solved.changed(tmp_path / "in" / "changed.safetensors", change, first=first)
    with guarded() as peak:
        done = _run("apply", file, solved.twin, "-o", tmp_path / "out")
    assert done.exit_code == 1, done.output
    assert isinstance(done.exception, SystemExit)
    assert "changed.safetensors" in done.output
    with pytest.raises(AlignmentFileError, match=message):
        require_fits(AlignmentFile.open(file), resolve(make_model("llama", 0).config, model="m"))
    assert [p.name for p in tmp_path.iterdir()] == ["in"]
    assert peak.bytes is None or peak.bytes < 64 << 20


@pytest.mark.parametrize("case", ["gate of another layer", "a block missing", "nan", "facts that are no numbers"])
def test_merges_refuse_it_too(case: str, solved: Solved, tmp_path: Path) -> None:
    change, message = CASES[case]
    file = solved.changed(tmp_path / "changed.safetensors", change)
    models = [{"model": solved.twin, "parameters": {"alignment": str(file)}}]
    with pytest.raises((AlignmentFileError, click.ClickException), match=message):
        merged(merge_config("rotation_match", solved.anchor, models), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("field", ["origin", "blocks", "facts"])
def test_the_digest_covers_the_text(field: str, solved: Solved, tmp_path: Path) -> None:
    """What is sound by itself, and not what was saved."""
    content = copy.deepcopy(solved.content)
    if field == "origin":
        content["origin"]["settings"]["scaling"] = False
    elif field == "blocks":
        content["blocks"]["layer 0 mlp"], content["blocks"]["layer 1 mlp"] = (
            content["blocks"][f"layer {i} mlp"] for i in (1, 0)
        )
    else:
        content["facts"]["layer 0 mlp"]["neurons_moved"] = 0
    save_file(solved.tensors, tmp_path / "a", metadata={ENTRY: json.dumps(content)})
    with pytest.raises(AlignmentFileError, match="differ from what was saved"):
        AlignmentFile.described(tmp_path / "a")


def test_files_of_the_first_format_still_work(solved: Solved, tmp_path: Path) -> None:
    file = solved.changed(tmp_path / "first.safetensors", lambda content, tensors: None, first=True)
    for name, source in (("today", solved.file), ("first", file)):
        done = _run("apply", source, solved.twin, "-o", tmp_path / name, "--quiet")
        assert done.exit_code == 0, done.output
    today, first = (load(tmp_path / name) for name in ("today", "first"))
    assert all(torch.equal(x, first[name]) for name, x in today.items())


def test_exit_codes_tell_a_damaged_file_from_a_wrong_one(solved: Solved, tmp_path: Path) -> None:
    (tmp_path / "damaged").write_bytes(solved.file.read_bytes()[:-8])
    other = save(perturbed(make_model("llama", 0), 0.01, 9), tmp_path / "other")
    wrong = {(tmp_path / "absent", solved.twin): 2, (solved.file, other): 2, (tmp_path / "damaged", solved.twin): 1}
    for (file, model), code in wrong.items():
        done = _run("apply", file, model, "-o", tmp_path / "out")
        assert done.exit_code == code, done.output
        assert file.name in done.output


def test_a_block_of_no_layer_is_refused(solved: Solved, tmp_path: Path) -> None:
    def more(content: Content, tensors: Tensors) -> None:
        content["blocks"]["layer 7 mlp"] = content["blocks"]["layer 0 mlp"]

    file = AlignmentFile.open(solved.changed(tmp_path / "a", more))
    with pytest.raises(AlignmentFileError, match="block layer 7 mlp: the model has no such block in its 3 layers"):
        require_fits(file, resolve(make_model("llama", 0).config, model="m"))


def test_messages_carry_nothing_of_the_file_to_the_terminal(solved: Solved, tmp_path: Path) -> None:
    def named(content: Content, tensors: Tensors) -> None:
        content["blocks"]["\x1b[2Jx" * 1000] = {}

    with pytest.raises(AlignmentFileError) as refused:
        AlignmentFile.open(solved.changed(tmp_path / "a", named))
    assert "\x1b" not in str(refused.value)
    assert len(str(refused.value)) < 1000


def test_rotation_full_works_and_is_not_called_exact(
    solved: Solved, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "full.safetensors"
    done = _run("solve", solved.anchor, solved.twin, "-o", file, "--rotation", "full", "--quiet")
    assert done.exit_code == 0, done.output
    done = _run("apply", file, solved.twin, "-o", tmp_path / "applied", "--quiet")
    assert done.exit_code == 0, done.output
    assert "it was solved with rotation: full, which changes what the model computes" in done.output
    models = [{"model": solved.twin, "parameters": {"alignment": str(file)}}]
    config = merge_config("rotation_match", solved.anchor, models)
    with caplog.at_level(logging.WARNING):
        merged(config | {"parameters": {"save_alignment": str(tmp_path / "again")}}, tmp_path / "out")
    assert any("rotation: full" in record.message for record in caplog.records)
    assert json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))["exact"] is False
    again = AlignmentFile.open(tmp_path / "again" / "twin.safetensors")
    assert again.origin.settings["rotation"] == "full"
    assert require_fits(again, resolve(make_model("llama", 0).config, model="m")) is False

    def claimed(content: Content, tensors: Tensors) -> None:
        content["origin"]["settings"]["rotation"] = "exact"

    content, tensors = _read(file)
    lying = Solved(solved.anchor, solved.twin, file, content, tensors).changed(tmp_path / "lying", claimed)
    with pytest.raises(AlignmentFileError, match="cannot have a head_rotation"):
        require_fits(AlignmentFile.open(lying), resolve(make_model("llama", 0).config, model="m"))


def _read(file: Path) -> tuple[Content, Tensors]:
    with safe_open(file, framework="pt") as opened:
        return json.loads(opened.metadata()[ENTRY]), load_file(file)


def test_axes_that_stay_may_be_left_out(tmp_path: Path) -> None:
    """An alignment that moves nothing in some blocks and some axes, as solvers save it."""
    model = make_model("llama", 0)
    layout = resolve(model.config, model="llama")
    elements = random_elements(layout, 3, Planted(heads=False, permutation=False))
    named = {f"layer {layer} {kind.value}": element for (layer, kind), element in elements.items()}
    named["layer 1 mlp"] = BlockElement({})
    value = {axis: named["layer 0 attention"].actions[axis] for axis in ("value", "attended")}
    named["layer 0 attention"] = BlockElement(value)
    save_alignment(tmp_path / "a", Origin("a", "b", "", "", "llama", {}), named)
    file = AlignmentFile.open(tmp_path / "a")
    assert require_fits(file, layout)
    read = {at: file.element(f"layer {at[0]} {at[1].value}") for at in elements}
    moved = with_weights(model, transform(model.state_dict(), layout, read))
    assert relative_deviation(logits(model), logits(moved)) < 1e-9
    named["layer 0 attention"] = BlockElement({"value": value["value"]})
    save_alignment(tmp_path / "half", Origin("a", "b", "", "", "llama", {}), named)
    with pytest.raises(AlignmentFileError, match="axis attended: it is not the inverse transpose of value"):
        require_fits(AlignmentFile.open(tmp_path / "half"), layout)
    assert isinstance(value["value"], HeadRotation)


def _scaled_neurons(factor: float) -> Callable[[Content, Tensors], None]:
    """All neurons scaled by one factor, consistently."""

    def change(content: Content, tensors: Tensors) -> None:
        up, down = (_step(content, _MLP, axis, "scaling")[0][0] for axis in ("up", "down"))
        tensors[up] = torch.full_like(tensors[up], factor)
        tensors[down] = torch.full_like(tensors[down], 1 / factor)

    return change


@pytest.mark.parametrize("factor", [1e-17, 1e17, -1e17])
def test_large_factors_are_exact_as_stored(factor: float, solved: Solved, tmp_path: Path) -> None:
    file = solved.changed(tmp_path / "a", _scaled_neurons(factor))
    done = _run("apply", file, solved.twin, "-o", tmp_path / "out", "--quiet")
    assert done.exit_code == 0, done.output
    done = _run("verify", solved.twin, tmp_path / "out", "--random", "--quiet")
    assert done.exit_code == 0, done.output


@pytest.mark.parametrize("factor", [1e-30, 1e30])
def test_factors_that_no_weight_survives_are_refused(factor: float, solved: Solved, tmp_path: Path) -> None:
    file = solved.changed(tmp_path / "a", _scaled_neurons(factor))
    done = _run("apply", file, solved.twin, "-o", tmp_path / "out", "--quiet")
    assert done.exit_code == 1
    assert "a factor above" in done.output


def test_float16_leaves_less_room(solved: Solved, tmp_path: Path) -> None:
    file = solved.changed(tmp_path / "a", _scaled_neurons(1e6))
    done = _run("apply", file, solved.twin, "-o", tmp_path / "out", "--quiet", "--dtype", "float16")
    assert done.exit_code == 1
    assert "a factor above 2.6e+02" in done.output
    done = _run("apply", file, solved.twin, "-o", tmp_path / "out", "--quiet", "--dtype", "bfloat16")
    assert done.exit_code == 0, done.output
