"""`objective: activations` for vision models: anchor and models compared on a folder of images."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import State, load, merge_config, merged
from models import make_model, off_by, rounding, save, with_weights
from PIL import Image
from transformers import PreTrainedModel, ViTImageProcessorPil

from mergekit_symalign.activations.images import spread
from mergekit_symalign.errors import CalibrationError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry.by_activations import evidence

EPS = torch.finfo(torch.float32).eps


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for i in range(24):
        pixels = torch.randint(256, (16, 16, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def anchor() -> PreTrainedModel:
    return make_model("vit-classifier", 0)


@pytest.fixture(scope="module")
def paths(anchor: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    layout = resolve(anchor.config, model="vit")
    twin = transform(anchor.state_dict(), layout, random_elements(layout, 3, Planted()))
    states = {"anchor": anchor.state_dict(), "twin": twin}
    found = {name: save(with_weights(anchor, state), folder / name) for name, state in states.items()}
    for path in found.values():
        ViTImageProcessorPil(size={"height": 16, "width": 16}).save_pretrained(path)
    return found


def _match(paths: dict[str, Path], calibration: Path, out: Path) -> None:
    settings = {"objective": "activations", "calibration": str(calibration)}
    merged(merge_config("rotation_match", paths["anchor"], [paths["twin"]], parameters=settings), out)


def _loaded(model: PreTrainedModel, path: Path) -> State:
    return dict(type(model).from_pretrained(path, dtype=torch.float32).state_dict())


def test_a_twin_is_recovered_from_images_alone(
    anchor: PreTrainedModel, paths: dict[str, Path], images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evidence, "GRAIN", 1e-9)
    monkeypatch.setattr(evidence.Agreement, "share", 1e-9)
    _match(paths, images, tmp_path)
    out, wanted, planted = (_loaded(anchor, p) for p in (tmp_path, paths["anchor"], paths["twin"]))
    head_dim = resolve(anchor.config, model="vit").geometry.head_dim
    assert off_by(out, wanted) * EPS < rounding(anchor) * head_dim**0.5
    assert off_by(planted, wanted) * EPS > 0.5


def test_processors_must_give_equal_images(
    paths: dict[str, Path], images: Path, tmp_path: Path, anchor: PreTrainedModel
) -> None:
    other = save(anchor, tmp_path / "other")
    ViTImageProcessorPil(size={"height": 16, "width": 16}, image_mean=[0.1, 0.2, 0.3]).save_pretrained(other)
    with pytest.raises(CalibrationError, match="turn its images into different numbers"):
        _match({**paths, "twin": other}, images, tmp_path / "out")


def test_folders_that_hold_no_images(paths: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(CalibrationError, match="it holds no images"):
        _match(paths, tmp_path / "empty", tmp_path / "out")
    (tmp_path / "empty" / "a.png").write_bytes(b"no image")
    with pytest.raises(CalibrationError, match=r"a\.png: it cannot be read"):
        _match(paths, tmp_path / "empty", tmp_path / "out")
    assert not load(tmp_path / "out")


@pytest.mark.parametrize(
    ("count", "most", "taken"), [(6, 9, [0, 1, 2, 3, 4, 5]), (6, 3, [0, 2, 4]), (5, 2, [0, 2]), (3, 0, [0])]
)
def test_images_are_taken_evenly_from_all_folders(count: int, most: int, taken: list[int]) -> None:
    """Folders of labels come one after another: the first of them alone would say nothing of the others."""
    paths = [Path(f"{i}.png") for i in range(count)]
    assert spread(paths, most) == [paths[i] for i in taken]
