"""``value_output: general``: any invertible matrix for each KV head, from the orthogonal optimum downhill."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import load, merge_config, merged, squared_distance
from models import logits, make_model, perturbed, relative_deviation, save, with_weights
from safetensors import safe_open
from scipy.optimize import minimize
from torch import Tensor

from mergekit_symalign.alignment_file import AlignmentFile, Origin, save_alignment
from mergekit_symalign.alignments.fit import require_fits
from mergekit_symalign.alignments.numbers import ENTRY
from mergekit_symalign.cli import main
from mergekit_symalign.errors import AlignmentFileError, ConfigError, ShapeError, SymmetryError
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.planting import random_elements, transform
from mergekit_symalign.symmetry.element import BlockElement, rows_by_axis
from mergekit_symalign.symmetry.groups import Chain, HeadMatrix
from mergekit_symalign.symmetry.heads.general import SideGrams, align_general, conditioned
from mergekit_symalign.symmetry.heads.solve import per_query_head
from mergekit_symalign.symmetry.membership import CONDITION, require_symmetry
from mergekit_symalign.symmetry.options import Sides, Symmetries, ValueOutput
from mergekit_symalign.symmetry.solve import solve_block

D = torch.float64
GENERAL = Symmetries(value_output=ValueOutput.general)
State = dict[str, Tensor]


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def _matrices(heads: int, d: int, condition: float, seed: int = 0) -> Tensor:
    """Random matrices [heads, d, d] with this condition number."""
    u, _, vh = torch.linalg.svd(_normal(heads, d, d, seed=seed))
    return (u * condition ** torch.linspace(-0.5, 0.5, d, dtype=D)) @ vh


def _planted(layout: ModelLayout, state: State, condition: float) -> State:
    """The model with random exact elements everywhere, and values under random invertible matrices."""
    elements = random_elements(layout, 3)
    for layer in range(layout.layers):
        shape = layout.head_shape(layer)
        g = HeadMatrix(_matrices(shape.kv_heads, shape.head_dim, condition, layer))
        actions = dict(elements[layer, BlockKind.attention].actions)
        actions["value"] = Chain((actions["value"], g))
        actions["attended"] = Chain((actions["attended"], per_query_head(g.dual(), shape)))
        elements[layer, BlockKind.attention] = BlockElement(actions)
    return transform(state, layout, elements)


def _sides(layout: ModelLayout, anchor: State, model: State, layer: int) -> Sides:
    sides: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for part, spec in layout.block(BlockKind.attention).items():
        name, axes = layout.name(layer, part), layout.axes(spec)
        if name in anchor:
            a, b = rows_by_axis(anchor[name], axes), rows_by_axis(model[name], axes)
            for axis in a.keys() - {"residual"}:
                sides.setdefault(axis, []).append((a[axis], b[axis]))
    return sides


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "cohere2", "gpt-neox", "bert"])
def test_random_invertible_matrices_are_undone(family: str) -> None:
    """With heads in another order and all else planted too; without the parameter the twin stays far away."""
    model = make_model(family, 0)
    layout = resolve(model.config, model="m")
    twin = _planted(layout, model.state_dict(), 20.0)
    assert relative_deviation(logits(model), logits(with_weights(model, twin))) < 1e-9
    sides = _sides(layout, model.state_dict(), twin, 0)
    shape = layout.head_shape(0)
    plain, general = solve_block(sides, shape, Symmetries()), solve_block(sides, shape, GENERAL)
    assert general.facts["distance_after"] < 1e-9 * general.facts["distance_before"]
    assert plain.facts["distance_after"] > 1e-2 * plain.facts["distance_before"]
    assert general.facts["value_condition_max"] < 21
    assert "value_condition_max" not in plain.facts
    require_symmetry(general.element, shape)


@pytest.mark.parametrize("family", ["llama", "gpt-neox"])
@pytest.mark.parametrize("noise", [0.05, 3.0])
def test_never_farther_than_rotations_and_the_function_stays(family: str, noise: float) -> None:
    model = make_model(family, 0)
    layout = resolve(model.config, model="m")
    near = perturbed(model, noise, 1)
    sides = _sides(layout, model.state_dict(), near.state_dict(), 1)
    plain, general = (solve_block(sides, layout.head_shape(1), use) for use in (Symmetries(), GENERAL))
    assert general.facts["distance_after"] < plain.facts["distance_after"]
    told = sum(
        float((a - (general.element.actions[axis](b, 0) if axis in general.element.actions else b)).square().sum())
        for axis, pairs in sides.items()
        for a, b in pairs
    )
    assert general.facts["distance_after"] == pytest.approx(told)
    unchanged = dict.fromkeys(layout.blocks(), BlockElement({}))
    moved = transform(near.state_dict(), layout, unchanged | {(1, BlockKind.attention): general.element})
    assert relative_deviation(logits(near), logits(with_weights(near, moved))) < 1e-9


def test_a_model_that_is_its_anchor_is_left_alone() -> None:
    model = make_model("llama", 0)
    layout = resolve(model.config, model="m")
    found = solve_block(_sides(layout, model.state_dict(), model.state_dict(), 0), layout.head_shape(0), GENERAL)
    assert found.element.actions == {}


def _grams(a: Tensor, b: Tensor) -> SideGrams:
    return SideGrams(a @ b.mT, b @ b.mT, a.square().sum((-2, -1)))


@pytest.mark.parametrize("noise", [0.1, 0.5])
def test_the_descent_ends_where_that_of_an_independent_optimiser_does(noise: float) -> None:
    """scipy's L-BFGS with torch's gradient of the objective as it is written."""
    d, g = 6, _matrices(1, 6, 5.0, 1)
    value, attended = _normal(1, d, 40, seed=2), _normal(1, d, 60, seed=3)
    moved = g @ value + noise * _normal(1, d, 40, seed=4), torch.linalg.inv(g).mT @ attended
    start = torch.eye(d, dtype=D).unsqueeze(0)
    found = align_general(_grams(value, moved[0]), _grams(attended, moved[1]), start)

    def objective(x: object) -> tuple[float, object]:
        matrix = torch.tensor(x, dtype=D).reshape(d, d).requires_grad_()
        f = (matrix @ moved[0] - value).square().sum()
        f = f + (torch.linalg.inv(matrix).mT @ moved[1] - attended).square().sum()
        return float(f.detach()), torch.autograd.grad(f, matrix)[0].flatten().numpy()

    reference = minimize(objective, start.flatten().numpy(), jac=True, method="L-BFGS-B", options={"maxiter": 5000})
    assert found.whole_distance == pytest.approx(reference.fun, rel=1e-3)


@pytest.mark.parametrize("bound", [3.0, 100.0])
def test_the_condition_number_stays_below_its_bound(bound: float) -> None:
    value, attended = _normal(2, 8, 40), _normal(2, 8, 60, seed=1)
    g = _matrices(2, 8, 1e4)
    sides = _grams(value, g @ value), _grams(attended, torch.linalg.inv(g).mT @ attended)
    start = torch.eye(8, dtype=D).repeat(2, 1, 1)
    before = sides[0].distance(start) + sides[1].distance(start)
    found = align_general(*sides, start, condition=bound)
    assert bool((found.condition <= bound).all())
    assert bool((found.condition > bound / 2).all())
    assert bool((found.distance < before).all())
    assert torch.equal(conditioned(start, bound), start)


def test_sides_must_fit_together() -> None:
    one, other = _grams(_normal(2, 8, 40), _normal(2, 8, 40)), _grams(_normal(1, 8, 40), _normal(1, 8, 40))
    with pytest.raises(ShapeError, match="attended"):
        align_general(one, other, _matrices(2, 8, 2.0))
    with pytest.raises(ShapeError, match="start"):
        align_general(one, one, _matrices(2, 6, 2.0))


def _saved(tmp_path: Path, layout: ModelLayout, **actions: HeadMatrix) -> AlignmentFile:
    elements = {f"layer {i} {kind.value}": BlockElement({}) for i, kind in layout.blocks()}
    origin = Origin("a", "m", "0", "1", layout.family.name, {})
    save_alignment(tmp_path / "a.safetensors", origin, elements | {"layer 0 attention": BlockElement(dict(actions))})
    return AlignmentFile.open(tmp_path / "a.safetensors")


def test_alignment_files_hold_general_matrices(tmp_path: Path) -> None:
    layout = resolve(make_model("llama", 0).config, model="m")
    shape = layout.head_shape(0)
    g = HeadMatrix(_matrices(shape.kv_heads, shape.head_dim, 50.0))
    file = _saved(tmp_path, layout, value=g, attended=per_query_head(g.dual(), shape))
    with safe_open(file.path, framework="pt") as stored:
        assert json.loads(stored.metadata()[ENTRY])["format"] == 3
    assert require_fits(file, layout)
    found = file.element("layer 0 attention").actions["value"]
    assert isinstance(found, HeadMatrix)
    assert torch.equal(found.matrix, g.matrix)


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        (_matrices(2, 16, 3 * CONDITION), "condition number above 10000"),
        (torch.zeros(2, 16, 16, dtype=D), "condition number above 10000"),
        (torch.full((2, 16, 16), torch.nan, dtype=D), "not finite"),
        (_matrices(2, 16, 2.0).mT[:, :, :8], "shapes"),
    ],
)
def test_files_with_matrices_that_are_no_symmetry_are_refused(tmp_path: Path, matrix: Tensor, reason: str) -> None:
    layout = resolve(make_model("llama", 0).config, model="m")
    with pytest.raises(AlignmentFileError, match=rf"layer 0 attention, axis value: .*{reason}"):
        require_fits(_saved(tmp_path, layout, value=HeadMatrix(matrix.contiguous())), layout)


def test_what_reads_the_values_must_undo_the_matrix() -> None:
    layout = resolve(make_model("llama", 0).config, model="m")
    shape = layout.head_shape(0)
    g = HeadMatrix(_matrices(shape.kv_heads, shape.head_dim, 50.0))
    whole = {"value": g, "attended": per_query_head(g.dual(), shape)}
    require_symmetry(BlockElement(whole), shape)
    off = replace(g, matrix=g.matrix * 1.00001)
    for wrong in ({"value": off}, {"attended": per_query_head(g, shape)}):
        with pytest.raises(SymmetryError, match="attended: it is not the inverse transpose of value"):
            require_symmetry(BlockElement(whole | wrong), shape)
    with pytest.raises(SymmetryError, match="cannot have a head_matrix"):
        require_symmetry(BlockElement({"key": g}), shape)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """An anchor, a sibling, and the sibling's twin whose values were multiplied by random matrices."""
    folder = tmp_path_factory.mktemp("general")
    anchor = make_model("llama", 0)
    sibling = perturbed(anchor, 0.1, 1)
    twin = with_weights(anchor, _planted(resolve(anchor.config, model="m"), sibling.state_dict(), 20.0))
    models = {"anchor": anchor, "sibling": sibling, "twin": twin}
    return {name: save(model, folder / name) for name, model in models.items()}


def _merge(pair: dict[str, Path], name: str, out: Path, **parameters: object) -> State:
    settings = {"value_output": "general"} | parameters
    return merged(merge_config("rotation_match", pair["anchor"], [pair[name]], parameters=settings), out)


def test_a_merge_undoes_random_matrices_and_its_file_repeats_it(pair: dict[str, Path], tmp_path: Path) -> None:
    saved = tmp_path / "alignments"
    out = _merge(pair, "twin", tmp_path / "out", save_alignment=str(saved))
    reference = _merge(pair, "sibling", tmp_path / "reference")
    anchor = load(pair["anchor"])
    assert squared_distance(anchor, out) == pytest.approx(squared_distance(anchor, reference), rel=5e-3)
    assert squared_distance(anchor, out) <= 1.005 * squared_distance(anchor, load(pair["sibling"]))
    report = json.loads((tmp_path / "out" / "symalign_report.json").read_text("utf-8"))
    blocks = [
        block for model in report["models"].values() for block in model["blocks"] if block["block"] == "attention"
    ]
    assert blocks
    assert all(15 < block["value_condition_max"] < 100 for block in blocks)
    assert report["exact"]
    models = [{"model": pair["twin"], "parameters": {"alignment": str(saved / "twin.safetensors")}}]
    again = merged(merge_config("rotation_match", pair["anchor"], models), tmp_path / "again")
    assert all(torch.equal(x, again[name]) for name, x in out.items())


def test_solve_takes_the_parameters(pair: dict[str, Path], tmp_path: Path) -> None:
    """A bound below what was planted is kept, and told."""
    out = tmp_path / "solved.safetensors"
    options = ["--value-output", "general", "--condition", "5", "--quiet", "-o", str(out)]
    result = CliRunner().invoke(main, ["solve", str(pair["anchor"]), str(pair["twin"]), *options])
    assert result.exit_code == 0, result.output
    file = AlignmentFile.open(out)
    assert file.settings_of("layer 0 attention")["condition"] == 5.0
    found = [facts["value_condition_max"] for block, facts in file.facts.items() if "attention" in block]
    assert all(4 < condition <= 5 for condition in found)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"objective": "activations", "calibration": "default"}, "parameter value_output: .*objective is activations"),
        ({"anchor": "consensus"}, "parameter value_output: .*anchor is consensus"),
        ({"condition": 1.0}, "parameter condition: it is 1.0.*above 1"),
        ({"condition": 1e6}, "parameter condition: it is 1000000.0.*at most 10000"),
        ({"value_output": "any"}, "parameter value_output .*cannot be 'any'"),
    ],
)
def test_what_cannot_be_combined_is_refused(
    pair: dict[str, Path], tmp_path: Path, parameters: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        _merge(pair, "twin", tmp_path / "out", **parameters)
    assert not (tmp_path / "out").exists()
