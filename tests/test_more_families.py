"""Classes beyond those of `models.FAMILIES`: symmetries kept, twins recovered through MergeKit, pictures, refusals."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from conftest import load, merge_config, merged, squared_distance
from hub_models import CLASSES as HUB
from models import perturbed
from more_models import MORE, family_for, more_model
from safetensors.torch import save_file
from transformers import PreTrainedModel

from mergekit_symalign.cli import main
from mergekit_symalign.errors import ArchitectureError, CheckpointError
from mergekit_symalign.families.known import _files, families_of
from mergekit_symalign.families.resolve import resolve, supported_architectures
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.trial import checks
from mergekit_symalign.trial.checks import (
    EXACT,
    deviation_of_blocks,
    deviation_of_stream,
    missing_tensors,
    problems,
    stream_kinds,
    tensors_without_effect,
    unclaimed_tensors,
)
from mergekit_symalign.trial.models import class_of, outputs, randomise, relative_deviation, small_model, with_weights

WITHOUT_CODE = {"LLaMaForCausalLM", *(kind.__name__ for kind in HUB)}  # the first is of old checkpoints
SETTINGS = {class_of(name).config_class: settings for name, settings in reversed(MORE.values())}
MERGED = [
    "olmo",
    "exaone4-hybrid",
    "glm",
    "hunyuan",
    "apertus",
    "nemotron",
    "phimoe",
    "qwen3-next",
    "granite4-h",
    "opt",
    "xlm-roberta",
    "gpt-oss",
    "bloom",
    "minicpm3",
    "deepseek-v3",
]
MERGED += [
    "reward",
    "qwen3-embedding",
    "gemma3-vl",
    "mistral3-vl",
    "llava",
    "smolvlm",
    "qwen2.5-vl",
    "qwen3-vl",
    "glm4v",
]
MERGED += ["siglip", "dinov2", "bart", "whisper", "t5"]
if os.environ.get("EVERY_CLASS"):  # `make architectures`
    MERGED = [name for name in MORE if name != "dinov2-swiglu"]  # MergeKit cannot split gate and up of DINOv2


@pytest.mark.parametrize("name", MORE)
def test_the_table_describes_the_model(name: str) -> None:
    """All tensors are claimed; every symmetry of blocks and stream keeps the function, and half of one does not."""
    model = more_model(name)
    assert problems(model, resolve(model.config, model=name)) == []


def test_every_supported_class_has_all_its_tensors_claimed() -> None:
    """Those that are derived from another one's head, too."""
    for name in supported_architectures():
        if name in WITHOUT_CODE:
            continue
        model = small_model(name, family_for(name), SETTINGS.get(class_of(name).config_class))
        layout = resolve(model.config, model=name)
        assert [*unclaimed_tensors(model, layout), *missing_tensors(model, layout)] == [], name


class Twins:
    """An anchor, a sibling, and the sibling in other coordinates."""

    def __init__(self, name: str, folder: Path) -> None:
        self.anchor = more_model(name)
        self.sibling = perturbed_copy(self.anchor)
        layout = resolve(self.anchor.config, model=name)
        planted = transform(self.sibling.state_dict(), layout, random_elements(layout, 3))
        self.paths = [folder / "anchor", folder / "twin"]
        for path, model in zip(self.paths, (self.anchor, with_weights(self.sibling, planted)), strict=True):
            copy = with_weights(model, model.state_dict()).float()
            copy.save_pretrained(path)

    def require_recovered(self, out: Path, spread: float = 1.001) -> None:
        """The same function, and no farther from the anchor than the sibling that was moved, up to a factor."""
        found = type(self.anchor).from_pretrained(out, dtype=torch.float32).state_dict()
        result = with_weights(self.anchor, {name: x.double() for name, x in found.items()})
        assert relative_deviation(outputs(self.sibling), outputs(result)) < 1e-4
        before = squared_distance(self.anchor.state_dict(), self.sibling.state_dict())
        assert squared_distance(self.anchor.state_dict(), result.state_dict()) < before * spread


def perturbed_copy(model: PreTrainedModel, noise: float = 0.1) -> PreTrainedModel:
    """Every weight moved a little; learned numbers of an activation stay."""
    noisy = perturbed(model, noise, 1).state_dict()
    return with_weights(model, {name: x if x.numel() > 1 else model.state_dict()[name] for name, x in noisy.items()})


@pytest.mark.parametrize("name", MERGED)
def test_a_planted_twin_comes_back_through_a_merge(tmp_path: Path, name: str) -> None:
    twins = Twins(name, tmp_path)
    merged(merge_config("rotation_match", twins.paths[0], [twins.paths[1]]), tmp_path / "out")
    twins.require_recovered(tmp_path / "out")


@pytest.mark.parametrize("name", ["mistral3-vl", "qwen2.5-vl", "llava"])
def test_both_layouts_of_names(tmp_path: Path, name: str) -> None:
    """transformers writes the names that the Hub has; checkpoints with the model's names in memory are read too."""
    twins = Twins(name, tmp_path)
    names = set(twins.anchor.state_dict())
    stored = load(twins.paths[1])
    assert not set(stored) <= names, "transformers writes other names than the model has"
    save_file(
        {key: x.float().contiguous() for key, x in _state(twins.paths[1], type(twins.anchor)).items()}, tmp_path / "m"
    )
    (tmp_path / "m").replace(twins.paths[1] / "model.safetensors")
    assert set(load(twins.paths[1])) <= names
    merged(merge_config("rotation_match", twins.paths[0], [twins.paths[1]]), tmp_path / "out")
    twins.require_recovered(tmp_path / "out")


def _state(path: Path, kind: Any) -> dict[str, torch.Tensor]:
    model = kind.from_pretrained(path, dtype=torch.float32)
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    return {name: x for name, x in model.state_dict().items() if name not in tied}


def _picture(name: str) -> dict[str, torch.Tensor]:
    """A prompt with one picture."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 80, (1, 12), generator=generator)
    ids[0, 2 : 6 if name == "llava" else 3] = 90
    if name.startswith(("qwen", "glm")):
        patches = torch.randn((4, 3 * 2 * 14 * 14), generator=generator, dtype=torch.float64)
        kinds = (ids == 90).int()
        return {"input_ids": ids, "pixel_values": patches, "image_grid_thw": torch.tensor([[1, 2, 2]])} | {
            "mm_token_type_ids": kinds
        }
    side = 56 if name == "mistral3-vl" else 28
    pixels = torch.randn((1, 3, side, side), generator=generator, dtype=torch.float64)
    if name == "mistral3-vl":
        ids[0, 2:6] = 90
        return {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[side, side]])}
    if name == "gemma3-vl":
        return {"input_ids": ids, "pixel_values": pixels, "token_type_ids": (ids == 90).long()}
    return {"input_ids": ids, "pixel_values": pixels[None] if name == "smolvlm" else pixels}


PICTURES = ["gemma3-vl", "llava", "mistral3-vl", "internvl", "smolvlm", "qwen2.5-vl", "qwen3-vl", "glm4v"]


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_seen_as_before(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What the tower writes to the residual stream moves with it, and the blocks of the tower are blocks as others."""
    model, inputs = more_model(name), _picture(name)
    layout = resolve(model.config, model=name)
    other = inputs | {"pixel_values": inputs["pixel_values"].roll(1, -1)}
    assert relative_deviation(outputs(model, **inputs), outputs(model, **other)) > 1e-2
    monkeypatch.setattr(checks, "outputs", partial(outputs, **inputs))
    assert set(layout.towers) == {"vision"}
    assert deviation_of_blocks(model, layout) < EXACT
    assert tensors_without_effect(model, layout) == []
    for kind in stream_kinds(model, layout):
        assert deviation_of_stream(model, layout, kind) < EXACT, kind


def test_a_gated_mlp_may_have_any_activation() -> None:
    for name, key in (("LlamaForCausalLM", "hidden_act"), ("Gemma2Model", "hidden_activation")):
        settings = {key: "relu"}
        model = randomise(small_model(name, family_for(name), settings), 0)
        assert deviation_of_blocks(model, resolve(model.config, model=name)) < EXACT


def test_a_tensor_that_nobody_lists_is_not_lost(tmp_path: Path) -> None:
    """A tower with a head that MergeKit's file does not list: dropped in silence by a plain merge, refused by ours."""
    family = family_for("Gemma3ForConditionalGeneration")
    model = small_model("Gemma3ForConditionalGeneration", family, {"image_token_index": 90}).float()
    for name in ("a", "b"):
        model.save_pretrained(tmp_path / name)
    with pytest.raises(CheckpointError, match="silently drop it"):
        merged(merge_config("rotation_match", tmp_path / "a", [tmp_path / "b"]), tmp_path / "out")


LLAMA = "llama"
WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "gain without norm": (
        {"layer": {"self_attn.q_norm.weight": {"axes": ["query_gain"]}}},
        "axis query_gain.*norm is none",
    ),
    "norm without gains": ({"attention": {"norm": "head"}}, "norm is head, which needs a gain"),
    "gated without gate": (
        {"layer": {"mlp.gate_proj.weight": {"axes": ["up", "residual"]}, "mlp.gate_proj.bias": None}},
        "no tensor.*axis gate",
    ),
    "plain with gate": ({"mlp": "plain"}, "mlp is plain, but a tensor of a layer has the axis gate"),
    "activation of a gated MLP": ({"activation": "hidden_act"}, "activation is of a plain MLP"),
    "restricted activation of a gated MLP": ({"variants": {"hidden_act": ["silu"]}}, "may have any activation"),
    "experts without sizes": (
        {"layer": {"mlp.gate.weight": {"axes": ["expert", "residual"]}}},
        "sizes.experts and the axis",
    ),
    "sizes without experts": ({"sizes": {"experts": "num_experts"}}, "sizes.experts and the axis expert"),
    "no positions that turn": (
        {"attention": {"positions": "none", "rotary_factor": ["partial_rotary_factor"]}},
        "positions is none, so no part",
    ),
    "no values": (
        {"layer": {"self_attn.v_proj.weight": {"axes": ["key", "residual"]}, "self_attn.v_proj.bias": None}},
        "axis value",
    ),
    "two blocks in one tensor": (
        {"layer": {"x.weight": {"axes": [["query", "up"], "residual"]}}},
        "belongs to one of them",
    ),
    "block outside": ({"tensors": {"x.weight": {"axes": ["up", "residual"]}}}, "lies outside the layers"),
    "unknown axis": ({"layer": {"x.weight": {"axes": ["quety", "residual"]}}}, "quety"),
    "reader that is not there": (
        {"tensors": {"norm.weight": {"axes": ["residual"], "read_by": ["lm_hed.weight"]}}},
        r"norm.weight is read by \['lm_hed",
    ),
    "unknown parent": ({"extends": "lama"}, "extends lama, which there is not"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_file_that_no_solver_knows_is_refused_when_it_is_loaded(case: str) -> None:
    changes, message = WRONG[case]
    own = {"name": "new", "title": "New", "extends": LLAMA, "architectures": ["NewForCausalLM"], **changes}
    with pytest.raises(ArchitectureError, match=f"family new: .*{message}"):
        families_of({LLAMA: _files()[LLAMA], "new": own})


def _checked(file: Path, *options: str) -> Any:
    return CliRunner().invoke(main, ["check-family", str(file), *options])


def _written(path: Path, **changes: Any) -> Path:
    own = {"name": "new", "title": "New", "extends": LLAMA, "architectures": ["Qwen3ForCausalLM"], **changes}
    path.write_text(yaml.safe_dump(own), "utf-8")
    return path


def test_check_family_says_what_is_missing(tmp_path: Path) -> None:
    bare = _checked(_written(tmp_path / "new.yaml"), "--class", "Qwen3ForCausalLM")
    assert bare.exit_code == 1
    assert "model.layers.0.self_attn.q_norm.weight [8] is not in the table" in bare.output
    gains = {"self_attn.q_norm.weight": {"axes": ["query_gain"]}, "self_attn.k_norm.weight": {"axes": ["key_gain"]}}
    wrong = {"input_layernorm.weight": {"axes": ["residual"], "read_by": ["self_attn.q_proj.weight"]}}
    norm = {"attention": {"norm": "head"}}
    misread = _checked(_written(tmp_path / "new.yaml", layer=gains | wrong, **norm), "--class", "Qwen3ForCausalLM")
    assert misread.exit_code == 1
    assert "residual: a random rotation moves the outputs" in misread.output
    right = _checked(_written(tmp_path / "new.yaml", layer=gains, **norm), "--class", "Qwen3ForCausalLM")
    assert right.exit_code == 0, right.output
    assert "Qwen3ForCausalLM: right" in right.output
    assert "plain merge: keeps every tensor" in right.output


def test_check_family_sees_positions_that_turn_otherwise(tmp_path: Path) -> None:
    file = _written(
        tmp_path / "new.yaml", architectures=["LlamaForCausalLM"], attention={"positions": "rope_interleaved"}
    )
    found = _checked(file, "--class", "LlamaForCausalLM")
    assert found.exit_code == 1
    assert "random elements of its blocks moves the outputs" in found.output


def test_check_family_refuses_what_it_cannot_check(tmp_path: Path) -> None:
    file = _written(tmp_path / "new.yaml", architectures=["NoSuchForCausalLM"])
    for options, message in [
        (("--class", "LlamaModel"), "does not describe LlamaModel"),
        ((), "the installed transformers has none of this name"),
        (("--set", "num_heads"), "is not KEY=VALUE"),
    ]:
        result = _checked(file, *options)
        assert result.exit_code == 2
        assert message in result.output
    (tmp_path / "list.yaml").write_text("- 1\n", "utf-8")
    assert "it is no family file" in _checked(tmp_path / "list.yaml").output


def test_a_text_model_that_nobody_knows_is_named() -> None:
    config = class_of("LlavaForConditionalGeneration").config_class(
        text_config={"model_type": "mamba"}, architectures=["LlavaForConditionalGeneration"]
    )
    with pytest.raises(ArchitectureError, match="text model MambaForCausalLM inside a llava model is not supported"):
        resolve(config, model="m")


def test_every_kind_of_layer_has_a_rope_that_is_known() -> None:
    model = more_model("olmo3")
    model.config.rope_parameters = {"full_attention": {"rope_type": "spiral", "rope_theta": 1e4}}
    with pytest.raises(ArchitectureError, match=r"rope_parameters.rope_type is 'spiral'"):
        resolve(model.config, model="m")
