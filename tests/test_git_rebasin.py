"""Against Git Re-Basin's own coordinate descent (Ainsworth et al., arXiv 2209.04836, algorithm 1), written for GPT-2.

``residual: permutation, rotation: none, scaling: false`` is the same problem: one order for the stream, one for
the heads and one for the neurons of each layer.
"""

from __future__ import annotations

import pytest
import torch
from models import make_model, perturbed
from scipy.optimize import linear_sum_assignment
from streams import State, joined, split, stored
from torch import Tensor

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.planting import Planted, random_elements, random_stream
from mergekit_symalign.symmetry.options import Rotation, Symmetries
from mergekit_symalign.symmetry.residual.alternate import align_stream
from mergekit_symalign.symmetry.residual.kinds import ResidualKind
from mergekit_symalign.symmetry.residual.move import Elements, move_scope

LAYERS, HEADS, HIDDEN = 2, 6, 48
KIND = ResidualKind.permutation
USE = Symmetries(rotation=Rotation.none, scaling=False)
Orders = dict[str, Tensor]


def _axes(name: str) -> tuple[str, ...]:
    """Which order each axis of a tensor of GPT-2 follows (git-re-basin's ``axes_to_perm``)."""
    parts = name.split(".")
    if parts[1] != "h":
        return ("", "stream") if name.endswith((".wte.weight", ".wpe.weight")) else ("stream",)
    neurons, heads, inside = f"neurons {parts[2]}", f"heads {parts[2]}", ".".join(parts[3:])
    return {
        "attn.c_attn.weight": ("stream", heads),
        "attn.c_attn.bias": (heads,),
        "attn.c_proj.weight": (heads, "stream"),
        "mlp.c_fc.weight": ("stream", neurons),
        "mlp.c_fc.bias": (neurons,),
        "mlp.c_proj.weight": (neurons, "stream"),
    }.get(inside, ("stream",))


def _whole(name: str, order: Tensor, length: int) -> Tensor:
    """An order of coordinates: of heads, in each of the parts (query, key, value) that are stored in one tensor."""
    if not name.startswith("heads"):
        return order
    d = HIDDEN // HEADS
    one = (order.unsqueeze(1) * d + torch.arange(d)).flatten()
    return torch.cat([one + part * HIDDEN for part in range(length // HIDDEN)])


def _permuted(state: State, orders: Orders, without: str = "") -> State:
    result = {}
    for name, x in state.items():
        for dim, axis in enumerate(_axes(name)):
            if axis and axis != without:
                x = x.index_select(dim, _whole(axis, orders[axis], x.shape[dim]))
        result[name] = x
    return result


def _score(axis: str, anchor: State, model: State, n: int) -> Tensor:
    """``Σ A Bᵀ`` over all tensors that follow an order, the model's other axes already in theirs [n, n]."""
    total = torch.zeros(n, n, dtype=torch.float64)
    for name, a in anchor.items():
        if axis in _axes(name):
            dim = _axes(name).index(axis)
            a, b = a.movedim(dim, 0), model[name].movedim(dim, 0)
            if axis.startswith("heads"):
                a, b = (x.unflatten(0, (-1, n, HIDDEN // HEADS)).movedim(1, 0) for x in (a, b))
            total += a.reshape(n, -1) @ b.reshape(n, -1).mT
    return total


def git_rebasin(anchor: State, model: State, seed: int) -> Orders:
    """Weight matching: in random order each permutation by a linear assignment, until no pass gains anything."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {"stream": HIDDEN}
    for layer in range(LAYERS):
        sizes |= {f"heads {layer}": HEADS, f"neurons {layer}": 80}
    orders = {axis: torch.arange(n) for axis, n in sizes.items()}
    axes, improved = list(sizes), True
    while improved:
        improved = False
        for i in torch.randperm(len(axes), generator=generator).tolist():
            axis = axes[i]
            score = _score(axis, anchor, _permuted(model, orders, without=axis), sizes[axis])
            rows = torch.arange(sizes[axis])
            found = torch.from_numpy(linear_sum_assignment(score.numpy(), maximize=True)[1])
            if float(score[rows, found].sum() - score[rows, orders[axis]].sum()) > 1e-12:
                orders[axis], improved = found, True
    return orders


def _distance(a: State, b: State) -> float:
    return sum(float((x - b[name]).square().sum()) for name, x in a.items())


def _ours(anchor: State, model: State) -> State:
    layout = resolve(make_model("gpt2", 0, num_hidden_layers=LAYERS).config, model="m")
    scopes, a = split(layout, anchor, use=USE)
    _, b = split(layout, model)
    found = align_stream(scopes, lambda i: (a[i], b[i]), KIND)
    moved = zip(scopes, b, found.blocks, strict=True)
    return joined(layout, [move_scope(s, x, KIND, found.stream, blocks) for s, x, blocks in moved])


def _twin(state: State) -> State:
    layout = resolve(make_model("gpt2", 0, num_hidden_layers=LAYERS).config, model="m")
    planted = random_elements(layout, 1, Planted(rotation=False, scaling=False))
    blocks: list[Elements] = [{}]
    blocks += [{kind.value: g for (i, kind), g in planted.items() if i == layer} for layer in range(LAYERS)]
    scopes, parts = split(layout, state)
    stream = random_stream(KIND, HIDDEN, 2)
    moved = zip(scopes, parts, blocks, strict=True)
    return joined(layout, [move_scope(s, x, KIND, stream, own) for s, x, own in moved])


@pytest.fixture(scope="module")
def anchor() -> State:
    return stored(make_model("gpt2", 0, num_hidden_layers=LAYERS))


def test_both_undo_planted_permutations(anchor: State) -> None:
    near = stored(perturbed(make_model("gpt2", 0, num_hidden_layers=LAYERS), 0.2, 7))
    twin = _twin(near)
    reference = _permuted(twin, git_rebasin(anchor, twin, 0))
    ours = _ours(anchor, twin)
    for name, x in near.items():
        assert torch.equal(reference[name], x)
        assert torch.equal(ours[name], x)


def test_of_models_with_nothing_in_common_the_reference_finds_nothing_to_gain(anchor: State) -> None:
    """Ours is an optimum of every single order. Both are local ones, about as close."""
    for seed in (1, 2):
        other = stored(make_model("gpt2", seed, num_hidden_layers=LAYERS))
        ours = _ours(anchor, other)
        for axis, order in git_rebasin(anchor, ours, seed).items():
            assert torch.equal(order, torch.arange(len(order))), axis
        reference = _distance(anchor, _permuted(other, git_rebasin(anchor, other, seed)))
        assert _distance(anchor, ours) < 1.02 * reference < 0.9 * _distance(anchor, other)
