"""Layers that differ: dense and sparse ones in one model, and shared experts, through every method and command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from conftest import State, merge_config, merged, squared_distance
from mergekit.common import ModelReference
from models import save, word_tokenizer
from more_models import family_for, more_model
from streams import in_other_coordinates, stored
from test_activations import prompts
from test_more_families import perturbed_copy
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mergekit_symalign.alignment_file import AlignmentFile, Origin, save_alignment
from mergekit_symalign.cli import main
from mergekit_symalign.errors import AlignmentFileError, ArchitectureError, GeometryError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.families.stream import residual_kind
from mergekit_symalign.graph import readers
from mergekit_symalign.graph.fingerprint import fingerprint_of
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.residual.kinds import Residual
from mergekit_symalign.trial.models import outputs, randomise, relative_deviation, small_model, with_weights

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "glm4-moe": (
        "Glm4MoeForCausalLM",
        {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "use_qk_norm": True, "tie_word_embeddings": False},
    ),
    "qwen3-moe": ("Qwen3MoeForCausalLM", {"mlp_only_layers": [1], "decoder_sparse_step": 1}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", {"mlp_only_layers": [0], "shared_expert_intermediate_size": 40}),
}


@pytest.fixture(autouse=True)
def _tokenizers_as_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    """For some model types transformers puts a class of its own around any tokenizer file, and reads no words."""
    monkeypatch.setattr(readers, "AutoTokenizer", PreTrainedTokenizerFast)


class Twins:
    """An anchor, a sibling, and the sibling in other coordinates, with tokenizers and prompts."""

    def __init__(self, name: str, folder: Path) -> None:
        class_name, settings = MODELS[name]
        self.anchor = randomise(small_model(class_name, family_for(class_name), settings), 0)
        self.layout = resolve(self.anchor.config, model=name)
        self.sibling = perturbed_copy(self.anchor, 0.02)
        planted = transform(self.sibling.state_dict(), self.layout, random_elements(self.layout, 3))
        models = {"anchor": self.anchor, "sibling": self.sibling, "twin": with_weights(self.anchor, planted)}
        self.paths = {key: save(model, folder / key) for key, model in models.items()}
        for path in self.paths.values():
            word_tokenizer(97).save_pretrained(path)
        self.prompts = prompts(folder / "prompts.jsonl")

    def loaded(self, path: Path) -> PreTrainedModel:
        found = type(self.anchor).from_pretrained(path, dtype=torch.float32).state_dict()
        return with_weights(self.anchor, {name: x.double() for name, x in found.items()})

    def require_recovered(self, out: Path, within: float = 1e-4, *, gains: bool = True) -> None:
        """The merge computes what the sibling does, and lies where the sibling lies (but what norms' gains scale)."""
        result, sibling = self.loaded(out), self.sibling.state_dict()
        assert relative_deviation(outputs(self.sibling), outputs(result)) < within
        if not gains:
            return
        far = [n for n, x in result.state_dict().items() if not torch.allclose(x, sibling[n], atol=0.2, rtol=0.2)]
        assert not far


@pytest.fixture(scope="module", params=MODELS)
def twins(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    """With every kind of block: attention, experts, a shared expert, and the MLP of a dense layer."""
    return Twins("glm4-moe", tmp_path_factory.mktemp("mixed"))


def command(*args: Any) -> Result:
    done = CliRunner().invoke(main, [*map(str, args)])
    assert done.exit_code == 0, done.output
    return done


def _match(twins: Twins, out: Path, **parameters: Any) -> State:
    config = merge_config("rotation_match", twins.paths["anchor"], [twins.paths["twin"]], parameters=parameters)
    return merged(config, out)


@pytest.mark.parametrize("objective", ["weights", "activations"])
def test_a_twin_comes_back(twins: Twins, tmp_path: Path, objective: str) -> None:
    more = {"calibration": str(twins.prompts)} if objective == "activations" else {}
    _match(twins, tmp_path, objective=objective, **more)
    twins.require_recovered(tmp_path)


@pytest.mark.parametrize("wanted", ["permutation", "rotation"])
def test_a_moved_stream_comes_back(twins: Twins, tmp_path: Path, wanted: str) -> None:
    state = stored(twins.sibling)
    kind = residual_kind(twins.layout, False, Residual(wanted))
    moved = with_weights(twins.anchor, in_other_coordinates(twins.layout, state, kind, state))
    path = save(moved, tmp_path / "moved")
    parameters = {"residual": wanted, "residual_rounds": 30}
    merged(merge_config("rotation_match", twins.paths["anchor"], [path], parameters=parameters), tmp_path / "out")
    twins.require_recovered(tmp_path / "out", gains=wanted == "permutation")


def test_commands_take_every_kind_of_layer(mixed: Twins, tmp_path: Path) -> None:
    """solve, apply, verify, barrier and inspect; the file has a block for each MLP."""
    anchor, twin = mixed.paths["anchor"], mixed.paths["twin"]
    command("solve", anchor, twin, "-o", tmp_path / "a.safetensors")
    file = AlignmentFile.open(tmp_path / "a.safetensors")
    assert {f"layer {i} {kind.value}" for i, kind in mixed.layout.blocks()} == file.blocks.keys()
    command("apply", tmp_path / "a.safetensors", twin, "-o", tmp_path / "applied")
    mixed.require_recovered(tmp_path / "applied")
    command("verify", twin, tmp_path / "applied", "--prompts", mixed.prompts, "--tokens", 64)
    command("barrier", anchor, twin, "--text", mixed.prompts, "--points", 3, "--plot", tmp_path / "curve.svg")
    command("inspect", anchor, twin, "--plot", tmp_path / "p.png", "--json", tmp_path / "n.json")
    (entry,) = json.loads((tmp_path / "n.json").read_text("utf-8"))["models"].values()
    assert {(b["layer"], b["block"]) for b in entry["blocks"]} == {(i, k.value) for i, k in mixed.layout.blocks()}


def test_a_consensus_of_layers_that_differ(mixed: Twins, tmp_path: Path) -> None:
    """Twins of the same models have the same one."""
    for last in ("twin", "sibling"):
        listed = [mixed.paths["anchor"], mixed.paths[last]]
        parameters = {"weight": 1, "anchor": "consensus"}
        merged(merge_config("aligned_linear", listed[0], listed, parameters=parameters), tmp_path / last)
    of_twin, of_sibling = (outputs(mixed.loaded(tmp_path / last)) for last in ("twin", "sibling"))
    assert relative_deviation(of_twin, of_sibling) < 1e-4


def test_learning_goes_through_layers_that_differ(mixed: Twins, tmp_path: Path) -> None:
    out = tmp_path / "learned.safetensors"
    options = ["--data", mixed.prompts, "-o", out, "--steps", 2, "--batch-size", 2, "--sequence-length", 16]
    command("learn", mixed.paths["anchor"], mixed.paths["twin"], *options)
    command("apply", out, mixed.paths["twin"], "-o", tmp_path / "applied", "--anchor", mixed.paths["anchor"])
    assert relative_deviation(outputs(mixed.sibling), outputs(mixed.loaded(tmp_path / "applied"))) < 1e-4


@pytest.mark.parametrize("method", ["regmean", "fisher", "aligned_regmean"])
def test_statistics_of_layers_that_differ(mixed: Twins, tmp_path: Path, method: str) -> None:
    listed = []
    for name in ("anchor", "twin" if method.startswith("aligned") else "sibling"):
        file = tmp_path / f"{name}.safetensors"
        more = ["--fisher", "empirical"] if method == "fisher" else []
        command("measure", mixed.paths[name], "-o", file, "--calibration", mixed.prompts, "--tokens", 128, *more)
        listed.append({"model": mixed.paths[name], "parameters": {"statistics": str(file)}})
    base = mixed.paths["anchor"] if method.startswith("aligned") else None
    merged(merge_config(method, base, listed), tmp_path / "out")
    anchor, sibling = (dict(model.state_dict()) for model in (mixed.anchor, mixed.sibling))
    found = dict(mixed.loaded(tmp_path / "out").state_dict())
    assert squared_distance(anchor, found) < squared_distance(anchor, sibling)


@pytest.mark.parametrize(("name", "reason"), [("glm4-moe", "has experts"), ("lfm2", "not one attention and one MLP")])
def test_transport_is_refused(tmp_path: Path, name: str, reason: str) -> None:
    path = save(more_model(name), tmp_path / "m")
    config = merge_config("ot_fusion", path, [save(more_model(name, 1), tmp_path / "n")])
    with pytest.raises(ArchitectureError, match=reason):
        merged(config, tmp_path / "out")


def test_a_size_for_each_layer_is_refused() -> None:
    config = more_model("hunyuan-moe").config
    config.__dict__["num_experts"] = [4, 8]  # as old checkpoints have it
    with pytest.raises(ArchitectureError, match=r"config.num_experts differs between layers: \[4, 8\]"):
        resolve(config, model="m")


def test_slices_of_layers_of_another_kind_are_refused(mixed: Twins, tmp_path: Path) -> None:
    anchor, twin = (str(mixed.paths[name]) for name in ("anchor", "twin"))
    config = {"merge_method": "rotation_match", "base_model": anchor, "dtype": "float32"}
    pairs = [((0, 1), (1, 2)), ((1, 2), (0, 1))]
    slices = [
        {"sources": [{"model": anchor, "layer_range": list(a)}, {"model": twin, "layer_range": list(b)}]}
        for a, b in pairs
    ]
    with pytest.raises(GeometryError, match="layers of different kinds: only one of them has mlp"):
        merged(config | {"slices": slices}, tmp_path)
    swapped = [{"sources": [{"model": m, "layer_range": [i, i + 1]} for m in (anchor, twin)]} for i in (1, 0)]
    with pytest.raises(GeometryError, match=r"of the output, by the config of .*, are layers of different kinds"):
        merged(config | {"slices": swapped}, tmp_path)


def test_models_whose_layers_differ_are_refused(tmp_path: Path) -> None:
    """In kinds of layers, or in biases that MergeKit's file does not list."""
    for class_name, one, other, message in (
        ("Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}, {"mlp_only_layers": [1]}, "of other kinds than those of"),
        (
            "LlamaForCausalLM",
            {"attention_bias": True},
            {"attention_bias": False},
            "differ from the anchor .* in self_attn",
        ),
    ):
        paths = [tmp_path / f"{class_name}{i}" for i in range(2)]
        for path, settings in zip(paths, (one, other), strict=True):
            save(small_model(class_name, family_for(class_name), settings), path)
        for anchor, model in (paths, reversed(paths)):
            with pytest.raises(GeometryError, match=message):
                merged(merge_config("rotation_match", anchor, [model]), tmp_path / "out")


def test_a_file_without_a_block_is_refused(mixed: Twins, tmp_path: Path) -> None:
    """Older versions let shared experts and dense layers pass."""
    elements = {f"layer {i} {k.value}": BlockElement({}) for i, k in mixed.layout.blocks() if k is not BlockKind.shared}
    names = [str(mixed.paths[name]) for name in ("anchor", "twin")]
    prints = [fingerprint_of(ModelReference.model_validate(name)) for name in names]
    origin = Origin(*names, *prints, mixed.layout.family.name, {})
    save_alignment(tmp_path / "old.safetensors", origin, elements)
    parameters = {"alignment": str(tmp_path / "old.safetensors")}
    listed = [{"model": mixed.paths["twin"], "parameters": parameters}]
    with pytest.raises(AlignmentFileError, match="it has nothing for layer 1 shared"):
        merged(merge_config("rotation_match", mixed.paths["anchor"], listed), tmp_path / "out")
