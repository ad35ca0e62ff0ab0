"""Learning, as mathematics: steps stay in the group, gradients are right, the function is kept, orders are learned."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from models import logits, perturbed, relative_deviation
from sources import inputs_alone, together
from streams import State, case, joined, split, stored
from torch import Tensor
from transformers import PreTrainedModel

from mergekit_symalign.activations.objectives import IGNORED, Objective, next_tokens, objective_of
from mergekit_symalign.activations.runner import LayerRunner
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.stream import residual_group, ties_embeddings
from mergekit_symalign.learning.between import Batched, Between, Place
from mergekit_symalign.learning.canonical import canonical
from mergekit_symalign.learning.descent import Plan, descend, held_out_loss, start
from mergekit_symalign.learning.elements import Learned, LearnedStream, learned_block
from mergekit_symalign.learning.manifolds import Flat, Invertible, Log, MeanKeeping, Orthogonal
from mergekit_symalign.learning.orders import first_scores, straight_through
from mergekit_symalign.planting import random_elements, random_stream
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import AxisAction, Chain
from mergekit_symalign.symmetry.membership import require_symmetry
from mergekit_symalign.symmetry.options import Rotation, Symmetries, ValueOutput
from mergekit_symalign.symmetry.residual.kinds import ResidualKind
from mergekit_symalign.symmetry.residual.membership import require_stream_symmetry
from mergekit_symalign.symmetry.residual.move import move_scope
from mergekit_symalign.symmetry.residual.scope import norms_of

EVERYTHING = Symmetries(neuron_scaling=True)
GENERAL = replace(EVERYTHING, value_output=ValueOutput.general)


class Both:
    """An anchor, a model of another initialisation, and what is between them; random elements to start from."""

    def __init__(
        self, family: str, use: Symmetries = EVERYTHING, *, orders: bool = False, swapped: bool = False
    ) -> None:
        self.anchor, self.model = case(family, 0), case(family, 0 if swapped else 1)
        self.layout: ModelLayout = resolve(self.anchor.config, model="m")
        self.kind = residual_group(self.layout, ties_embeddings(self.anchor.config, self.layout)).kinds[-1]
        hidden = self.layout.geometry.hidden
        self.kind = ResidualKind.none if swapped else self.kind
        stream = random_stream(self.kind, hidden, 3)
        blocks = {} if swapped else random_elements(self.layout, 4)
        if swapped:
            _swap(self.model)
        self.scopes, self.models = split(self.layout, stored(self.model))
        self.anchors = split(self.layout, stored(self.anchor))[1]
        learned = LearnedStream.of(stream, self.kind, hidden, orders=orders)
        places = []
        for i, scope in enumerate(self.scopes):
            found: dict[str, Learned] = {}
            for of, block in scope.blocks.items():
                element = {kind.value: g for (layer, kind), g in blocks.items() if layer == i - 1}
                found[of] = learned_block(element.get(of, BlockElement({})), block.shape, use, orders=orders)
            ours, theirs = ({name: x.float() for name, x in x[i].items()} for x in (self.anchors, self.models))
            places.append(Place.of(scope, ours, theirs, self.kind, learned, found, f"layer {i - 1}"))
        runner = LayerRunner(self.anchor.config, self.layout, "sdpa")
        self.between = Between(runner, learned, places[0], places[1:])
        batch = together(inputs_alone(self.anchor.float()))
        objective = objective_of(type(self.anchor).__name__)
        labels = torch.arange(len(batch.ids)) % 2
        self.data = Batched(batch, labels if objective is Objective.label else next_tokens(batch))
        self.anchor.double()

    def moved(self, elements: dict[str, BlockElement]) -> PreTrainedModel:
        """The model in the coordinates of some elements, in float64."""
        parts: list[State] = []
        for i, (scope, tensors, ours) in enumerate(zip(self.scopes, self.models, self.anchors, strict=True)):
            blocks = {of: elements[f"layer {i - 1} {of}"] for of in scope.blocks}
            parts.append(move_scope(scope, tensors, self.kind, elements["residual"], blocks, norms_of(scope, ours)))
        copy = perturbed(self.model, 0.0, 0)
        copy.load_state_dict(joined(self.layout, parts), strict=False)
        copy.tie_weights()
        return copy


@torch.no_grad()
def _swap(model: PreTrainedModel) -> None:
    """Let two pairs of neurons of each layer change places."""
    for layer in model.model.layers:
        index = torch.arange(layer.mlp.gate_proj.weight.shape[0])
        index[:4] = torch.tensor([1, 0, 3, 2])
        for part in (layer.mlp.gate_proj, layer.mlp.up_proj):
            part.weight.copy_(part.weight[index].clone())
        layer.mlp.down_proj.weight.copy_(layer.mlp.down_proj.weight[:, index].clone())


FAMILIES = ["llama", "mistral", "qwen3", "phi4-mini", "gemma2", "olmo2", "cohere2", "gpt2", "gpt2-untied", "gpt-neox"]
FAMILIES += ["roberta", "modernbert", "vit-classifier", "mixtral", "bert-classifier", "llama-tied"]


CASES = [(family, EVERYTHING, False) for family in FAMILIES]
CASES += [(family, GENERAL, False) for family in ("llama", "gpt2-untied")]
CASES += [(family, EVERYTHING, True) for family in ("mistral", "olmo2", "roberta", "mixtral")]


@pytest.mark.parametrize(("family", "use", "orders"), CASES)
def test_the_function_stays_whatever_is_learned(family: str, use: Symmetries, orders: bool) -> None:
    both = Both(family, use, orders=orders)
    plan = Plan(steps=2, rate=0.3, every=2)
    before = start(both.between, [both.data])
    state = descend(both.between, lambda _: both.data, [both.data], plan, before)
    for name, x in state.numbers.items():
        assert not torch.equal(x, before.numbers[name]), name  # everything has a gradient
    elements = both.between.elements(state.numbers)
    require_stream_symmetry(elements["residual"], both.kind, both.layout.geometry.hidden)
    for i, scope in enumerate(both.scopes):
        for of, block in scope.blocks.items():
            require_symmetry(elements[f"layer {i - 1} {of}"], block.shape)
    assert relative_deviation(logits(both.model), logits(both.moved(elements))) < 1e-9


def test_gradients_are_those_of_the_loss() -> None:
    """Against differences of the loss along the step that a gradient is turned into."""
    both = Both("qwen2", GENERAL)
    numbers = {name: leaf.start.float() for name, leaf in both.between.leaves().items()}
    _, gradients = both.between.gradients(numbers, both.data, 0.4)
    for name, leaf in both.between.leaves().items():
        tangent = leaf.manifold.tangent(numbers[name], gradients[name])
        direction = tangent / tangent.norm()
        losses = []
        for sign in (1, -1):
            moved = {**numbers, name: leaf.manifold.moved(numbers[name], sign * 2e-3 * direction)}
            losses.append(float(both.between.loss(moved, both.data, 0.4)) / both.data.counted)
        slope = (losses[0] - losses[1]) / 4e-3
        assert slope == pytest.approx(float((tangent * direction).sum()), rel=0.1, abs=2e-3), name


MATRICES = {"orthogonal": Orthogonal(), "mean": MeanKeeping(), "invertible": Invertible(50.0)}


@pytest.mark.parametrize("name", MATRICES)
def test_steps_of_any_length_stay_in_the_group(name: str) -> None:
    manifold = MATRICES[name]
    generator = torch.Generator().manual_seed(1)
    x = torch.eye(7).repeat(2, 1, 1)
    for _ in range(20):
        x = manifold.moved(x, 3 * torch.randn(2, 7, 7, generator=generator))
    exact = manifold.exact(x)
    assert float((exact - x).abs().max()) < 1e-4
    if isinstance(manifold, Invertible):
        assert float(torch.linalg.cond(exact).max()) <= 50 * (1 + 1e-9)
        return
    torch.testing.assert_close(exact.mT @ exact, torch.eye(7).double().repeat(2, 1, 1), rtol=0, atol=1e-12)
    if isinstance(manifold, MeanKeeping):
        torch.testing.assert_close(exact.sum(-1), torch.ones(2, 7).double(), rtol=0, atol=1e-12)


def test_scales_stay_within_what_weights_can_bear() -> None:
    x = torch.tensor([0.0, 9.0, -9.0])
    for _ in range(9):
        x = Log().moved(x, torch.tensor([1.0, 1.0, -1.0]))
    assert x.tolist() == [4.0, 9.0, -9.0]
    assert Flat().moved(torch.zeros(1), torch.full((1,), 9.0)).tolist() == [9.0]


@pytest.mark.parametrize("family", ["llama", "olmo2", "phi4-mini", "gpt2"])
def test_any_chain_has_a_short_form(family: str) -> None:
    layout = resolve(case(family).config, model="m")
    elements = [random_elements(layout, seed) for seed in (1, 2, 3)]
    for key, first in elements[0].items():
        for axis, action in first.actions.items():
            chain = [action, *(other[key].actions[axis] for other in elements[1:])]
            x = torch.randn(action.size, 5, generator=torch.Generator().manual_seed(0)).double()
            wanted = x
            for one in chain:
                wanted = one(wanted, 0)
            found = canonical(_chained(chain), action.size)
            moved = found.order(x, 0)
            torch.testing.assert_close(moved if found.step is None else found.step(moved, 0), wanted)


def _chained(steps: list[AxisAction]) -> AxisAction:
    return Chain(tuple(steps))


def test_the_best_is_kept_when_steps_lead_away() -> None:
    both = Both("llama-mha")
    first = start(both.between, [both.data])
    found = descend(both.between, lambda _: both.data, [both.data], Plan(steps=6, rate=9.0, every=1, patience=3), first)
    assert found.least <= found.before
    assert found.least == pytest.approx(held_out_loss(both.between, found.best, [both.data]), rel=1e-6)
    assert held_out_loss(both.between, found.numbers, [both.data]) > found.least
    assert found.since == 3


def test_an_order_is_found_through_its_relaxation() -> None:
    """Scores whose order is wrong, and a loss of the order alone."""
    wanted = torch.tensor([2, 0, 1, 3, 5, 4])
    target = torch.nn.functional.one_hot(wanted).float()
    scores: Tensor = first_scores(1, 6).float()
    for _ in range(60):
        known = scores.clone().requires_grad_()
        order = straight_through(known)
        assert torch.equal(order.sum(-1), torch.ones(1, 6))
        (gradient,) = torch.autograd.grad((order[0] - target).square().sum(), known)
        scores = scores - 2 * gradient
    assert torch.equal(straight_through(scores)[0], target)


def test_learning_undoes_a_wrong_order_of_neurons() -> None:
    """The anchor with some neurons exchanged, on what it predicts itself; nothing but orders is learned."""
    alone = Symmetries(heads=False, rotation=Rotation.none, scaling=False)
    both = Both("llama-mha", alone, orders=True, swapped=True)
    with torch.no_grad():
        said = both.anchor(both.data.batch.ids).logits.argmax(-1)
    data = Batched(both.data.batch, torch.where(both.data.targets == IGNORED, IGNORED, said))
    first = start(both.between, [data])
    plan = Plan(steps=40, rate=0.1, every=4, patience=99)
    found = descend(both.between, lambda _: data, [data], plan, first)
    home = held_out_loss(both.between, found.best, [data], 0.0)
    assert found.least - home < 0.05 * (first.before - home)
