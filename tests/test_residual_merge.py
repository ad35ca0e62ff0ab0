"""``residual`` in merges: planted twins come back, files repeat it, and what is not exact is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import State, load, merge_config, merged, squared_distance
from models import logits, perturbed, relative_deviation, save
from streams import case, in_other_coordinates, stored
from transformers import PreTrainedModel
from whole_statistics import measure

from mergekit_symalign.alignment_file import AlignmentFile
from mergekit_symalign.alignments.fit import require_fitting_stream
from mergekit_symalign.cli import main
from mergekit_symalign.errors import AlignmentFileError, ConfigError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.stream import residual_group, residual_kind, ties_embeddings
from mergekit_symalign.symmetry.residual.kinds import Residual

FAMILIES = ["llama", "qwen2", "qwen3", "gemma2", "olmo2", "phi3", "gpt2", "bert-classifier", "modernbert", "mixtral"]
FAMILIES += ["vit-classifier", "phi2", "llama-tied"]
CASES = [(name, wanted) for name in FAMILIES for wanted in ("permutation", "rotation")]


class Twins:
    """An anchor, a sibling, and the sibling in other coordinates of its residual stream and of all its blocks."""

    def __init__(self, family: str, wanted: str, folder: Path, layers: int = 2) -> None:
        self.anchor = case(family, num_hidden_layers=layers)
        self.sibling = perturbed(self.anchor, 0.1, 7)
        self.layout = resolve(self.anchor.config, model="m")
        tied = ties_embeddings(self.anchor.config, self.layout)
        self.kind = residual_kind(self.layout, tied, Residual(wanted))
        other = stored(case(family, 5, num_hidden_layers=layers))
        self.twin = perturbed(self.anchor, 0.0, 0)
        planted = in_other_coordinates(self.layout, stored(self.sibling), self.kind, other)
        self.twin.load_state_dict(planted, strict=False)
        self.twin.tie_weights()
        for name, model in (("anchor", self.anchor), ("sibling", self.sibling), ("twin", self.twin)):
            save(model, folder / name)
        self.folder = folder

    def merge(self, name: str, out: Path, method: str = "rotation_match", **parameters: Any) -> State:
        config = merge_config(method, self.folder / "anchor", [self.folder / name], parameters=parameters)
        return merged(config, out)

    def at(self, path: Path) -> PreTrainedModel:
        return type(self.anchor).from_pretrained(path, dtype=torch.float32).eval()


def _is_admitted(family: str, wanted: str) -> bool:
    config = case(family, num_hidden_layers=1).config
    layout = resolve(config, model="m")
    return wanted == "permutation" or residual_group(layout, ties_embeddings(config, layout)).rotation is not None


@pytest.fixture(scope="module", params=[c for c in CASES if _is_admitted(*c)], ids=lambda c: "-".join(c))
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Twins, str]:
    family, wanted = request.param
    return Twins(family, wanted, tmp_path_factory.mktemp(f"{family}-{wanted}"), layers=1), wanted


def test_a_planted_twin_comes_back(twins: tuple[Twins, str], tmp_path: Path) -> None:
    models, wanted = twins
    models.merge("twin", tmp_path / "out", residual=wanted, residual_rounds=2)
    models.merge("sibling", tmp_path / "reference", residual=wanted, residual_rounds=2)
    out, reference = models.at(tmp_path / "out"), models.at(tmp_path / "reference")
    assert relative_deviation(logits(models.sibling), logits(out)) < 1e-3
    anchor = {name: x.float() for name, x in models.anchor.state_dict().items()}
    distances = [squared_distance(anchor, dict(model.state_dict())) for model in (out, reference, models.twin)]
    assert distances[0] == pytest.approx(distances[1], rel=5e-3)
    assert distances[0] < 0.2 * distances[2]
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    (entry,) = report["models"].values()
    assert report["exact"]
    assert entry["residual"]["distance_after"] < 0.1 * entry["residual"]["distance_before"]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins("llama", "rotation", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("wanted", ["permutation", "rotation"])
def test_a_model_of_another_initialisation_computes_what_it_did(llama: Twins, tmp_path: Path, wanted: str) -> None:
    other = case("llama", 9, num_hidden_layers=2)
    save(other, tmp_path / "other")
    config = merge_config(
        "rotation_match", llama.folder / "anchor", [tmp_path / "other"], parameters={"residual": wanted}
    )
    out = merged(config, tmp_path / "out")
    assert relative_deviation(logits(other), logits(llama.at(tmp_path / "out"))) < 1e-3
    anchor = load(llama.folder / "anchor")
    assert squared_distance(anchor, out) < 0.95 * squared_distance(anchor, load(tmp_path / "other"))
    gains = [name for name in out if "norm" in name]
    same = all(torch.allclose(out[name], anchor[name], atol=0.02) for name in gains)
    assert same == (wanted == "rotation")  # where the stream turns, the model has the anchor's norms


def test_a_file_repeats_the_merge_that_saved_it(llama: Twins, tmp_path: Path) -> None:
    saved = tmp_path / "alignments"
    models = [llama.folder / "twin", llama.folder / "sibling"]
    method = "aligned_task_arithmetic"
    weighed = [{"model": path, "parameters": {"weight": 0.5}} for path in models]
    parameters = {"residual": "rotation", "residual_rounds": 2, "save_alignment": str(saved)}
    out = merged(merge_config(method, llama.folder / "anchor", weighed, parameters=parameters), tmp_path / "out")
    files = [
        {"model": path, "parameters": {"weight": 0.5, "alignment": str(saved / f"{path.name}.safetensors")}}
        for path in models
    ]
    again = merged(merge_config(method, llama.folder / "anchor", files), tmp_path / "again")
    assert all(torch.equal(x, again[name]) for name, x in out.items())
    twin, sibling = (llama.merge(name, tmp_path / name, residual="rotation") for name in ("twin", "sibling"))
    wanted = {name: (x + sibling[name]) / 2 for name, x in twin.items()}
    assert squared_distance(out, wanted) < 1e-3 * squared_distance(out, load(llama.folder / "anchor"))


def test_layers_that_are_not_aligned_move_along(llama: Twins, tmp_path: Path) -> None:
    models = [{"model": llama.folder / "twin", "parameters": {"align": [True, False]}}]
    parameters = {"residual": "rotation"}
    merged(merge_config("rotation_match", llama.folder / "anchor", models, parameters=parameters), tmp_path / "out")
    assert relative_deviation(logits(llama.twin), logits(llama.at(tmp_path / "out"))) < 1e-3
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    (entry,) = report["models"].values()
    assert {block["layer"] for block in entry["blocks"]} == {0}


def _solved(llama: Twins, out: Path, *args: str) -> AlignmentFile:
    paths = [str(llama.folder / name) for name in ("anchor", "twin")]
    result = CliRunner().invoke(main, ["solve", *paths, "-o", str(out), "--quiet", *args])
    assert result.exit_code == 0, result.output
    return AlignmentFile.open(out)


def test_solve_saves_the_stream(llama: Twins, tmp_path: Path) -> None:
    file = _solved(llama, tmp_path / "a.safetensors", "--residual", "rotation", "--residual-rounds", "1")
    assert "residual" in file.blocks
    assert file.facts["residual"]["residual_rounds"] == 1
    assert file.facts["residual"]["stream_angle_max"] > 90


Change = Callable[[Twins, Path], dict[str, Any]]
REFUSED: dict[str, tuple[Change, str]] = {
    "mixed values": (
        lambda t, _: {"residual": [{"filter": "mlp", "value": "permutation"}, {"value": "rotation"}]},
        "parameter residual: it is .*one for the whole merge",
    ),
    "consensus": (lambda t, _: {"residual": "rotation", "anchor": "consensus"}, "anchor is consensus"),
    "no rounds": (lambda t, _: {"residual": "rotation", "residual_rounds": 0}, "residual_rounds: it is 0"),
    "a file without a stream": (
        lambda t, path: {"residual": "rotation", "alignment": str(_solved(t, path / "b.safetensors").path)},
        "the file moves no residual stream, but residual is rotation",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_combined_is_refused(llama: Twins, tmp_path: Path, name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(ConfigError, match=message):
        llama.merge("twin", tmp_path / "out", **change(llama, tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("family", "message"), [("gemma2", "behind the block"), ("gpt2", "its head is its embedding")])
def test_a_rotation_that_is_not_exact_is_refused(tmp_path: Path, family: str, message: str) -> None:
    models = Twins(family, "permutation", tmp_path)
    with pytest.raises(ConfigError, match=rf"residual: rotation with .*{message}.*residual: permutation"):
        models.merge("twin", tmp_path / "out", residual="rotation")
    assert not (tmp_path / "out").exists()


def test_different_layers_are_refused(llama: Twins, tmp_path: Path) -> None:
    paths = [str(llama.folder / name) for name in ("anchor", "twin")]
    sources = [{"model": path, "layer_range": [i, i + 1]} for i, path in enumerate(paths)]
    config = {
        "merge_method": "rotation_match",
        "base_model": paths[0],
        "slices": [{"sources": sources}],
        "parameters": {"residual": "rotation"},
    }
    with pytest.raises(ConfigError, match=r"pairs different layers .* the residual stream is one for all layers"):
        merged(config, tmp_path / "out")


def test_a_file_whose_stream_is_no_symmetry_is_refused(llama: Twins, tmp_path: Path) -> None:
    """A rotation in a file for models that admit none."""
    file = _solved(llama, tmp_path / "a.safetensors", "--residual", "rotation", "--residual-rounds", "1")
    text = dict(file.origin.settings)
    assert text["residual"] == "rotation" or "residual" in str(file.origin.settings_by_block)
    admitted = residual_group(llama.layout, tied=True)
    assert admitted.rotation is None
    with pytest.raises(AlignmentFileError, match=r"residual: .*its head is its embedding"):
        require_fitting_stream(file, llama.layout, True)


def test_methods_that_use_statistics_are_refused(llama: Twins, tmp_path: Path) -> None:
    models = []
    for name, model in (("anchor", llama.anchor), ("twin", llama.twin)):
        measure(model, llama.folder / name, tmp_path / name)
        models.append({"model": llama.folder / name, "parameters": {"statistics": str(tmp_path / name)}})
    config = merge_config("aligned_regmean", llama.folder / "anchor", models, parameters={"residual": "permutation"})
    with pytest.raises(ConfigError, match=r"parameter residual: .*do not move with the residual stream"):
        merged(config, tmp_path / "out")
