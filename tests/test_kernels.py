"""What Python users may call: examples in docstrings run, and what does not fit together is refused by name."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import mergekit_symalign.symmetry
from mergekit_symalign.errors import ShapeError, ValueInTensorError
from mergekit_symalign.symmetry.assignment.linear import best_assignment, identity_is_optimal, lazy_assignment
from mergekit_symalign.symmetry.assignment.shortlist import Scores
from mergekit_symalign.symmetry.by_activations.attention import align_attention_by
from mergekit_symalign.symmetry.by_activations.covariance import Covariance
from mergekit_symalign.symmetry.by_activations.experts import Routing, align_experts_by
from mergekit_symalign.symmetry.by_activations.neurons import align_mlp_by
from mergekit_symalign.symmetry.consensus import find_consensus
from mergekit_symalign.symmetry.fitting import Values
from mergekit_symalign.symmetry.heads.moments import Moments, moments
from mergekit_symalign.symmetry.heads.pairs import GroupMoments, PlaneMoments
from mergekit_symalign.symmetry.heads.procrustes import align_gains, align_heads, align_planes, align_signs
from mergekit_symalign.symmetry.neurons.costs import NeuronPairs
from mergekit_symalign.symmetry.options import (
    BlockShape,
    GainScope,
    HeadShape,
    MlpShape,
    NeuronScale,
    Sides,
    Symmetries,
)
from mergekit_symalign.symmetry.solve import solve_block, solve_consensus

PACKAGE = "mergekit_symalign.symmetry"
MODULES = [PACKAGE, *(m.name for m in pkgutil.walk_packages(mergekit_symalign.symmetry.__path__, f"{PACKAGE}."))]
SOLVERS = {
    "solve.solve_block",
    "blocks.align_attention",
    "blocks.align_mlp",
    "neurons.match.align_neurons",
    "assignment.linear.best_assignment",
    "assignment.linear.lazy_assignment",
    "assignment.shortlist.shortlist_assignment",
    "heads.procrustes.align_heads",
    "heads.procrustes.align_planes",
    "consensus.find_consensus",
    "by_activations.attention.align_attention_by",
    "by_activations.neurons.align_mlp_by",
    "by_activations.experts.align_experts_by",
}
HEADS = HeadShape(query_heads=4, kv_heads=2, head_dim=4, rotary=4)
MLP = MlpShape(5)
USE = Symmetries()


def _examples(module: str) -> list[doctest.DocTest]:
    return [test for test in doctest.DocTestFinder().find(importlib.import_module(module)) if test.examples]


@pytest.mark.parametrize("module", [name for name in MODULES if _examples(name)])
def test_examples_in_docstrings_run(module: str) -> None:
    assert doctest.testmod(importlib.import_module(module)).failed == 0


def test_every_public_solver_has_an_example() -> None:
    shown = {test.name.removeprefix(f"{PACKAGE}.") for name in MODULES for test in _examples(name)}
    assert shown >= SOLVERS


def _rows(shape: BlockShape, *, dtype: torch.dtype = torch.float32) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Rows of a block of two random models."""
    generator = torch.Generator().manual_seed(0)
    if isinstance(shape, MlpShape):
        lengths = dict.fromkeys(("gate", "up", "down"), shape.neurons * shape.experts)
        lengths |= {"expert": shape.experts} if shape.experts > 1 else {}
    else:
        lengths = {axis: shape.heads(axis) * shape.head_dim for axis in ("query", "key", "value", "attended")}
    both = {axis: torch.randn(2, n, 12, generator=generator).to(dtype) for axis, n in lengths.items()}
    return {axis: [(x[0], x[1])] for axis, x in both.items()}


BLOCKS: list[BlockShape] = [HEADS, MLP, MlpShape(5, experts=2)]


@pytest.mark.parametrize("shape", BLOCKS, ids=["attention", "mlp", "experts"])
@pytest.mark.parametrize("values", Values)
def test_a_block_that_fits_is_solved(shape: BlockShape, values: Values) -> None:
    solved = solve_block(_rows(shape), shape, USE, values=values)
    assert solved.facts["distance_after"] <= solved.facts["distance_before"] + 1e-9


def _with(sides: Sides, axis: str, change: Callable[[Tensor], Tensor], *, both: bool) -> Sides:
    (anchor, model), *rest = sides[axis]
    return {**sides, axis: [(change(anchor) if both else anchor, change(model)), *rest]}


@pytest.mark.parametrize("shape", BLOCKS, ids=["attention", "mlp", "experts"])
@pytest.mark.parametrize("both", [True, False], ids=["of both", "of the model"])
@pytest.mark.parametrize("change", [lambda x: x[:-1], lambda x: x[:, :, None], lambda x: x[0]])
def test_rows_that_do_not_fit_are_refused_by_their_axis(
    shape: BlockShape, both: bool, change: Callable[[Tensor], Tensor]
) -> None:
    sides = _rows(shape)
    for axis in sides:
        with pytest.raises(ShapeError, match=f"^axis {axis}: "):
            solve_block(_with(sides, axis, change, both=both), shape, USE)


def test_another_width_of_one_model_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"^axis up: the anchor's rows are \[5, 12\], the model's \[5, 11\]"):
        solve_block(_with(_rows(MLP), "up", lambda x: x[:, 1:], both=False), MLP, USE)


@pytest.mark.parametrize("shape", BLOCKS, ids=["attention", "mlp", "experts"])
def test_missing_and_unknown_axes_are_refused(shape: BlockShape) -> None:
    sides = _rows(shape)
    for axis in sides:
        for less in ({k: v for k, v in sides.items() if k != axis}, {**sides, axis: []}):
            with pytest.raises(ShapeError, match=f"^axis {axis}: it has no rows"):
                solve_block(less, shape, USE)
    with pytest.raises(ShapeError, match=r"^axis gates: "):
        solve_block({**sides, "gates": next(iter(sides.values()))}, shape, USE)


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        (replace(HEADS, kv_heads=3), "4 query heads cannot share 3 KV heads"),
        (replace(HEADS, kv_heads=0), "kv_heads is 0"),
        (replace(HEADS, rotary=3), "3 of 4 coordinates"),
        (replace(HEADS, rotary=6), "6 of 4 coordinates"),
        (replace(HEADS, norm=GainScope.head), "axis query_gain"),
        (replace(MLP, neurons=0), "neurons is 0"),
        (replace(MLP, gated=False), "axis gate"),
    ],
)
def test_shapes_that_contradict_themselves_are_refused(shape: BlockShape, said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        solve_block(_rows(HEADS if isinstance(shape, HeadShape) else MLP), shape, USE)


@pytest.mark.parametrize("shape", BLOCKS, ids=["attention", "mlp", "experts"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("side", [0, 1], ids=["anchor", "model"])
def test_values_that_are_not_finite_are_refused_by_their_axis(shape: BlockShape, value: float, side: int) -> None:
    for axis in _rows(shape):
        sides = _rows(shape)
        sides[axis][0][side][-1, -1] = value
        with pytest.raises(ValueInTensorError, match=f"^axis {axis} of the {('anchor', 'model')[side]}: "):
            solve_block(sides, shape, USE)


def test_large_numbers_are_no_infinity() -> None:
    sides = {axis: [(x.abs() * 1e3, y.abs() * 1e3)] for axis, [(x, y)] in _rows(MLP, dtype=torch.float16).items()}
    large = {axis: [(x.clamp_min(3e4), y)] for axis, [(x, y)] in sides.items()}
    assert not large["up"][0][0].sum(-1).isfinite().all()  # float16 overflows in the sum
    assert solve_block(large, MLP, USE).facts["distance_before"] > 0


def test_models_of_a_consensus_have_to_fit() -> None:
    one, other = ({axis: [pair[i] for pair in pairs] for axis, pairs in _rows(MLP).items()} for i in range(2))
    assert len(solve_consensus([one, other], MLP, USE)) == 2
    for changed in (other["up"][0][:-1], other["up"][0][:, 1:]):
        with pytest.raises(ShapeError, match="model 1"):
            solve_consensus([one, other | {"up": [changed]}], MLP, USE)
    for models in ([one, {axis: x for axis, x in other.items() if axis != "up"}], [one, other | {"up": []}]):
        with pytest.raises(ShapeError, match="model 1"):
            solve_consensus(models, MLP, USE)
    with pytest.raises(ShapeError, match="axis gate"):
        solve_consensus([one, other], replace(MLP, neurons=4), USE)
    with pytest.raises(ShapeError, match="model 1"):
        find_consensus([one, other | {"up": [other["up"][0][:, 1:]]}], lambda sides: pytest.fail("solved"))
    with pytest.raises(ShapeError, match="there are none"):
        find_consensus([], lambda sides: pytest.fail("solved"))


def _zeros(*shape: int) -> Tensor:
    return torch.zeros(shape)


def _pair(*shape: int) -> list[tuple[Tensor, Tensor]]:
    return [(_zeros(*shape), _zeros(*shape))]


SIDE = Moments(_zeros(2, 4, 4), _zeros(2, 4))
SEEN = Covariance(_zeros(5, 5), _zeros(5), _zeros(5))
ROUTING = Routing(_zeros(7, 2), _zeros(7, 2) > 0, _zeros(7, 3))
BAD: dict[str, tuple[Callable[[], Any], str]] = {
    "moments, heads": (partial(Moments, _zeros(3, 4, 4), _zeros(2, 4)), "cross of Moments"),
    "moments, coordinates": (partial(Moments, _zeros(2, 4, 4), _zeros(2, 3)), "cross of Moments"),
    "moments, not square": (partial(Moments, _zeros(2, 3, 4), _zeros(2, 4)), "cross of Moments"),
    "moments of rows, width": (partial(moments, _zeros(8, 3), _zeros(8, 4), 2), "rows of heads"),
    "moments of rows, heads": (partial(moments, _zeros(9, 3), _zeros(9, 3), 2), "rows of heads"),
    "groups": (partial(GroupMoments, _zeros(3, 2, 1, 4, 4), _zeros(3, 2, 4)), "cross of GroupMoments"),
    "planes": (partial(PlaneMoments, _zeros(3, 2, 2, 4), _zeros(3, 2, 4), [0, 1, 2, 3]), "correlation of PlaneMoments"),
    "covariance, cross": (partial(Covariance, _zeros(5, 4), _zeros(5), _zeros(5)), "cross of Covariance"),
    "covariance, model": (partial(Covariance, _zeros(5, 5), _zeros(5), _zeros(4)), "model of Covariance"),
    "routing, tokens": (partial(Routing, _zeros(7, 2), _zeros(7, 2), _zeros(6, 3)), "logits of Routing"),
    "routing, experts": (partial(Routing, _zeros(7, 2), _zeros(7, 3), _zeros(7, 3)), "reached of Routing"),
    "neurons, width": (partial(NeuronPairs, (), [(_zeros(5, 3), _zeros(5, 4))], _pair(5, 3)), "neurons"),
    "neurons, number": (partial(NeuronPairs, _pair(4, 3), _pair(5, 3), _pair(5, 3)), "neurons"),
    "neurons, none": (partial(NeuronPairs, (), (), _pair(5, 3)), "neurons"),
    "scores": (partial(best_assignment, _zeros(3, 4)), "scores"),
    "scores, a vector": (partial(best_assignment, _zeros(3)), "scores"),
    "scores, errors": (partial(Scores, _zeros(3, 3), (_zeros(3, 1), _zeros(2, 1))), "errors of scores"),
    "bounds": (partial(lazy_assignment, _zeros(3, 4), lambda i, j: pytest.fail("asked")), "bounds"),
    "bounds, identity": (partial(identity_is_optimal, _zeros(3), _zeros(4, 4)), "bounds"),
    "heads": (partial(align_heads, SIDE, SIDE.some(torch.tensor([0])), rotate=True, scale=True), "second side"),
    "half a plane": (partial(align_planes, SIDE.at([0]), SIDE.at([0]), rotate=True, scale=True), "rotary planes"),
    "half a plane, signs": (partial(align_signs, SIDE.at([0]), SIDE.at([0]), of_heads=False), "rotary planes"),
    "gains": (
        partial(align_gains, (_zeros(1, 1, 4), _zeros(1, 1, 2)), (_zeros(1, 1, 4),) * 2, signed=True),
        "query gains",
    ),
    "heads by activations": (partial(align_attention_by, {"query": SEEN}, _rows(HEADS), HEADS, USE), "axis query"),
    "neurons by activations": (partial(align_mlp_by, SEEN, _rows(MLP), replace(MLP, neurons=4), USE), "axis down"),
    "experts by activations": (
        partial(align_experts_by, (ROUTING, ROUTING), _rows(MLP), MlpShape(5, experts=3), USE, torch.relu),
        "router logits of the anchor",
    ),
}


@pytest.mark.parametrize("kernel", BAD)
def test_kernels_refuse_what_does_not_fit(kernel: str) -> None:
    call, where = BAD[kernel]
    with pytest.raises(ShapeError, match=where):
        call()


@pytest.mark.parametrize("scale", NeuronScale)
def test_models_with_different_numbers_of_silent_neurons(scale: NeuronScale) -> None:
    """Two of the anchor's neurons stay silent and one of the model's: the others find their partners."""
    generator = torch.Generator().manual_seed(0)
    order = torch.tensor([1, 0, 2, 4, 5, 3])
    anchor = torch.randn(6, 50, generator=generator).abs()
    model = anchor[order]
    anchor[[0, 3]], model[5] = 0.0, 0.0  # the model's neuron 5 is the anchor's 3
    weights = {
        axis: [(x, x[order])] for axis in ("gate", "up", "down") for x in [torch.randn(6, 4, generator=generator)]
    }
    found = align_mlp_by(
        Covariance.of_rows([(anchor, model)]),
        weights,
        MlpShape(6, scale=scale),
        Symmetries(neuron_scaling=scale is not NeuronScale.none),
    )
    assert found.element.actions["gate"].index.tolist() == order.argsort().tolist()
