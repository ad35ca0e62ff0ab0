"""Part 6 of the study: its images are those that its models see, and its configurations ask for what the page says."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from transformers import AutoImageProcessor

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
pytest.importorskip("sklearn", reason="needs the extra study")

from study import digits  # noqa: E402
from study.merging import MERGES  # noqa: E402
from study.vit_merges import PLAIN, VitMerger  # noqa: E402
from study.vit_models import HALVES, Training, Vits, abilities, load, new_model, save, train  # noqa: E402
from study.vits import MERGERS, tried  # noqa: E402

SMALL = Vits.read("vits-small")
DESCRIBED = yaml.safe_load((MERGES / "vits.yml").read_text("utf-8"))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("vits")
    for seed, name in enumerate(("reference", "target")):
        save(new_model(SMALL, seed), folder / name)
    return {name: folder / name for name in ("reference", "target")}


def test_no_held_out_image_is_trained_on() -> None:
    train, test = ({bytes(image.numpy()) for image in digits.images(part)} for part in ("train", "test"))
    assert len(digits.images("test")) == digits.HELD_OUT
    assert not train & test
    assert set(digits.labels("train").tolist()) == set().union(*HALVES.values())


def test_the_files_of_images_are_what_the_models_see(models: dict[str, Path], tmp_path: Path) -> None:
    """Through the processor that transformers loads from a model's directory."""
    folder = digits.write_images(tmp_path / "images", positions := torch.tensor([0, 7]))
    processor = AutoImageProcessor.from_pretrained(models["reference"])
    files = [Image.open(path) for path in sorted(folder.rglob("*.png"), key=lambda path: path.name)]
    assert torch.allclose(processor(files, return_tensors="pt")["pixel_values"], digits.pixels("train")[positions])
    assert [int(Path(file.filename).parent.name) for file in files] == digits.labels("train")[positions].tolist()


def test_a_half_is_trained_on_its_own_digits() -> None:
    found = abilities(train(new_model(SMALL, 0), Training(60, 1e-2), 32, 0, HALVES["low"]))
    assert found["low"] > 0.3
    assert found["high"] == 0


def test_every_merger_and_match_is_described() -> None:
    assert {merger for part in MERGERS for merger, _ in tried(part)} == DESCRIBED["mergers"].keys()
    assert {match for part in MERGERS for _, match in tried(part)} == {PLAIN, *DESCRIBED["matches"]}


def test_a_match_adds_alignment_and_nothing_else(models: dict[str, Path], tmp_path: Path) -> None:
    merger = VitMerger(models, {"both": tmp_path / "images"}, tmp_path)
    plain, match = (merger.config("ot-wts", variant) for variant in (PLAIN, "without-rescale"))
    assert (plain["merge_method"], match["merge_method"]) == ("ot_fusion", "aligned_ot_fusion")
    assert match["parameters"] == plain["parameters"] | {"scaling": False}
    assert match["models"] == plain["models"]


def test_the_average_without_match_is_the_average(models: dict[str, Path], tmp_path: Path) -> None:
    merged = load(VitMerger(models, {"both": tmp_path}, tmp_path).merge("simple", PLAIN)).state_dict()
    one, other = (load(folder).state_dict() for folder in models.values())
    assert all(torch.allclose(merged[name], (one[name] + other[name]) / 2, atol=1e-6) for name in one)
