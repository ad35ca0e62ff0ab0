"""Commands on models whose residual stream is moved: apply, verify, inspect, barrier, cards and reports."""

from __future__ import annotations

import json
import re
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import load, merge_config, merged, squared_distance
from models import logits, relative_deviation, save, with_weights, word_tokenizer
from safetensors.torch import save_file
from streams import case, joined, split, stored
from test_residual_merge import Twins

from mergekit_symalign.alignment_file import AlignmentFile, save_alignment
from mergekit_symalign.cli import main
from mergekit_symalign.planting import random_stream
from mergekit_symalign.symmetry.residual.move import move_scope

State = dict[str, torch.Tensor]
KINDS = [("llama", "rotation"), ("llama-tied", "permutation"), ("phi2", "rotation")]
KINDS += [("gpt2", "permutation"), ("bert-classifier", "permutation"), ("vit-classifier", "rotation")]


def command(*args: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in args])


def run(*args: object) -> Result:
    done = command(*args)
    assert done.exit_code == 0, done.output
    return done


class Solved(Twins):
    """Twins with an alignment file of the whole model."""

    def __init__(self, family: str, wanted: str, folder: Path, **options: Any) -> None:
        super().__init__(family, wanted, folder, layers=2)
        self.wanted = wanted
        self.anchor_path, self.twin_path = folder / "anchor", folder / "twin"
        self.file = folder / "a.safetensors"
        given = {"residual": wanted, "residual-rounds": 2} | options
        named = [x for name, value in given.items() for x in (f"--{name}", value)]
        run("solve", self.anchor_path, self.twin_path, "-o", self.file, "--quiet", *named)

    @property
    def with_anchor(self) -> list[object]:
        return ["--anchor", self.anchor_path] if self.kind.rotates else []

    @cached_property
    def applied(self) -> Path:
        """The twin in the anchor's coordinates."""
        out = self.folder / "applied"
        run("apply", self.file, self.twin_path, "-o", out, "--quiet", *self.with_anchor)
        return out


@pytest.fixture(scope="module", params=KINDS, ids=lambda c: "-".join(c))
def solved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Solved:
    return Solved(*request.param, tmp_path_factory.mktemp("-".join(request.param)))


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Solved:
    return Solved("llama", "rotation", tmp_path_factory.mktemp("rotated"))


def test_apply_writes_what_a_merge_of_the_model_alone_writes(solved: Solved, tmp_path: Path) -> None:
    out = solved.applied
    models = [{"model": solved.twin_path, "parameters": {"alignment": str(solved.file)}}]
    merged(merge_config("rotation_match", solved.anchor_path, models), tmp_path / "merge")
    assert load(out).keys() == load(solved.twin_path).keys()  # old names stay
    applied, merge, twin = (solved.at(path).state_dict() for path in (out, tmp_path / "merge", solved.twin_path))
    assert all(torch.equal(x, merge[name]) for name, x in applied.items())
    assert any(not torch.equal(x, twin[name]) for name, x in applied.items())
    assert relative_deviation(logits(solved.twin), logits(solved.at(out))) < 1e-3
    assert (out / "config.json").read_text("utf-8") == (solved.twin_path / "config.json").read_text("utf-8")


def test_verify_tells_what_apply_kept_from_what_somebody_broke(solved: Solved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(solved.applied, out)
    compare = ("verify", solved.twin_path, out, "--random", "--tokens", "64", "--quiet")
    run(*compare)
    state = load(out)
    (name, *_) = (x for x in state if "0." in x and x.endswith(("q_proj.weight", "query.weight", "c_attn.weight")))
    save_file(state | {name: state[name].flip(0, 1).contiguous()}, out / "model.safetensors", {"format": "pt"})
    done = command(*compare)
    assert done.exit_code == 1, done.output
    assert "NOT the same function" in done.output


def test_invert_undoes_it(solved: Solved, tmp_path: Path) -> None:
    back = tmp_path / "back"
    norms = ["--norms-of", solved.twin_path] if solved.kind.rotates else []
    run("apply", solved.file, solved.applied, "-o", back, "--quiet", "--invert", *norms)
    original = load(solved.twin_path)
    for name, x in load(back).items():
        torch.testing.assert_close(x, original[name], rtol=0, atol=1e-4 * float(original[name].abs().max()), msg=name)


REFUSED: dict[str, tuple[list[str], str]] = {
    "no anchor": ([], "rotates the residual stream, and the result gets the norms of the anchor.*--anchor ANCHOR"),
    "another anchor": (["--anchor", "{sibling}"], "it was solved for anchor .*, but .*sibling has other weights"),
    "no such anchor": (["--anchor", "/nowhere/at/all"], "nowhere"),
    "an anchor of another size": (["--anchor", "{small}"], "another size than model .*small: layers 2 != 1"),
    "an anchor of another family": (["--anchor", "{qwen}"], "family"),
    "norms for the way there": (["--anchor", "{anchor}", "--norms-of", "{twin}"], "--norms-of belongs to --invert"),
    "no norms for the way back": (["--invert", "--anchor", "{anchor}"], "norms that .*twin has.*--norms-of MODEL"),
    "other norms for the way back": (["--invert", "--norms-of", "{sibling}"], "for model .*twin, but .*sibling"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_apply_refuses_by_name_before_it_writes(rotated: Solved, tmp_path: Path, name: str) -> None:
    args, message = REFUSED[name]
    places = {x: rotated.folder / x for x in ("anchor", "twin", "sibling")}
    places |= {"small": tmp_path / "small", "qwen": tmp_path / "qwen"}
    if any("{small}" in x for x in args):
        save(case("llama", num_hidden_layers=1), places["small"])
    if any("{qwen}" in x for x in args):
        save(case("qwen2", num_hidden_layers=2), places["qwen"])
    out = tmp_path / "out"
    done = command("apply", rotated.file, rotated.twin_path, "-o", out, *(x.format(**places) for x in args))
    assert done.exit_code == 2, done.output
    assert re.search(message, " ".join(done.output.split())), done.output
    assert not out.exists()


def test_an_anchor_that_is_not_needed_does_no_harm(tmp_path: Path) -> None:
    models = Solved("llama", "permutation", tmp_path)
    for name, more in (("a", []), ("b", ["--anchor", models.anchor_path])):
        run("apply", models.file, models.twin_path, "-o", tmp_path / name, "--quiet", *more)
    a, b = load(tmp_path / "a"), load(tmp_path / "b")
    assert all(torch.equal(x, b[name]) for name, x in a.items())


def _edited(source: Path, out: Path, change: dict[str, torch.Tensor | None]) -> Path:
    """A copy of a checkpoint with some tensors replaced, added or removed."""
    shutil.copytree(source, out)
    state = {name: x for name, x in (load(source) | change).items() if x is not None}
    save_file(state, out / "model.safetensors", {"format": "pt"})
    return out


def test_tied_copies_move_and_what_the_model_does_not_know_is_not_written(tmp_path: Path) -> None:
    """A tied head that is stored all the same, an old buffer, and a tensor of what transformers does not build."""
    models = Solved("llama-tied", "permutation", tmp_path)
    embedding = load(models.twin_path)["model.embed_tokens.weight"]
    more = {"lm_head.weight": embedding.clone(), "model.mtp.0.proj.weight": torch.ones(48, 48)}
    more |= {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(5)}
    twin = _edited(models.twin_path, tmp_path / "edited", more)
    run("solve", models.anchor_path, twin, "-o", tmp_path / "b.safetensors", "--residual", "permutation", "--quiet")
    done = run("apply", tmp_path / "b.safetensors", twin, "-o", tmp_path / "out")
    assert "model.mtp.0.proj.weight not written" in done.output
    found = load(tmp_path / "out")
    assert found.keys() == load(twin).keys() - {"model.mtp.0.proj.weight"}
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert torch.equal(found["model.layers.0.self_attn.rotary_emb.inv_freq"], torch.ones(5))
    assert relative_deviation(logits(models.twin), logits(models.at(tmp_path / "out"))) < 1e-3


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_the_dtype_is_what_was_stored_or_asked_for(rotated: Solved, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    run("apply", rotated.file, rotated.twin_path, "-o", out, "--quiet", *rotated.with_anchor, "--dtype", dtype)
    assert {str(x.dtype) for x in load(out).values()} == {f"torch.{dtype}"}
    run("verify", rotated.twin_path, out, "--random", "--tokens", "64", "--quiet")


def _inspected(models: Twins, tmp_path: Path, *args: object) -> tuple[str, dict[str, Any]]:
    paths = [models.folder / name for name in ("anchor", "twin")]
    done = run("inspect", *paths, "--json", tmp_path / "i.json", "--quiet", *args)
    (entry,) = json.loads((tmp_path / "i.json").read_text("utf-8"))["models"].values()
    return done.output, entry["residual"]


def test_inspect_shows_the_angles_and_what_the_stream_does_alone(rotated: Solved, tmp_path: Path) -> None:
    text, found = _inspected(rotated, tmp_path, "--residual", "rotation", "--residual-rounds", "2")
    angles = torch.linalg.eigvals(AlignmentFile.open(rotated.file).element("residual").actions["residual"].matrix)
    degrees = torch.rad2deg(torch.angle(angles).abs())
    for percent in (10, 25, 75, 90):
        assert found[f"stream_angle_p{percent}"] == pytest.approx(float(degrees.quantile(percent / 100)))
    assert found["kind"] == "rotation"
    assert found["loss"] == "none was measured"
    assert found["own_distance_before"] == pytest.approx(found["distance_before"])
    assert found["distance_after"] < found["own_distance_after"] < found["own_distance_before"]
    own, whole = (1 - (found[x] / found["distance_before"]) ** 0.5 for x in ("own_distance_after", "distance_after"))
    assert f"{100 * own:.4g} % of it is symmetry of the stream alone, {100 * whole:.4g} % together" in text
    assert re.search(r"turned by at most( +\d+\.\d){6}  degrees", text)
    assert "No loss was measured" in text
    assert max(map(len, text.splitlines()[3:-1])) <= 120


def test_the_own_share_is_the_whole_where_only_the_stream_was_moved(tmp_path: Path) -> None:
    """Blocks as they were: the stream's element takes away all there is, and the blocks nothing more."""
    models = Twins("llama", "permutation", tmp_path, layers=1)
    scopes, parts = split(models.layout, stored(models.sibling))
    stream = random_stream(models.kind, models.layout.geometry.hidden, 4)
    moved = joined(models.layout, [move_scope(s, x, models.kind, stream) for s, x in zip(scopes, parts, strict=True)])
    save(with_weights(models.anchor, moved), tmp_path / "twin")
    text, found = _inspected(models, tmp_path, "--residual", "permutation")
    between = squared_distance(load(tmp_path / "anchor"), load(tmp_path / "sibling"))
    assert found["own_distance_after"] == pytest.approx(between, rel=1e-3)
    still = stream.actions["residual_gain"].index == torch.arange(48)
    assert found["stream_moved"] == 48 - int(still.sum())
    assert f"{found['stream_moved']} of 48 coordinates moved, {found['signs_flipped']} signs flipped" in text
    assert 10 < found["signs_flipped"] < 38


def test_report_and_card_say_what_was_moved_and_that_no_loss_was_measured(rotated: Solved, tmp_path: Path) -> None:
    parameters = {"residual": "rotation", "residual_rounds": 2, "value_output": "general"}
    config = merge_config("rotation_match", rotated.anchor_path, [rotated.twin_path], parameters=parameters)
    merged(config, tmp_path / "out", write_model_card=True)
    (entry,) = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))["models"].values()
    facts, card = entry["residual"], (tmp_path / "out" / "README.md").read_text("utf-8")
    assert (facts["kind"], facts["loss"], facts["residual_rounds"]) == ("rotation", "none was measured", 2)
    assert "own_distance_after" not in facts  # that takes another pass, which is for inspect
    before, after = (facts[x] ** 0.5 for x in ("distance_before", "distance_after"))
    assert (
        f"Its residual stream was moved: rotation, planes turned by {facts['stream_angle_median']:.1f} degrees" in card
    )
    assert f"distance of all weights {before:.6g} before, {after:.6g} after 2 rounds. No loss was measured" in card
    condition = max(block.get("value_condition_max", 0) for block in entry["blocks"])
    assert entry["totals"]["value_condition_max"] == condition > 1
    assert f"values under general matrices, condition numbers up to {condition:.3g}" in card
    done = run("verify", rotated.twin_path, tmp_path / "out", "--random", "--tokens", "64")
    assert "in other coordinates from layer 0 on, with the same outputs" in done.output
    assert "moved, as its report says: rotation, planes turned by" in done.output


def test_a_stream_from_an_older_file_is_told_by_its_kind(rotated: Solved, tmp_path: Path) -> None:
    """Files need not say what was known of a solve."""
    file = AlignmentFile.open(rotated.file)
    elements = {block: file.element(block) for block in file.blocks}
    save_alignment(tmp_path / "old.safetensors", file.origin, elements)
    models = [{"model": rotated.twin_path, "parameters": {"alignment": str(tmp_path / "old.safetensors")}}]
    merged(merge_config("rotation_match", rotated.anchor_path, models), tmp_path / "out", write_model_card=True)
    card = (tmp_path / "out" / "README.md").read_text("utf-8")
    assert "Its residual stream was moved: rotation. No loss was measured" in card


def test_barrier_measures_what_moving_the_stream_is_worth(rotated: Solved, tmp_path: Path) -> None:
    for path in (rotated.anchor_path, rotated.twin_path):
        word_tokenizer(97).save_pretrained(path)
    (tmp_path / "texts.txt").write_text("w5 w9 w11 w80 w33\nw9 w7 w5 w60\n", "utf-8")
    args = ("--text", tmp_path / "texts.txt", "--points", "3", "--quiet", "--residual", "rotation")
    done = run("barrier", rotated.anchor_path, rotated.twin_path, *args, "--json", tmp_path / "b.json")
    told = json.loads((tmp_path / "b.json").read_text("utf-8"))
    assert told["residual"]["loss"] == {"text": "texts.txt", "barrier": told["barrier"]}
    assert told["residual"]["kind"] == "rotation"
    assert told["at"] == [0.0, 0.5, 1.0]
    ends = [told["losses"][name][-1] for name in ("as it is", "aligned")]
    assert ends[0] == pytest.approx(ends[1], rel=1e-4)
    plain, aligned = (told["barrier"][name] for name in ("as it is", "aligned"))
    assert told["losses"]["aligned"][1] != pytest.approx(told["losses"]["as it is"][1], rel=1e-3)
    worth = "lower" if aligned < plain else "not lower: do without it"
    assert f"barrier {plain:.4f} without alignment, {aligned:.4f} with it ({worth})" in done.output
    assert "residual stream: rotation, planes turned by" in done.output


def test_a_report_that_is_none_stops_no_verification(rotated: Solved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(rotated.twin_path, out)
    (out / "symalign_report.json").write_text('{"models": {"x": {"residual": 3}}}', "utf-8")
    assert "within" in run("verify", rotated.twin_path, out, "--random", "--tokens", "32").output
