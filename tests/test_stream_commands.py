"""Commands on models whose residual stream is moved: apply, verify, inspect, barrier, cards and reports."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import load, merge_config, merged
from models import logits, relative_deviation, save
from safetensors.torch import save_file
from streams import case
from test_residual_merge import Twins

from mergekit_symalign.cli import main

State = dict[str, torch.Tensor]
KINDS = [("llama", "rotation"), ("llama", "permutation"), ("llama-tied", "permutation"), ("phi2", "rotation")]
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


@pytest.fixture(scope="module", params=KINDS, ids=lambda c: "-".join(c))
def solved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Solved:
    return Solved(*request.param, tmp_path_factory.mktemp("-".join(request.param)))


@pytest.fixture(scope="module")
def rotated(tmp_path_factory: pytest.TempPathFactory) -> Solved:
    return Solved("llama", "rotation", tmp_path_factory.mktemp("rotated"))


def test_apply_writes_what_a_merge_of_the_model_alone_writes(solved: Solved, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run("apply", solved.file, solved.twin_path, "-o", out, "--quiet", *solved.with_anchor)
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
    run("apply", solved.file, solved.twin_path, "-o", out, "--quiet", *solved.with_anchor)
    compare = ("verify", solved.twin_path, out, "--random", "--tokens", "64", "--quiet")
    run(*compare)
    state = load(out)
    (name, *_) = (x for x in state if "0." in x and x.endswith(("q_proj.weight", "query.weight", "c_attn.weight")))
    save_file(state | {name: state[name].flip(0, 1).contiguous()}, out / "model.safetensors", {"format": "pt"})
    done = command(*compare)
    assert done.exit_code == 1, done.output
    assert "NOT the same function" in done.output


def test_invert_undoes_it(solved: Solved, tmp_path: Path) -> None:
    out, back = tmp_path / "out", tmp_path / "back"
    run("apply", solved.file, solved.twin_path, "-o", out, "--quiet", *solved.with_anchor)
    norms = ["--norms-of", solved.twin_path] if solved.kind.rotates else []
    run("apply", solved.file, out, "-o", back, "--quiet", "--invert", *norms)
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
