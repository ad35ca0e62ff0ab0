"""save_alignment: a file for each model whatever the models are called, with the settings of its own blocks."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest
import torch
from conftest import merge_config, merged
from models import make_model, perturbed, save

from mergekit_symalign.alignment_file import AlignmentFile
from mergekit_symalign.alignments.destinations import file_names, stem_of
from mergekit_symalign.alignments.fit import require_fits
from mergekit_symalign.families.resolve import resolve


def _names(*models: str) -> list[str]:
    return [path.stem for path in file_names([(Path("out"), model) for model in models])]


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (["a/x", "b/y"], ["x", "y"]),
        (["a/x", "b/x", "c/x-2"], ["x", "x-3", "x-2"]),
        (["c/x-2", "a/x", "b/x"], ["x-2", "x", "x-3"]),
        (["a/x", "b/X", "c/x"], ["x", "X-2", "x-3"]),
        (["a/x", "b/X", "c/x-2", "d/X-2"], ["x", "X-3", "x-2", "X-2-2"]),
        (["a/é", unicodedata.normalize("NFD", "b/é")], ["é", "é-2"]),
        (["base+lora", "base-lora"], ["base-lora", "base-lora-2"]),
        (["C:\\models\\x", "/models/x/"], ["x", "x-2"]),
    ],
)
def test_names_never_collide(models: list[str], names: list[str]) -> None:
    assert _names(*models) == names


@pytest.mark.parametrize(
    "model", ["a/..", "/", "", "nul", "COM1.x", 'a/<>:"|?*\n', "a/" + 300 * "é", "x. .", ".hidden"]
)
def test_names_are_possible_everywhere(model: str) -> None:
    stem = stem_of(model)
    assert stem
    assert len(f"{stem}-999.safetensors".encode()) < 255
    assert not set(stem) & set('<>:"/\\|?*\n')
    assert not stem.startswith(".")
    assert not stem.endswith((".", " "))
    assert stem.split(".")[0].casefold() not in ("nul", "com1")


def test_the_merge_keeps_its_own_weights(tmp_path: Path) -> None:
    """A model of the name that MergeKit's output has, saved into the output's folder."""
    out, model = tmp_path / "out", make_model("llama", 0)
    anchor, twin = save(model, tmp_path / "anchor"), save(perturbed(model, 0.1, 1), tmp_path / "model")
    saving = {"save_alignment": str(out)}
    kept = merged(merge_config("rotation_match", anchor, [twin], parameters=saving), out)
    assert sorted(p.name for p in out.glob("*.safetensors")) == ["model-2.safetensors", "model.safetensors"]
    plain = merged(merge_config("rotation_match", anchor, [twin]), tmp_path / "plain")
    assert all(torch.equal(kept[name], x) for name, x in plain.items())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, model = tmp_path_factory.mktemp("models"), make_model("llama", 0)
    for i, name in enumerate(("anchor", "a/x", "b/x", "c/x-2", "d/X")):
        (folder / name).parent.mkdir(exist_ok=True)
        save(perturbed(model, 0.1 * i, i), folder / name)
    return folder


def test_every_model_has_its_own_file(folder: Path, tmp_path: Path) -> None:
    models = [folder / name for name in ("a/x", "b/x", "c/x-2", "d/X")]
    config = merge_config("rotation_match", folder / "anchor", models)
    merged(config | {"parameters": {"save_alignment": str(tmp_path / "saved")}}, tmp_path / "out")
    files = {AlignmentFile.open(path).origin.model: path.name for path in (tmp_path / "saved").iterdir()}
    assert [files[str(model)] for model in models] == [
        *("x.safetensors", "x-3.safetensors", "x-2.safetensors", "X-4.safetensors")
    ]
    again = [{"model": m, "parameters": {"alignment": str(tmp_path / "saved" / files[str(m)])}} for m in models]
    from_files = merged(merge_config("rotation_match", folder / "anchor", again), tmp_path / "again")
    solved = merged(merge_config("rotation_match", folder / "anchor", models), tmp_path / "solved")
    assert all(torch.equal(x, from_files[name]) for name, x in solved.items())


def test_one_folder_spelled_twice_is_one(folder: Path, tmp_path: Path) -> None:
    saved = str(tmp_path / "saved")
    spelled = [{"filter": "mlp", "value": f"{saved}/./"}, {"value": saved}]
    config = merge_config("rotation_match", folder / "anchor", [folder / "a/x"])
    merged(config | {"parameters": {"save_alignment": spelled}}, tmp_path / "out")
    assert [p.name for p in Path(saved).iterdir()] == ["x.safetensors"]
    assert require_fits(AlignmentFile.open(tmp_path / "saved" / "x.safetensors"), _layout())


def test_settings_are_those_of_each_block(folder: Path, tmp_path: Path) -> None:
    parameters = {
        "save_alignment": str(tmp_path / "saved"),
        "scaling": [{"filter": "mlp", "value": True}, {"value": False}],
        "rotation": "none",
    }
    merged(merge_config("rotation_match", folder / "anchor", [folder / "a/x"], parameters=parameters), tmp_path / "out")
    file = AlignmentFile.open(tmp_path / "saved" / "x.safetensors")
    assert file.origin.settings["scaling"] == "differs between layers"
    assert file.origin.settings["rotation"] == "none"
    assert file.origin.settings_by_block["layer 1 attention"] == {"scaling": False}
    assert file.settings_of("layer 1 attention")["scaling"] is False
    assert file.settings_of("layer 1 mlp")["scaling"] is True
    assert file.settings_of("layer 1 mlp")["rotation"] == "none"


def test_settings_are_not_those_of_another_merge_group(folder: Path, tmp_path: Path) -> None:
    """The parameters differ between output slices: each block has those that it was solved with."""

    def part(first: int, last: int, **parameters: object) -> dict[str, object]:
        sources = [{"model": str(folder / name), "layer_range": [first, last]} for name in ("anchor", "a/x")]
        return {"sources": sources, "parameters": parameters}

    config = {
        "merge_method": "rotation_match",
        "base_model": str(folder / "anchor"),
        "slices": [part(0, 2, heads=False), part(2, 3, heads=True)],
        "parameters": {"save_alignment": str(tmp_path / "saved"), "rotation": "none", "weight": 1.0},
        "dtype": "float32",
    }
    merged(config, tmp_path / "out")
    file = AlignmentFile.open(tmp_path / "saved" / "x.safetensors")
    heads = [file.settings_of(f"layer {i} attention")["heads"] for i in range(3)]
    assert heads == [False, False, True]
    assert file.origin.settings["heads"] == "differs between layers"


def _layout():  # type: ignore[no-untyped-def]
    return resolve(make_model("llama", 0).config, model="m")
