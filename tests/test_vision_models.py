"""Vision-language models in every command: texts run through the text model alone, and the tower stays as it is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import State, load, merge_config, merged
from models import save, word_tokenizer
from more_models import family_for, more_model
from test_more_families import _picture, perturbed_copy

from mergekit_symalign.cli import main
from mergekit_symalign.families.known import wrappers
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.statistics.file import StatisticsFile
from mergekit_symalign.trial import checks
from mergekit_symalign.trial.checks import (
    EXACT,
    deviation_of_blocks,
    deviation_of_stream,
    missing_tensors,
    stream_kinds,
    unclaimed_tensors,
)
from mergekit_symalign.trial.models import outputs, relative_deviation, small_model, with_weights


class Pair:
    """A vision-language model and another one in other coordinates, with a tokenizer and some texts."""

    def __init__(self, name: str, folder: Path) -> None:
        anchor = more_model(name)
        layout = resolve(anchor.config, model=name)
        sibling = perturbed_copy(anchor)
        self.twin = with_weights(sibling, transform(sibling.state_dict(), layout, random_elements(layout, 3)))
        self.picture, self.layout = _picture(name), layout
        copies = (with_weights(model, model.state_dict()) for model in (anchor, self.twin))
        self.paths = [save(model, folder / path) for model, path in zip(copies, ("a", "b"), strict=True)]
        for path in self.paths:
            word_tokenizer(97, "w").save_pretrained(path)
        self.texts = folder / "texts.txt"
        lines = (" ".join(f"w{(i * k) % 80 + 3}" for k in (1, 7, 5, 3, 11)) for i in range(1, 40))
        self.texts.write_text("\n".join(lines) + "\n", "utf-8")

    def require_the_twin(self, out: Path) -> None:
        """The model in a folder sees and speaks as the twin."""
        found = type(self.twin).from_pretrained(out, dtype=torch.float32).state_dict()
        model = with_weights(self.twin, {name: x.double() for name, x in found.items()})
        for inputs in ({}, self.picture):
            assert relative_deviation(outputs(self.twin, **inputs), outputs(model, **inputs)) < 1e-4

    def require_mean_tower(self, out: State) -> None:
        """No tensor around the text model was merged by more than its own numbers."""
        one, other = map(load, self.paths)
        around = [name for name in one if self.layout.is_around_text(name)]
        assert len(around) > 10
        names = {self.layout.canonical(name): x for name, x in out.items()}
        for name in around:
            torch.testing.assert_close(names[self.layout.canonical(name)], (one[name] + other[name]) / 2)

    def run(self, *arguments: object) -> str:
        done = CliRunner().invoke(main, list(map(str, arguments)))
        assert done.exit_code == 0, done.output
        return done.output


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("llava", tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair("qwen2.5-vl", tmp_path_factory.mktemp("qwen"))


def test_the_residual_stream_moves_with_what_the_tower_writes(qwen: Pair, tmp_path: Path) -> None:
    """In a merge, and when a saved alignment is applied to the model alone."""
    anchor, model = qwen.paths
    parameters = {"residual": "rotation", "save_alignment": str(tmp_path / "files")}
    merged(merge_config("rotation_match", anchor, [model], parameters=parameters), tmp_path / "out")
    qwen.require_the_twin(tmp_path / "out")
    (file,) = (tmp_path / "files").iterdir()
    qwen.run("apply", file, model, "-o", tmp_path / "applied", "--anchor", anchor)
    qwen.require_the_twin(tmp_path / "applied")
    assert load(tmp_path / "applied").keys() == load(model).keys()


def test_activations_on_texts(llava: Pair, tmp_path: Path) -> None:
    anchor, model = llava.paths
    parameters = {"objective": "activations", "calibration": str(llava.texts), "residual": "permutation"}
    merged(merge_config("rotation_match", anchor, [model], parameters=parameters), tmp_path / "out")
    llava.require_the_twin(tmp_path / "out")


def test_statistics_of_texts_say_nothing_of_the_tower(llava: Pair, tmp_path: Path) -> None:
    models = []
    for path in llava.paths:
        file = tmp_path / f"{path.name}.safetensors"
        what = ("--fisher", "empirical", "--tokens", 40, "--quiet")
        llava.run("measure", path, "-o", file, "--calibration", llava.texts, *what)
        names = StatisticsFile.open(file).names
        assert names
        assert not any(map(llava.layout.is_around_text, names))
        models.append({"model": path, "parameters": {"statistics": str(file), "weight": 0.5}})
    for method in ("regmean", "fisher"):
        llava.require_mean_tower(merged(merge_config(method, None, models), tmp_path / method))


def test_transport_passes_the_tower_by(qwen: Pair, tmp_path: Path) -> None:
    """MergeKit plans some tensors of this one's tower twice."""
    out = merged(merge_config("ot_fusion", qwen.paths[0], qwen.paths), tmp_path / "out")
    layout = qwen.layout
    one, other = map(load, qwen.paths)
    blocks = [name for name in one if name.startswith("visual.blocks")]
    assert len(blocks) > 10
    names = {layout.canonical(name): x for name, x in out.items()}
    assert all(torch.allclose(names[layout.canonical(x)], (one[x] + other[x]) / 2, atol=1e-6) for x in blocks)


def test_losses_and_learning_on_texts(llava: Pair, tmp_path: Path) -> None:
    """A vision-language model predicts the next token, so it has a loss on texts."""
    anchor, model = llava.paths
    file = tmp_path / "learned.safetensors"
    llava.run("learn", anchor, model, "--data", llava.texts, "-o", file, "--steps", "1", "--residual", "rotation")
    models = [{"model": model, "parameters": {"alignment": str(file)}}]
    merged(merge_config("rotation_match", anchor, models), tmp_path / "out")
    llava.require_the_twin(tmp_path / "out")
    assert "The same function" in llava.run("verify", model, tmp_path / "out", "--random")
    assert "nats per token" in llava.run("barrier", anchor, model, "--text", llava.texts, "--points", "2")


@pytest.mark.parametrize("name", ["mistral3-vl", "internvl"])
def test_pictures_are_seen_as_before(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    model = more_model(name)
    model.config.image_token_id = 90
    layout = resolve(model.config, model=name)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 80, (1, 12), generator=generator)
    pixels, others = torch.randn((2, 2, 3, 28, 28), generator=generator, dtype=torch.float64)
    ids[0, [2, 5]] = 90  # two pictures of a token each
    inputs = {"input_ids": ids, "pixel_values": pixels}
    if name == "mistral3-vl":
        inputs["image_sizes"] = torch.tensor([[28, 28], [28, 28]])
    other = outputs(model, **inputs | {"pixel_values": others})
    assert relative_deviation(outputs(model, **inputs), other) > 1e-2
    monkeypatch.setattr(checks, "outputs", partial(outputs, **inputs))
    assert deviation_of_blocks(model, layout) < EXACT
    for kind in stream_kinds(model, layout):
        assert deviation_of_stream(model, layout, kind) < EXACT, kind


def test_small_models_need_no_settings() -> None:
    """Around a text model `check-family` builds a class of each kind that the table describes, and runs it.

    The tensors of all other classes: `test_every_supported_class_has_all_its_tensors_claimed`.
    """
    need_some = {"Ovis2ForConditionalGeneration", "Qwen3ASRForConditionalGeneration"}  # towers with sizes of their own
    for name in {wrapper.architectures[0] for wrapper in wrappers().values()} - need_some:
        model = small_model(name, family_for(name))
        layout = resolve(model.config, model=name)
        assert [*unclaimed_tensors(model, layout), *missing_tensors(model, layout)] == [], name
        assert outputs(model).isfinite().all(), name
