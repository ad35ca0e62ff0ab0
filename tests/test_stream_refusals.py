"""``residual`` where it would not keep a function, or says two things at once: refused by name before any work."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load, merge_config, merged
from models import logits, relative_deviation, save
from safetensors.torch import save_file
from streams import case

from mergekit_symalign.errors import SymalignError


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A model of a family on disk, written once."""
    folder = tmp_path_factory.mktemp("models")

    def find(family: str, seed: int = 0, **config: Any) -> Path:
        path = folder / "-".join([family, str(seed), *map(str, config.values())])
        return path if path.exists() else save(case(family, seed, **{"num_hidden_layers": 2} | config), path)

    return find


def refused(config: dict[str, Any], out: Path) -> str:
    with pytest.raises(SymalignError) as caught:
        merged(config, out)
    assert not out.exists() or not any(out.iterdir())
    return str(caught.value)


def between(one: Path, other: Path, **parameters: Any) -> dict[str, Any]:
    return merge_config("rotation_match", one, [other], parameters=parameters)


BEHIND = r"normalises behind the block \(.*\)\. Use residual: permutation, which is exact"
RETURNED = "returns the residual stream itself.*Use residual: none, or the class of this model that has a task head"
TIED = r"its head is its embedding.*Use residual: permutation, which is exact"
INEXACT = {
    ("gemma2", "rotation"): BEHIND,
    ("gemma3", "rotation"): BEHIND,
    ("olmo2", "rotation"): BEHIND,
    ("glm4", "rotation"): BEHIND,
    ("bert-classifier", "rotation"): BEHIND,
    ("roberta", "rotation"): BEHIND,
    ("distilbert", "rotation"): BEHIND,
    ("deberta-v3", "rotation"): BEHIND,
    ("modernbert", "rotation"): r"behind the embeddings \(.*\)\. Use residual: permutation, which is exact",
    ("llama-tied", "rotation"): TIED,
    ("gpt2", "rotation"): TIED,
    ("gemma", "rotation"): TIED,
    ("bert", "rotation"): RETURNED,
    ("bert", "permutation"): RETURNED,
    ("deberta-v2", "permutation"): RETURNED,
    ("vit", "permutation"): RETURNED,
}


@pytest.mark.parametrize(("family", "wanted"), INEXACT, ids=lambda x: x)
def test_what_changes_the_function_is_refused_with_what_would_not(
    stored: Callable[..., Path], tmp_path: Path, family: str, wanted: str
) -> None:
    message = refused(between(stored(family), stored(family, 1), residual=wanted), tmp_path / "out")
    assert re.search(rf"residual: {wanted} with .*{INEXACT[family, wanted]}", message), message


def test_mergekit_yaml_says_it_in_one_line(
    stored: Callable[..., Path], mergekit_yaml: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    done = mergekit_yaml(between(stored("gemma2"), stored("gemma2", 1), residual="rotation"), tmp_path / "out")
    assert done.returncode != 0
    assert "Gemma 2" in done.stderr
    assert re.search(BEHIND, " ".join(done.stderr.split())), done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


ROTATE = {"residual": "rotation"}
COMBINED: dict[str, tuple[dict[str, Any], str]] = {
    "a filter": (
        {"residual": [{"filter": "self_attn", "value": "rotation"}, {"value": "none"}]},
        "parameter residual: it is none for .* and rotation for .*, but the residual stream is one for the whole merge",
    ),
    "a gradient": (
        ROTATE | {"residual_rounds": [1, 9]},
        "parameter residual_rounds: .*one for the whole merge.*Give it one value",
    ),
    "no rounds": (ROTATE | {"residual_rounds": 0}, "residual_rounds: it is 0, but it takes at least one round"),
    "another word": ({"residual": "orthogonal"}, "parameter residual .*cannot be 'orthogonal'"),
    "a consensus": (
        ROTATE | {"anchor": "consensus"},
        "aligned towards one anchor, but anchor is consensus: that would take .* around every cycle of models",
    ),
}


@pytest.mark.parametrize("name", COMBINED)
def test_what_does_not_go_together_is_refused(stored: Callable[..., Path], tmp_path: Path, name: str) -> None:
    parameters, wanted = COMBINED[name]
    message = refused(between(stored("llama"), stored("llama", 1), **parameters), tmp_path / "out")
    assert re.search(wanted, message), message


@pytest.mark.parametrize("given", [{"residual": "rotation"}, {"residual": "none"}, {"permutation": False}])
def test_what_holds_for_all_models_is_not_lost_beside_one(
    stored: Callable[..., Path], tmp_path: Path, given: dict[str, Any]
) -> None:
    models = [{"model": stored("llama", 1), "parameters": given}]
    message = refused(merge_config("rotation_match", stored("llama"), models, parameters=ROTATE), tmp_path / "out")
    assert re.search(rf"parameter {next(iter(given))} \(models: .*holds for all models of the merge.*Move it", message)


SIZES: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "width": ("llama", "rotation", {"hidden_size": 96}, "its sizes differ from the anchor .*hidden 96 != 48"),
    "depth": ("llama", "rotation", {"num_hidden_layers": 1}, "it has 1 layers, the anchor .* has 2"),
    "positions": (
        *("gpt2", "permutation", {"n_positions": None, "max_position_embeddings": 32}),
        r"tensor transformer.wpe.weight of model .*: it is 32 x 48, but 128 x 48 in the anchor",
    ),
    "labels": ("vit-classifier", "rotation", {"num_labels": 5}, "it is 5( x 48)?, but 7( x 48)? in the anchor"),
    "token types": ("bert-classifier", "permutation", {"type_vocab_size": 3}, "it is 3 x 48, but 2 x 48 in the anchor"),
}


@pytest.mark.parametrize("name", SIZES)
def test_models_of_other_sizes_are_refused(stored: Callable[..., Path], tmp_path: Path, name: str) -> None:
    family, wanted, config, reason = SIZES[name]
    message = refused(between(stored(family), stored(family, 1, **config), residual=wanted), tmp_path / "out")
    assert re.search(reason, message), message


def sliced(anchor: Path, model: Path, *pairs: tuple[list[int], list[int]], **own: Any) -> dict[str, Any]:
    """Slices of the model alone, beside the anchor's; ``own`` are the model's parameters."""
    config = merge_config("rotation_match", anchor, [])
    del config["models"]
    given: list[tuple[Path, dict[str, Any]]] = [(anchor, {"weight": 0.0}), (model, {"weight": 1.0} | own)]
    return config | {
        "slices": [
            {
                "sources": [
                    {"model": str(m), "layer_range": i, "parameters": p} for (m, p), i in zip(given, pair, strict=True)
                ]
            }
            for pair in pairs
        ]
    }


def test_slices_that_pair_different_layers_are_refused(stored: Callable[..., Path], tmp_path: Path) -> None:
    config = sliced(stored("llama"), stored("llama", 1), ([0, 1], [1, 2]))
    message = refused(config | {"parameters": ROTATE}, tmp_path / "out")
    assert re.search(r"pairs different layers \(model.layers.0.* of .*, model.layers.1.* of .*one for all", message)


@pytest.mark.parametrize("wanted", ["rotation", "permutation"])
def test_slices_may_leave_out_and_repeat_equal_layers(stored: Callable[..., Path], tmp_path: Path, wanted: str) -> None:
    """The output computes what the model does with those layers, also where layers without RoPE change their place."""
    own: dict[str, Any] = {"num_hidden_layers": 3, "no_rope_layers": [1, 0, 1]}
    anchor, model = (stored("smollm3", seed, **own) for seed in (0, 1))
    pairs = [([1, 3], [1, 3]), ([1, 2], [1, 2])]
    parameters = {"residual": wanted, "residual_rounds": 2}
    merged(sliced(anchor, model, *pairs) | {"parameters": parameters}, tmp_path / "out")
    merged(sliced(anchor, model, *pairs, align=False), tmp_path / "plain")
    out, wanted_out = (_loaded("smollm3", tmp_path / name, no_rope_layers=[0, 1, 0]) for name in ("out", "plain"))
    assert relative_deviation(logits(wanted_out), logits(out)) < 1e-3
    a, b = load(tmp_path / "out"), load(tmp_path / "plain")
    assert any(not torch.allclose(x, b[name], atol=1e-2) for name, x in a.items())


def _loaded(family: str, path: Path, **config: Any) -> Any:
    return type(case(family)).from_pretrained(path, dtype=torch.float32, **config).eval()


def test_a_gain_of_zero_beside_a_bias_is_refused(stored: Callable[..., Path], tmp_path: Path) -> None:
    """Only the numbers tell: the bias cannot go into readers that have none."""
    model = tmp_path / "model"
    shutil.copytree(stored("stablelm-unbiased", 1), model)
    state = load(model)
    state["model.layers.1.input_layernorm.weight"][3] = 0
    save_file(state, model / "model.safetensors", {"format": "pt"})
    message = refused(between(stored("stablelm-unbiased"), model, **ROTATE), tmp_path / "out")
    assert re.search("1 of its gains are 0 beside a bias that is not.*Use residual: permutation", message), message
