"""Heads that differ: with sinks, locked by a bias of positions, behind a gate, with normalised values."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from attention import (
    attention,
    moved,
    noisy,
    planted,
    random_rows,
    random_tokens,
    require_kept,
    require_twins_back,
    seen_on,
    sides_of,
)
from conftest import load, merge_config, merged
from more_models import more_model
from test_still_coordinates import SHAPES as STILL

from mergekit_symalign.errors import ArchitectureError, ConfigError, SymmetryError
from mergekit_symalign.families.known import _files, classes_in, families_of
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.schema import BlockKind, Family
from mergekit_symalign.graph.models import check_possible
from mergekit_symalign.learning.elements import learned_block
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry.by_activations.attention import align_attention_by
from mergekit_symalign.symmetry.consensus import find_consensus
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import HeadRotation, Permutation, Scaling
from mergekit_symalign.symmetry.heads.order import moved_axes
from mergekit_symalign.symmetry.membership import require_symmetry
from mergekit_symalign.symmetry.options import GainScope, HeadShape, HeadValues, Rotation, Symmetries, ValueOutput
from mergekit_symalign.symmetry.solve import align_block, solve_block, without_identities
from mergekit_symalign.trial.checks import problems
from mergekit_symalign.trial.models import randomise, small_model, with_weights

PLAIN = HeadShape(6, 2, 8, 8)
SHAPES = {
    "sinks": replace(PLAIN, numbered=True),
    "sinks, one head each": HeadShape(4, 4, 8, 0, numbered=True),
    "locked": HeadShape(4, 4, 8, 0, locked=True),
    "locked groups": HeadShape(6, 2, 8, 0, locked=True),
    "gate": replace(PLAIN, values=HeadValues.gated),
    "gate, odd, one head each": HeadShape(4, 4, 7, 4, values=HeadValues.gated),
    "gate and QK-norm": HeadShape(6, 2, 8, 4, norm=GainScope.head, values=HeadValues.gated),
    "gate, no RoPE, sinks": HeadShape(4, 2, 6, 0, values=HeadValues.gated, numbered=True),
    "values normed": replace(PLAIN, norm=GainScope.head, values=HeadValues.normed),
    "values normed, partial RoPE": HeadShape(4, 2, 8, 4, norm=GainScope.head, values=HeadValues.normed),
    "keys are values": HeadShape(6, 2, 8, 8, norm=GainScope.head, values=HeadValues.keys),
    "keys are values, partial RoPE": HeadShape(4, 2, 9, 4, norm=GainScope.head, values=HeadValues.keys),
    "keys are values, own gains": HeadShape(4, 2, 7, 2, norm=GainScope.all, values=HeadValues.keys),
}


@pytest.mark.parametrize("name", SHAPES)
def test_what_is_planted_keeps_the_function_and_is_admitted(name: str) -> None:
    shape = SHAPES[name]
    rows, x = random_rows(shape, 0), random_tokens()
    before = attention(rows, shape, x)
    for seed in range(4):
        element = planted(shape, seed)
        require_kept(element, shape)
        for axis in element.actions:
            left = BlockElement({k: g for k, g in element.actions.items() if k != axis})
            assert (attention(moved(rows, left), shape, x) - before).abs().max() > 1e-3 * before.std(), axis
            with pytest.raises(SymmetryError):
                require_symmetry(left, shape)


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("name", SHAPES)
def test_a_planted_twin_comes_back(name: str, noise: float) -> None:
    require_twins_back(SHAPES[name], noise)


@pytest.mark.parametrize("name", SHAPES)
def test_by_activations_too(name: str) -> None:
    shape = SHAPES[name]
    anchor = random_rows(shape, 0)
    sibling = noisy(anchor, 0.02)
    twin = moved(sibling, planted(shape, 3))
    x = random_tokens(200).mT
    seen = seen_on(x, anchor, twin, shape)
    found = align_attention_by(seen, sides_of(anchor, twin), shape, Symmetries()).element
    require_symmetry(found, shape)
    back = moved(twin, found)
    for axis, rows in sibling.items():
        assert (back[axis] - rows).abs().max() < 0.25 * rows.abs().max(), axis


@pytest.mark.parametrize("name", SHAPES)
def test_siblings_stay(name: str) -> None:
    shape = SHAPES[name]
    anchor = random_rows(shape, 0)
    found = solve_block(sides_of(anchor, noisy(anchor, 0.05)), shape, Symmetries(rotation=Rotation.none, scaling=False))
    assert found.element.actions == {}


@pytest.mark.parametrize("name", SHAPES)
def test_a_learned_element_starts_where_it_was_found(name: str) -> None:
    shape = SHAPES[name]
    rows, element = random_rows(shape, 0), planted(shape, 2)
    learned = learned_block(element, shape, Symmetries(), orders=True)
    composed = learned.composed({key: leaf.start for key, leaf in learned.leaves().items()})
    require_symmetry(composed, shape)
    for axis, x in moved(rows, element).items():
        torch.testing.assert_close(moved(rows, composed)[axis], x)


def test_sinks_follow_their_heads() -> None:
    shape = SHAPES["sinks"]
    order = torch.tensor([1, 0, 2, 3, 4, 5])
    coordinates = Permutation((order.unsqueeze(1) * 8 + torch.arange(8)).flatten())
    heads = {"query": coordinates, "attended": coordinates}
    require_symmetry(BlockElement(heads | {"query_head": Permutation(order)}), shape)
    with pytest.raises(SymmetryError, match="numbers are not in the order of the queries"):
        require_symmetry(BlockElement(dict(heads)), shape)
    with pytest.raises(SymmetryError, match="no such axis"):
        require_symmetry(BlockElement(heads | {"query_head": Permutation(order)}), PLAIN)


@pytest.mark.parametrize("name", ["locked", "locked groups"])
def test_locked_heads_stay(name: str) -> None:
    """Also where another order would be nearer, and in files."""
    shape = SHAPES[name]
    anchor = random_rows(shape, 0)
    free = replace(shape, locked=False)
    swapped = moved(anchor, planted(free, 1, Planted(rotation=False, scaling=False)))
    found = solve_block(sides_of(anchor, swapped), shape, Symmetries()).element
    require_symmetry(found, shape)
    assert solve_block(sides_of(anchor, swapped), free, Symmetries()).facts["distance_after"] < 1e-9
    for axis in moved_axes(shape):
        assert not isinstance(found.actions.get(axis), Permutation)
    with pytest.raises(SymmetryError, match="each of which has its own position bias"):
        require_symmetry(planted(free, 1), shape)
    learned = learned_block(found, shape, Symmetries(), orders=True)
    assert not any(key.endswith("scores") for key in learned.leaves())


@pytest.mark.parametrize("scaling", [True, False])
@pytest.mark.parametrize("rotation", [Rotation.exact, Rotation.none])
def test_the_optimum_behind_a_gate(scaling: bool, rotation: Rotation) -> None:
    """Of unrelated heads: no order of the coordinates with its best factors is nearer."""
    shape = HeadShape(2, 1, 4, 4, values=HeadValues.gated)
    anchor, model = random_rows(shape, 0), random_rows(shape, 1)
    use = Symmetries(heads=False, rotation=rotation, scaling=scaling)
    found = solve_block(sides_of(anchor, model), shape, use).element
    axes = ("value", "attended", "attended_gate")
    back = moved(model, found)
    reached = sum(float((anchor[axis] - back[axis]).square().sum()) for axis in axes)
    orders = list(permutations(range(4))) if rotation is Rotation.exact else [(0, 1, 2, 3)]
    assert reached == pytest.approx(min(_by_order(anchor, model, order, use) for order in orders), rel=1e-6)


def _by_order(anchor: dict, model: dict, order: tuple[int, ...], use: Symmetries) -> float:
    heads = {axis: [x.unflatten(0, (-1, 4)) for x in (anchor[axis], model[axis])] for axis in anchor}
    signed = use.rotation is Rotation.exact
    t = torch.linspace(-2, 2, 200001, dtype=torch.float64).exp() if use.scaling else torch.ones(1, dtype=torch.float64)
    c = torch.cat((t, -t)) if signed else t
    total = 0.0
    for i, j in enumerate(order):
        (v_a, v_b), (o_a, o_b), (g_a, g_b) = (
            (a[:, i], b[:, j]) for a, b in (heads[axis] for axis in ("value", "attended", "attended_gate"))
        )
        of_factor = (
            c.square() * v_b.square().sum()
            + o_b.square().sum() / c.square()
            - 2 * (c * (v_a * v_b).sum() + (o_a * o_b).sum() / c)
        )
        total += float(of_factor.min() + v_a.square().sum() + o_a.square().sum() + (g_a - g_b).square().sum())
    return total


def test_what_is_no_symmetry_of_values_is_refused() -> None:
    gated, normed, turned = SHAPES["gate"], SHAPES["values normed"], torch.eye(8, dtype=torch.float64)
    rotation = HeadRotation(turned.flip(0).repeat(2, 1, 1), torch.ones(2, dtype=torch.float64))
    of_queries = HeadRotation(turned.flip(0).repeat(6, 1, 1), torch.ones(6, dtype=torch.float64))
    both = BlockElement({"value": rotation, "attended": of_queries})
    require_symmetry(both, PLAIN)
    require_symmetry(both, normed)
    with pytest.raises(SymmetryError, match="cannot have a head_rotation"):
        require_symmetry(both, gated)
    scaled = BlockElement(
        {
            "value": replace(rotation, scale=rotation.scale * 2),
            "attended": replace(of_queries, scale=of_queries.scale / 2),
        }
    )
    require_symmetry(scaled, PLAIN)
    with pytest.raises(SymmetryError, match="values are normalised"):
        require_symmetry(scaled, normed)
    one = torch.ones(16, dtype=torch.float64).index_fill(0, torch.tensor([3]), -2.0)
    factors = BlockElement(
        {"value": Scaling(one), "attended": Scaling(1 / one.reshape(2, 8).repeat_interleave(3, 0).flatten())}
    )
    require_symmetry(factors, gated)
    with pytest.raises(SymmetryError, match="cannot have a scaling"):
        require_symmetry(factors, PLAIN)


@pytest.mark.parametrize("name", ["gate", "values normed"])
def test_a_general_matrix_is_never_taken(name: str) -> None:
    shape = SHAPES[name]
    anchor, model = random_rows(shape, 0), random_rows(shape, 1)
    found = solve_block(sides_of(anchor, model), shape, Symmetries(value_output=ValueOutput.general)).element
    require_symmetry(found, shape)


GEMMA4 = {
    "layer_types": ["full_attention"] * 2,
    "global_head_dim": 8,
    "num_global_key_value_heads": 2,
    "hidden_size_per_layer_input": 0,
    "num_kv_shared_layers": 0,
    "attention_k_eq_v": False,
    "enable_moe_block": False,
    "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
}
# Attentions of classes whose layers differ, in models whose layers are alike.
FILES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "query and gate in one tensor": (
        "Qwen3NextForCausalLM",
        {"layer_types": ["full_attention"] * 2, "mlp_only_layers": [0, 1], "partial_rotary_factor": 0.5},
        {
            "extends": "qwen3",
            "attention": {"rotary_factor": ["rope_parameters.partial_rotary_factor", "partial_rotary_factor"]},
            "variants": {"rope_parameters.partial_rotary_factor": None, "partial_rotary_factor": None},
            "tensors": {"norm.weight": {"axes": ["residual"], "offset": 1, "read_by": ["lm_head.weight"]}},
            "layer": {
                "self_attn.q_proj.weight": {"axes": [["query", "attended_gate"], "residual"], "fused_per_head": True},
                "self_attn.q_norm.weight": {"axes": ["query_gain"], "offset": 1},
                "self_attn.k_norm.weight": {"axes": ["key_gain"], "offset": 1},
                "input_layernorm.weight": {"axes": ["residual"], "offset": 1},
                "post_attention_layernorm.weight": {"axes": ["residual"], "offset": 1},
            },
        },
    ),
    "gate beside, layers without RoPE": (
        "AfmoeForCausalLM",
        {"num_dense_layers": 2, "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8},
        {
            "extends": "qwen3",
            "attention": {"without_rope": {"key": "layer_types", "value": "full_attention"}},
            "layer": {
                "self_attn.gate_proj.weight": {"axes": ["attended_gate", "residual"]},
                "pre_mlp_layernorm.weight": {"axes": ["residual"]},
                "post_mlp_layernorm.weight": {"axes": ["residual"]},
            },
        },
    ),
    "keys that are values": (
        "Gemma4ForCausalLM",
        GEMMA4 | {"attention_k_eq_v": True},
        {
            "extends": "qwen3",
            "attention": {"value_norm": True},
            "layer": {
                "self_attn.v_proj.weight": None,
                "self_attn.v_proj.bias": None,
                "layer_scalar": {"axes": ["other"]},
                "input_layernorm.weight": {"axes": ["residual"], "read_by": ["self_attn.q_proj.weight"]},
                "pre_feedforward_layernorm.weight": {"axes": ["residual"]},
                "post_feedforward_layernorm.weight": {"axes": ["residual"]},
            },
        },
    ),
    "normalised values": (
        "Gemma4ForCausalLM",
        GEMMA4,
        {
            "extends": "qwen3",
            "attention": {"value_norm": True},
            "layer": {
                "layer_scalar": {"axes": ["other"]},
                "pre_feedforward_layernorm.weight": {"axes": ["residual"]},
                "post_feedforward_layernorm.weight": {"axes": ["residual"]},
            },
        },
    ),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_may_describe_such_attentions(name: str, tmp_path: Path) -> None:
    class_name, settings, text = FILES[name]
    raw = {"name": "own", "title": "own", "architectures": [class_name], "stream": {"returned": True}} | text
    (tmp_path / "own.yaml").write_text(yaml.safe_dump(raw), "utf-8")
    family = classes_in(tmp_path / "own.yaml")[class_name]
    assert isinstance(family, Family)
    model = randomise(small_model(class_name, family, settings), 0)
    layout = resolve(model.config, model=name, family=family)
    assert layout.head_shape(0).values is not HeadValues.free
    assert problems(model, layout) == []


def test_a_general_matrix_is_refused_in_a_merge() -> None:
    class_name, settings, text = FILES["normalised values"]
    raw = {"name": "own", "title": "Own", "architectures": [class_name]} | text
    family = families_of({**{k: v for k, v in _files().items() if "passes_through" not in v}, "own": raw})["own"]
    layout = resolve(small_model(class_name, family, settings).config, model="m", family=family)
    with pytest.raises(ConfigError, match="general is not exact for Own: its values are normalised"):
        check_possible(Symmetries(value_output=ValueOutput.general), BlockKind.attention, layout)
    check_possible(Symmetries(), BlockKind.attention, layout)


@pytest.mark.parametrize("name", ["bloom", "granite-swa"])
def test_transport_that_mixes_heads_is_refused(name: str, tmp_path: Path) -> None:
    """With heads as wholes a permuted twin comes back, its sinks too."""
    anchor = more_model(name)
    layout = resolve(anchor.config, model=name)
    elements = random_elements(layout, 3, Planted(rotation=False, scaling=False))
    twin = with_weights(anchor, transform(anchor.state_dict(), layout, elements))
    for model, path in ((anchor, "a"), (twin, "b")):
        with_weights(model, model.state_dict()).float().save_pretrained(tmp_path / path)
    paths = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ArchitectureError, match="have sinks, gates or position biases of their own"):
        merged(merge_config("ot_fusion", paths[0], paths, parameters={"heads": "ignore"}), tmp_path / "out")
    out = merged(merge_config("ot_fusion", paths[0], paths, parameters={"heads": "respect"}), tmp_path / "out")
    for stored, x in load(paths[0]).items():
        assert (out[stored] - x).abs().max() < 1e-4 * x.abs().max(), stored


@pytest.mark.parametrize("name", ["sinks", "gate and QK-norm", "keys are values", "odd rest", "less the mean"])
def test_a_consensus_is_a_symmetry(name: str) -> None:
    shape = {**SHAPES, **STILL}[name]
    base = random_rows(shape, 0)
    models = [{axis: [x] for axis, x in moved(noisy(base, 0.1, i), planted(shape, i)).items()} for i in range(2)]
    found = find_consensus(models, lambda sides: align_block(sides, shape, Symmetries()).element, rounds=1)
    assert found.spread[-1] <= found.spread[0]
    for element in found.elements:
        require_symmetry(without_identities(element), shape)
