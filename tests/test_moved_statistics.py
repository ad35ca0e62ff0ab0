"""Statistics under a symmetry: what is measured on the moved model is what the movement of the statistics says."""

from __future__ import annotations

import pytest
import torch
from models import make_model, with_weights
from whole_statistics import fishers, grams, inputs_of

from mergekit_symalign.errors import SymmetryError
from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.fusion.kronecker import Factors, kronecker_mean
from mergekit_symalign.fusion.regmean import regmean
from mergekit_symalign.graph.names import Names
from mergekit_symalign.planting import Planted, random_elements, transform
from mergekit_symalign.symmetry.element import BlockElement, TensorAxes
from mergekit_symalign.symmetry.groups import HeadRotation, Permutation, Scaling
from mergekit_symalign.symmetry.statistics import moved_fisher, moved_gram, moved_mean

FAMILIES = ["llama", "gpt2", "mixtral", "phi3", "gpt-neox", "qwen2", "qwen3", "roberta", "stablelm", "qwen3-moe"]


def _close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    """To rounding in float64, which a softmax and a norm magnify."""
    assert found.shape == wanted.shape
    assert float((found - wanted).norm()) <= 1e-9 * float(wanted.norm()) + 1e-30


@pytest.mark.parametrize("family", FAMILIES)
def test_gram_matrices_follow_every_symmetry(family: str) -> None:
    """Inputs and gradients of every linear layer, experts and fused tensors too."""
    model = make_model(family, 0, num_hidden_layers=None if family == "gpt2" else 1)
    layout = resolve(model.config, model="m")
    elements = random_elements(layout, 3, Planted(neuron_scaling=layout.neuron_scale.value != "none"))
    moved_model = with_weights(model, transform(model.state_dict(), layout, elements))
    moved_model.tie_weights()
    inputs = inputs_of(model, 1, 4)
    (before, _), (after, tokens) = (grams(m, inputs, factors=True) for m in (model, moved_model))
    linear = Names(model.config, "m").linear
    moved = 0
    for name, layer in linear.items():
        claim = layout.claim(name)
        assert claim is not None
        if claim.layer is None or claim.spec.block is None:
            continue
        element, axes = elements[claim.layer, claim.spec.block], layout.axes(claim.spec)
        axis, experts = layer.read(axes)
        _close(moved_gram(element, before[name]["gram"], axis, experts), after[name]["gram"])
        written = moved_gram(element, before[name]["gradient_gram"], *layer.written(axes))
        _close(written, after[name]["gradient_gram"])
        if experts is None:
            _close(moved_mean(element, before[name]["mean"], axis), after[name]["mean"])
        moved += not torch.allclose(before[name]["gradient_gram"], after[name]["gradient_gram"])
    assert moved >= 2
    assert tokens


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "bert-classifier"])
def test_diagonals_follow_an_order(family: str) -> None:
    model = make_model(family, 0)
    layout = resolve(model.config, model="m")
    elements = random_elements(layout, 3, Planted(rotation=False, scaling=False))
    moved_model = with_weights(model, transform(model.state_dict(), layout, elements))
    moved_model.tie_weights()
    inputs = inputs_of(model, 1, 3)
    before, after = (fishers(m, inputs)[0] for m in (model, moved_model))
    for name, kinds in before.items():
        claim = layout.claim(name)
        if claim is not None and claim.layer is not None and claim.spec.block is not None:
            element = _plain(elements[claim.layer, claim.spec.block])
            _close(moved_fisher(element, kinds["fisher"], layout.axes(claim.spec)), after[name]["fisher"])
        else:
            _close(kinds["fisher"], after[name]["fisher"])


def _plain(element: BlockElement) -> BlockElement:
    """Without the rotations by nothing that planting adds."""
    return BlockElement({axis: action.snapped(1e-12).simplified() for axis, action in element.actions.items()})


ROTATION = HeadRotation(
    torch.linalg.qr(torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))).Q, torch.ones(1)
)


@pytest.mark.parametrize("action", [ROTATION, Scaling(torch.tensor([1.0, 2.0, 1.0, 1.0]))])
def test_diagonals_do_not_follow_anything_else(action: HeadRotation | Scaling) -> None:
    element = BlockElement({"attended": action})
    with pytest.raises(SymmetryError, match="measure the aligned model"):
        moved_gram(element, torch.ones(4), "attended")
    with pytest.raises(SymmetryError, match="measure the aligned model"):
        moved_fisher(element, torch.ones(3, 4), TensorAxes(("residual", "attended")))
    order = BlockElement({"attended": Permutation(torch.tensor([1, 0, 3, 2]))})
    assert torch.equal(moved_gram(order, torch.arange(4.0), "attended"), torch.tensor([1.0, 0.0, 3.0, 2.0]))


def test_solves_commute_with_a_symmetry() -> None:
    """Merged in other coordinates, or merged and then moved: the same, whatever turns inputs and outputs."""

    def random(seed: int, *shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def square(seed: int, n: int) -> torch.Tensor:
        x = random(seed, 40, n)
        return x.T @ x

    weights, shares = [random(i, 5, 7) for i in range(3)], [0.3, 1.0, 2.0]
    a, b = [square(10 + i, 7) for i in range(3)], [square(20 + i, 5) for i in range(3)]
    s, t = random(30, 5, 5), random(31, 7, 7)
    back, into = torch.linalg.inv(s), torch.linalg.inv(t)
    turned = [s @ w @ into for w in weights]
    a_turned, b_turned = [t @ x @ t.T for x in a], [back.T @ x @ back for x in b]
    for count in (2, 3):
        one = regmean(turned[:count], shares[:count], a_turned[:count]).weight
        _close(one, s @ regmean(weights[:count], shares[:count], a[:count]).weight @ into)
        factors, moved = (
            [Factors(x, y) for x, y in zip(*pair, strict=True)][:count] for pair in ((a, b), (a_turned, b_turned))
        )
        found = kronecker_mean(turned[:count], shares[:count], moved).weight
        _close(found, s @ kronecker_mean(weights[:count], shares[:count], factors).weight @ into)
