"""Heads that share latents (MLA): twins recovered, what is no symmetry refused, what no solver knows refused."""

from __future__ import annotations

import copy
import itertools
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from conftest import load, merge_config, merged, squared_distance
from more_models import more_model
from test_more_families import perturbed_copy
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_symalign.cli import main
from mergekit_symalign.errors import ArchitectureError, ConfigError, SymmetryError
from mergekit_symalign.families.function import config_differences
from mergekit_symalign.families.known import _files, families_of
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.graph.solve import block_rows
from mergekit_symalign.planting import random_elements
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import Chain, Permutation, PlaneRotation, Rotation, Scaling
from mergekit_symalign.symmetry.latent.solve import align_latent
from mergekit_symalign.symmetry.membership import require_symmetry
from mergekit_symalign.symmetry.neurons.experts import grouped_assignment
from mergekit_symalign.symmetry.options import LatentShape, MlpShape, Sides, Symmetries, ValueOutput
from mergekit_symalign.symmetry.options import Rotation as Turns
from mergekit_symalign.symmetry.solve import solve_block
from mergekit_symalign.trial.models import outputs, relative_deviation, with_weights

WITH_AND_WITHOUT = ["minicpm3", "deepseek-v3-halves"]  # a latent of the queries
EXACT = 1e-9

State = dict[str, Tensor]


@cache
def model_of(name: str) -> PreTrainedModel:
    return more_model(name)


@cache
def sibling_of(name: str) -> PreTrainedModel:
    return perturbed_copy(model_of(name))


@cache
def layout_of(name: str) -> ModelLayout:
    return resolve(model_of(name).config, model=name)


def shape_of(name: str) -> LatentShape:
    shape = layout_of(name).head_shape(0)
    assert isinstance(shape, LatentShape)
    return shape


def sides_of(name: str, anchor: State, model: State, layer: int = 0) -> Sides:
    layout, kind = layout_of(name), BlockKind.attention
    specs = {layout.name(layer, p): layout.axes(s) for p, s in layout.parts(layer).items() if s.block is kind}
    one, other = (block_rows(kind, tuple(specs.values()), [x[n] for n in specs]) for x in (anchor, model))
    return {axis: list(zip(rows, other[axis], strict=True)) for axis, rows in one.items()}


def moved(name: str, state: State, element: BlockElement, layer: int = 0) -> State:
    """The attention of one layer under an element."""
    layout, kind = layout_of(name), BlockKind.attention
    parts = {layout.name(layer, p): layout.axes(s) for p, s in layout.parts(layer).items() if s.block is kind}
    return {n: element(x, parts[n]) if n in parts else x for n, x in state.items()}


def turned_latents(name: str, state: State, seed: int) -> BlockElement:
    """Random rotations of the latents of layer 0; readers take up the gains, which become random ones."""
    generator = torch.Generator().manual_seed(seed)
    layout, actions = layout_of(name), {}
    for axis, size in shape_of(name).latents().items():
        part = next(p for p, s in layout.inside.items() if s.axes == (f"{axis}_gain",))
        old = state[layout.name(0, part)]
        new = 0.5 + torch.rand(size, generator=generator, dtype=torch.float64)
        q = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q
        actions |= {axis: Rotation(q), f"{axis}_gain": Scaling(new / old)}
        actions |= {f"{axis}_read": Chain((Scaling(old), Rotation(q), Scaling(1 / new)))}
    return BlockElement(actions)


@pytest.mark.parametrize("name", WITH_AND_WITHOUT)
@pytest.mark.parametrize("latents", ["signed permutation", "rotation"])
def test_a_twin_is_recovered(name: str, latents: str) -> None:
    """Of an anchor itself, all of it; of a sibling, as close as the sibling itself can be brought."""
    anchor, sibling = model_of(name).state_dict(), sibling_of(name).state_dict()
    shape, use = shape_of(name), Symmetries()
    element = random_elements(layout_of(name), 3)[0, BlockKind.attention]
    for source in (anchor, sibling):
        twin = moved(name, source, element)
        if latents == "rotation":
            turn = turned_latents(name, twin, 5)
            require_symmetry(turn, shape)
            twin = moved(name, twin, turn)
        before, after = outputs(with_weights(model_of(name), source)), outputs(with_weights(model_of(name), twin))
        assert relative_deviation(before, after) < EXACT
        found = solve_block(sides_of(name, anchor, twin), shape, use)
        require_symmetry(found.element, shape)
        back = moved(name, twin, found.element)
        assert relative_deviation(before, outputs(with_weights(model_of(name), back))) < EXACT
        assert found.facts["distance_after"] == pytest.approx(distance_of_block(name, back), abs=1e-9)
        least = solve_block(sides_of(name, anchor, source), shape, use).facts["distance_after"]
        assert found.facts["distance_after"] <= 1.05 * least + 1e-12  # a rotation brings the anchor's gains along
        assert found.facts["distance_after"] < 0.01 * found.facts["distance_before"]


def distance_of_block(name: str, state: State) -> float:
    """Squared distance of the attention of layer 0 to the anchor's."""
    layout = layout_of(name)
    names = [layout.name(0, p) for p, spec in layout.parts(0).items() if spec.block is BlockKind.attention]
    anchor = model_of(name).state_dict()
    return squared_distance({n: anchor[n] for n in names}, {n: state[n] for n in names})


CHOICES = [
    Symmetries(rotation=Turns.none),
    Symmetries(scaling=False),
    Symmetries(heads=False),
    Symmetries(value_output=ValueOutput.general),
    Symmetries(heads=False, rotation=Turns.none, scaling=False),
]


@pytest.mark.parametrize("use", CHOICES)
def test_what_is_not_admitted_is_not_used(use: Symmetries) -> None:
    name = "minicpm3"
    shape, anchor = shape_of(name), model_of(name).state_dict()
    twin = moved(name, sibling_of(name).state_dict(), random_elements(layout_of(name), 3)[0, BlockKind.attention])
    found = solve_block(sides_of(name, anchor, twin), shape, use)
    require_symmetry(found.element, shape)
    facts = found.facts
    assert facts["distance_after"] <= facts["distance_before"]
    assert use.heads or facts["kv_heads_moved"] == facts["query_heads_moved"] == 0
    if use.rotation is Turns.none:
        assert facts["latents_moved"] == facts["value_angle_max"] == facts["query_angle_max"] == 0
    if not use.scaling and use.value_output is ValueOutput.orthogonal:
        assert facts["scale_min"] == pytest.approx(1) == facts["scale_max"]
    if use == CHOICES[-1]:
        assert found.element.actions == {}
    if use.value_output is ValueOutput.general:
        least = solve_block(sides_of(name, anchor, twin), shape, Symmetries()).facts["distance_after"]
        assert facts["distance_after"] < least


def test_a_model_that_is_its_anchor_stays_bit_for_bit() -> None:
    state = model_of("minicpm3").state_dict()
    assert align_latent(sides_of("minicpm3", state, state), shape_of("minicpm3"), Symmetries()).element.actions
    assert solve_block(sides_of("minicpm3", state, state), shape_of("minicpm3"), Symmetries()).element.actions == {}


def test_heads_are_assigned_as_every_order_compared_would() -> None:
    """The cost of an order is what remains when heads may not move and the model's stand in that order."""
    name = "minicpm3"
    shape = replace(shape_of(name), heads=3)
    generator = torch.Generator().manual_seed(0)
    lengths = {axis: n for axis, n in shape.lengths().items() if not axis.endswith("_gain")}
    sides = {
        axis: [tuple(torch.randn(n, 5, generator=generator, dtype=torch.float64) for _ in range(2))]
        for axis, n in lengths.items()
    }
    sides |= {f"{axis}_gain": [(torch.ones(n, 1), torch.ones(n, 1))] for axis, n in shape.latents().items()}
    still = Symmetries(rotation=Turns.none, scaling=False)
    found = solve_block(sides, shape, still).facts["distance_after"]
    every = []
    for order in itertools.permutations(range(3)):
        index = {
            a: Permutation(_of_heads(order, shape.parts()[a][1]))
            for a in ("value", "attended", "q_nope", "k_nope", "q_pe")
        }
        there = {a: [(x, index[a](y, 0) if a in index else y) for x, y in pairs] for a, pairs in sides.items()}
        every.append(solve_block(there, shape, replace(still, heads=False)).facts["distance_before"])
    assert found == pytest.approx(min(every))
    assert min(every) < every[0]


def _of_heads(order: tuple[int, ...], d: int) -> Tensor:
    return (torch.tensor(order).unsqueeze(1) * d + torch.arange(d)).flatten()


def _element(name: str = "minicpm3") -> tuple[dict[str, Any], LatentShape]:
    return dict(random_elements(layout_of(name), 5)[0, BlockKind.attention].actions), shape_of(name)


def _refused(actions: dict[str, Any], shape: LatentShape, match: str) -> None:
    with pytest.raises(SymmetryError, match=match):
        require_symmetry(BlockElement(actions), shape)


def test_an_axis_changed_alone_is_refused() -> None:
    actions, shape = _element()
    require_symmetry(BlockElement(actions), shape)
    for axis in actions:
        _refused({name: g for name, g in actions.items() if name != axis}, shape, r"^axis \w+: it")
        twice = Chain((actions[axis], actions[axis]))
        _refused(actions | {axis: twice}, shape, r"^axis \w+: it")


def test_planes_are_one_for_all_heads() -> None:
    actions, shape = _element()
    query = actions["q_pe"].steps[-1]
    other = PlaneRotation(query.angle + torch.arange(shape.heads).unsqueeze(1), query.scale)
    _refused(
        actions | {"q_pe": Chain((actions["q_pe"].steps[0], other))},
        shape,
        "k_pe: it is not the inverse transpose of q_pe",
    )


def test_latents_that_are_no_symmetry_are_refused() -> None:
    shape, state = shape_of("minicpm3"), model_of("minicpm3").state_dict()
    signed, turned = dict(_element()[0]), dict(turned_latents("minicpm3", state, 1).actions)
    size = shape.kv_latent
    doubled = Scaling(torch.full((size,), 2.0))
    for axis in ("kv_latent", "kv_latent_read", "kv_latent_gain"):
        _refused(signed | {axis: Chain((signed[axis], doubled))}, shape, r"axis kv_latent\w*: ")
        _refused(turned | {axis: Chain((turned[axis], doubled))}, shape, r"axis kv_latent\w*: ")
    _refused(turned | {"kv_latent_gain": signed["kv_latent_gain"]}, shape, "it moves gains, which a rotation")
    other = turned_latents("minicpm3", state, 2).actions["kv_latent"]
    _refused(turned | {"kv_latent": other}, shape, "kv_latent_read: it is not the one rotation of kv_latent")


def test_experts_stay_in_their_groups() -> None:
    shape = MlpShape(1, experts=4, groups=2)
    for order, allowed in (([1, 0, 3, 2], True), ([3, 2, 0, 1], True), ([0, 2, 1, 3], False)):
        index = Permutation(torch.tensor(order))
        element = BlockElement(dict.fromkeys(("expert", "gate", "up", "down"), index))
        if allowed:
            require_symmetry(element, shape)
        else:
            with pytest.raises(SymmetryError, match="an expert leaves its group"):
                require_symmetry(element, shape)


def test_a_grouped_assignment_is_the_best_of_all() -> None:
    generator = torch.Generator().manual_seed(0)
    inside = [[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]
    every = [
        [x + 3 * a for x in one] + [x + 3 * b for x in other]
        for a, b in ((0, 1), (1, 0))
        for one in inside
        for other in inside
    ]
    for _ in range(5):
        costs = torch.rand(6, 6, generator=generator, dtype=torch.float64)
        found = grouped_assignment(costs - 0.3, lambda i, j, costs=costs: costs[i, j], 2)
        best = min(float(costs[range(6), order].sum()) for order in every)
        assert float(costs[range(6), found].sum()) == pytest.approx(best)


def _saved(tmp: Path) -> Path:
    model_of("minicpm3").float().save_pretrained(tmp / "a")
    model_of("minicpm3").double()
    name = "minicpm3"
    twin = moved(name, sibling_of(name).state_dict(), turned_latents(name, sibling_of(name).state_dict(), 4))
    with_weights(sibling_of(name), twin).float().save_pretrained(tmp / "b")
    return tmp


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An anchor ``a`` and, as ``b``, a sibling with rotated latents."""
    return _saved(tmp_path_factory.mktemp("latent"))


@pytest.mark.parametrize(
    ("parameters", "match"),
    [
        ({"rotation": "full"}, "full is not possible for MiniCPM3"),
        ({"anchor": "consensus"}, "parameter anchor.*share a latent"),
        ({"objective": "activations", "calibration": "prompts.txt"}, "parameter objective.*share a latent"),
    ],
)
def test_what_no_solver_knows_is_refused(models: Path, tmp_path: Path, parameters: dict[str, Any], match: str) -> None:
    config = merge_config(
        "aligned_task_arithmetic", models / "a", [models / "b"], parameters={"weight": 1.0} | parameters
    )
    with pytest.raises(ConfigError, match=match):
        merged(config, tmp_path / "out")
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_optimal_transport_is_refused(models: Path, tmp_path: Path) -> None:
    with pytest.raises(ArchitectureError, match="heads of MiniCPM3 share latents"):
        merged(merge_config("ot_fusion", models / "a", [models / "b"], parameters={"weight": 1.0}), tmp_path / "out")


def test_a_file_of_rotated_latents_belongs_to_its_gains(models: Path, tmp_path: Path) -> None:
    """Solved, applied and undone; a model with other gains is refused, whose readers take up others."""
    run = CliRunner().invoke
    file, aligned, back = (tmp_path / name for name in ("ab.safetensors", "aligned", "back"))
    solved = run(main, ["solve", str(models / "a"), str(models / "b"), "-o", str(file), "--quiet"])
    assert solved.exit_code == 0, solved.output
    for source, out, flags in ((models / "b", aligned, []), (aligned, back, ["--invert"])):
        result = run(main, ["apply", str(file), str(source), "-o", str(out), "--quiet", *flags])
        assert result.exit_code == 0, result.output
        found = with_weights(sibling_of("minicpm3"), {n: x.double() for n, x in _state(out).items()})
        assert relative_deviation(outputs(sibling_of("minicpm3")), outputs(found)) < 1e-4
    gain = "model.layers.0.self_attn.kv_a_layernorm.weight"
    assert torch.allclose(load(aligned)[gain], load(models / "a")[gain]), "latents were rotated"
    other = more_model("minicpm3", seed=9).float()
    other.save_pretrained(tmp_path / "other")
    refused = run(main, ["apply", str(file), str(tmp_path / "other"), "-o", str(tmp_path / "no"), "--invert"])
    assert refused.exit_code != 0
    assert "rotates a latent whose readers take up gains" in refused.output
    assert not (tmp_path / "no").exists()


def _state(path: Path) -> State:
    return type(model_of("minicpm3")).from_pretrained(path, dtype=torch.float32).state_dict()


def test_queries_that_grow_otherwise_with_the_position_are_noticed() -> None:
    one, other = (copy.deepcopy(model_of("mistral4").config) for _ in range(2))
    other.rope_parameters["llama_4_scaling_beta"] = 0.5
    found = config_differences(one, other, layout_of("mistral4"))
    assert found == {"rope_parameters.llama_4_scaling_beta": (one.rope_parameters["llama_4_scaling_beta"], 0.5)}
    assert config_differences(one, one, layout_of("mistral4")) == {}


@pytest.mark.parametrize("name", ["deepseek-v3.2"])
def test_what_else_reads_a_latent_moves_along(name: str) -> None:
    """An indexer chooses tokens by the latent of the queries."""
    anchor = model_of(name).state_dict()
    twin = moved(name, anchor, turned_latents(name, anchor, 3))
    part = "model.layers.0.self_attn.indexer.wq_b.weight"
    before = outputs(model_of(name))
    assert relative_deviation(before, outputs(with_weights(model_of(name), twin))) < EXACT
    left = outputs(with_weights(model_of(name), twin | {part: anchor[part]}))
    assert relative_deviation(before, left) > 1e-3
    found = solve_block(sides_of(name, anchor, twin), shape_of(name), Symmetries())
    back = moved(name, twin, found.element)
    assert found.facts["distance_before"] == pytest.approx(distance_of_block(name, twin))
    assert distance_of_block(name, back) < 1e-12 * found.facts["distance_before"]


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"extends": "llama", "layer": {"x.weight": {"axes": ["k_nope", "residual"]}}},
        "sizes.kv_latent is not given, but.*axis k_nope",
    ),
    ({"sizes": {"value": None}}, "needs nope, rope and value"),
    ({"layer": {"self_attn.kv_a_layernorm.weight": {"axes": ["other"]}}}, "no tensor.*axis kv_latent_gain"),
    ({"layer": {"x.weight": {"axes": ["query", "residual"]}}}, "sizes.kv_latent is given, but.*axis query"),
    ({"attention": {"rotary_factor": ["partial_rotary_factor"]}}, "sizes.kv_latent is given, and such heads"),
]


@pytest.mark.parametrize(("changes", "match"), WRONG)
def test_a_file_that_no_solver_knows_is_refused_when_it_is_loaded(changes: dict[str, Any], match: str) -> None:
    own = {"name": "new", "title": "New", "extends": "minicpm3", "architectures": ["NewForCausalLM"], **changes}
    with pytest.raises(ArchitectureError, match=f"family new: .*{match}"):
        families_of({**{name: _files()[name] for name in ("llama", "minicpm3")}, "new": own})


def test_heads_that_share_a_latent_have_keys_of_their_own() -> None:
    config = copy.deepcopy(model_of("minicpm3").config)
    config.num_key_value_heads = 2
    with pytest.raises(ArchitectureError, match="6 query heads and 2 KV heads"):
        resolve(config, model="m")
