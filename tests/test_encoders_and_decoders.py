"""Models of an encoder and a decoder: three blocks in each of the decoder's layers, and what they cannot have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from conftest import merge_config, merged
from more_models import more_model
from test_more_families import Twins

from mergekit_symalign.alignment_file import AlignmentFile
from mergekit_symalign.cli import main
from mergekit_symalign.errors import ArchitectureError, ParameterError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.families.towers import TowerLayer
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.symmetry.groups import Permutation
from mergekit_symalign.symmetry.membership import steps_of
from mergekit_symalign.trial.models import outputs, relative_deviation, with_weights


@pytest.fixture(scope="module")
def twins(tmp_path_factory: pytest.TempPathFactory) -> Twins:
    return Twins("flan-t5", tmp_path_factory.mktemp("twins"))


def test_a_decoder_has_three_blocks_in_each_layer_and_an_encoder_two(twins: Twins, tmp_path: Path) -> None:
    args = ("solve", *map(str, twins.paths), "-o", str(tmp_path / "a.safetensors"))
    result = CliRunner().invoke(main, args)
    assert result.exit_code == 0, result.output
    found = AlignmentFile.open(tmp_path / "a.safetensors").blocks.keys()
    decoder = {f"layer {i} {kind}" for i in range(2) for kind in ("attention", "cross", "mlp")}
    assert set(found) == decoder | {f"encoder layer {i} {kind}" for i in range(2) for kind in ("attention", "mlp")}


def test_heads_with_a_bias_of_their_own_stay_and_those_of_cross_attention_move() -> None:
    model = more_model("flan-t5")
    elements = random_elements(resolve(model.config, model="m"), 1)
    moved = {
        (layer, kind)
        for (layer, kind), element in elements.items()
        if any(isinstance(step, Permutation) for step in steps_of(element.actions.get("query")))
    }
    assert moved == {(i, BlockKind.cross) for i in range(2)}
    assert (TowerLayer("encoder", 0), BlockKind.attention) in elements


@pytest.mark.parametrize("name", ["bart", "whisper"])
def test_each_block_counts(name: str) -> None:
    """The cross attention is a block by itself: moved without its keys it computes something else."""
    model = more_model(name)
    layout = resolve(model.config, model=name)
    state = model.state_dict()
    twin = transform(state, layout, random_elements(layout, 1))
    assert relative_deviation(outputs(model), outputs(with_weights(model, twin))) < 1e-9
    part = "model.decoder.layers.1.encoder_attn.k_proj.weight"
    assert relative_deviation(outputs(model), outputs(with_weights(model, twin | {part: state[part]}))) > 1e-3


REFUSED: list[tuple[str, dict[str, Any], type[Exception], str]] = [
    ("rotation_match", {"residual": "permutation"}, ParameterError, "share the coordinates of their residual streams"),
    ("rotation_match", {"objective": "activations"}, ArchitectureError, "several stacks of layers with inputs of"),
    ("ot_fusion", {}, ArchitectureError, "several stacks of layers with inputs of their own"),
    ("regmean", {}, ArchitectureError, "several stacks of layers with inputs of their own"),
]


@pytest.mark.parametrize(("method", "parameters", "error", "message"), REFUSED)
def test_what_prompts_would_need_is_refused(
    twins: Twins, tmp_path: Path, method: str, parameters: dict[str, Any], error: type[Exception], message: str
) -> None:
    config = merge_config(method, twins.paths[0], [*twins.paths], parameters=parameters)
    with pytest.raises(error, match=message):
        merged(config, tmp_path / "out")
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_measure_refuses_them(twins: Twins, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("one\ntwo\n", "utf-8")
    options = ("--calibration", str(tmp_path / "prompts.txt"), "-o", str(tmp_path / "s.safetensors"))
    result = CliRunner().invoke(main, ["measure", str(twins.paths[0]), *options])
    assert result.exit_code != 0
    assert "several stacks of layers" in result.output
