"""Experts and their neurons: planted orders come back, and nothing cheaper exists."""

from __future__ import annotations

import itertools

import pytest
import torch
from scipy.optimize import linear_sum_assignment

from mergekit_symalign.symmetry.blocks import align_mlp
from mergekit_symalign.symmetry.by_activations.experts import Routing, align_experts_by
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import Chain, Permutation, Scaling
from mergekit_symalign.symmetry.neurons.experts import ExpertProblem
from mergekit_symalign.symmetry.options import MlpShape, NeuronScale, Symmetries

E, N, H = 4, 9, 24
NEURON_AXES = ("gate", "up", "down")
SHAPE = MlpShape(N, E)
Rows = dict[str, torch.Tensor]


def _rows(seed: int) -> Rows:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"gate": E * N, "up": E * N, "down": E * N, "expert": E}
    return {axis: torch.randn(n, H, generator=generator, dtype=torch.float64) for axis, n in sizes.items()}


def _sides(anchor: Rows, model: Rows) -> dict:
    return {axis: [(x, model[axis])] for axis, x in anchor.items()}


def _moved(rows: Rows, element: BlockElement) -> Rows:
    return {axis: element.actions[axis](x, 0) for axis, x in rows.items()}


def _distance(a: Rows, b: Rows) -> float:
    return float(sum((x - b[axis]).square().sum() for axis, x in a.items()))


def _planted(seed: int, *, scale: bool) -> BlockElement:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(E, generator=generator)
    gate = Permutation(torch.cat([torch.randperm(N, generator=generator) + j * N for j in order.tolist()]))
    factor = torch.randn(E * N, generator=generator, dtype=torch.float64).exp()
    up = Chain((gate, Scaling(factor * torch.randn(E * N, generator=generator).sign()))) if scale else gate
    return BlockElement({"expert": Permutation(order), "gate": gate, "up": up, "down": up.dual()})


@pytest.mark.parametrize("scale", [False, True])
@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_planted_order_of_experts_and_neurons_is_recovered(scale: bool, noise: float) -> None:
    anchor = _rows(0)
    sibling = {axis: x + noise * _rows(1)[axis] for axis, x in anchor.items()}
    planted = _planted(2, scale=scale)
    found = align_mlp(_sides(anchor, _moved(sibling, planted)), SHAPE, Symmetries(neuron_scaling=scale)).element
    assert torch.equal(found.actions["expert"].index, planted.actions["expert"].inverse().index)
    assert torch.equal(found.actions["gate"].index, planted.actions["gate"].inverse().index)
    back = _moved(_moved(sibling, planted), found)
    assert _distance(anchor, back) <= _distance(anchor, sibling) + 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_optimum_over_all_orders_of_unrelated_experts(seed: int) -> None:
    anchor, model = _rows(10 + seed), _rows(20 + seed)
    found = _moved(model, align_mlp(_sides(anchor, model), SHAPE, Symmetries()).element)
    best = min(_distance(anchor, _ordered(anchor, model, order)) for order in itertools.permutations(range(E)))
    assert _distance(anchor, found) == pytest.approx(best, rel=1e-9)


def _ordered(anchor: Rows, model: Rows, order: tuple[int, ...]) -> Rows:
    """The model's experts in this order, each with its best order of neurons (scipy on the whole problem)."""
    index = []
    for i, j in enumerate(order):
        block = {
            axis: (anchor[axis][i * N : (i + 1) * N], model[axis][j * N : (j + 1) * N])
            for axis in ("gate", "up", "down")
        }
        score = sum(a.numpy() @ b.numpy().T for a, b in block.values())
        index.append(torch.from_numpy(linear_sum_assignment(score, maximize=True)[1]) + j * N)
    result = {axis: model[axis][torch.cat(index)] for axis in NEURON_AXES}
    return result | {"expert": model["expert"][list(order)]}


@pytest.mark.parametrize("scale", [NeuronScale.none, NeuronScale.signed])
def test_lower_bounds_hold(scale: NeuronScale) -> None:
    anchor = _rows(0)
    for model in (_rows(1), {axis: x + 0.1 * _rows(2)[axis] for axis, x in anchor.items()}):
        problem = ExpertProblem(_sides(anchor, model), E, True, scale)
        i, j = (x.flatten() for x in torch.meshgrid(torch.arange(E), torch.arange(E), indexing="ij"))
        costs = problem.costs(i, j)
        assert (problem.lower_bounds().flatten() <= costs + 1e-9).all()
        assert (problem.lower_bounds() > 0).all()


def test_experts_keep_their_order_without_permutation() -> None:
    anchor = _rows(0)
    twin = _moved(anchor, _planted(2, scale=False))
    found = align_mlp(_sides(anchor, twin), SHAPE, Symmetries(permutation=False, neuron_scaling=True)).element
    assert bool(found.actions["expert"].is_identity() & found.actions["gate"].is_identity())
    assert align_mlp(_sides(anchor, twin), SHAPE, Symmetries(permutation=False)).element.actions == {}


def _routing(rows: Rows, x: torch.Tensor, unused: int | None = None) -> Routing:
    """Every token goes to two experts, none of them the unused one (a row of the router)."""
    logits = x @ rows["expert"].mT
    masked = logits.clone()
    if unused is not None:
        masked[:, unused] = -torch.inf
    reached = torch.zeros_like(logits, dtype=torch.bool).scatter(1, masked.topk(2).indices, True)
    return Routing(logits, reached, x)


@pytest.mark.parametrize("scale", [False, True])
def test_planted_order_is_recovered_from_what_experts_do(scale: bool) -> None:
    """A sibling's outputs differ by a little noise; one expert, which no token reaches, is matched by its weights."""
    anchor, x = _rows(0), torch.randn(400, H, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    planted = _planted(2, scale=scale)
    sibling = {axis: y + 0.05 * _rows(1)[axis] for axis, y in anchor.items()}
    model = _moved(sibling, planted)
    unused = int(planted.actions["expert"].inverse().index[1])
    routing = (_routing(anchor, x, unused=1), _routing(model, x, unused=unused))
    assert not routing[0].reached[:, 1].any()
    act = torch.nn.functional.silu
    use = Symmetries(neuron_scaling=scale)
    found = align_experts_by(routing, _sides(anchor, model), SHAPE, use, act).element
    assert torch.equal(found.actions["expert"].index, planted.actions["expert"].inverse().index)
    assert torch.equal(found.actions["gate"].index, planted.actions["gate"].inverse().index)
    if scale:
        twin = _moved(anchor, planted)
        found = align_experts_by((routing[0], _routing(twin, x)), _sides(anchor, twin), SHAPE, use, act).element
        back = _moved(twin, found)
        assert all(torch.allclose(back[axis], y, rtol=1e-5, atol=1e-6) for axis, y in anchor.items())


def test_experts_that_may_not_move_keep_their_places() -> None:
    anchor, x = _rows(0), torch.randn(50, H, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    twin = _moved(anchor, _planted(2, scale=False))
    given = (_routing(anchor, x), _routing(twin, x)), _sides(anchor, twin), SHAPE
    act = torch.nn.functional.silu
    assert align_experts_by(*given, Symmetries(permutation=False), act).element.actions == {}
    found = align_experts_by(*given, Symmetries(permutation=False, neuron_scaling=True), act).element
    assert bool(found.actions["expert"].is_identity() & found.actions["gate"].is_identity())
