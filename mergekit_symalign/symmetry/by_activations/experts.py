"""Mixture of experts, matched by what the experts do on the same tokens.

Which expert is which is told by the router's logits, which every token has for every expert of both models. The neurons
inside a pair are then matched by what they hand to the down projection, on the tokens that reach either of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment.linear import best_assignment
from mergekit_symalign.symmetry.by_activations.covariance import BY_ACTIVATIONS, Covariance
from mergekit_symalign.symmetry.by_activations.neurons import match_neurons_by
from mergekit_symalign.symmetry.by_activations.orders import Scores, likeliest_order
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.fitting import require_shape
from mergekit_symalign.symmetry.groups import Permutation
from mergekit_symalign.symmetry.neurons.experts import grouped_assignment, joined_experts
from mergekit_symalign.symmetry.options import MlpShape, NeuronScale, Sides, Symmetries
from mergekit_symalign.symmetry.rows import compute_dtype
from mergekit_symalign.symmetry.solved import Solved

_NEURON_AXES = ("gate", "up", "down")
_TOKENS = 4096  # that run through an expert at once


@dataclass(frozen=True)
class Routing:
    """What a layer of one model gives its experts.

    Attributes:
        logits: of the router [tokens, experts].
        reached: bool [tokens, experts]; which experts a token is sent to.
        entered: [tokens, hidden size], what the experts read.

    Raises:
        ShapeError: if they do not fit together.
    """

    logits: Tensor
    reached: Tensor
    entered: Tensor

    def __post_init__(self) -> None:
        tokens, experts = len(self.entered), self.logits.shape[-1]
        for name in ("logits", "reached"):
            require_shape(f"{name} of Routing", getattr(self, name), (tokens, experts))
        require_shape("entered of Routing", self.entered, (tokens, self.entered.shape[-1]))

    @staticmethod
    def joined(batches: Sequence[Routing]) -> Routing:
        """The tokens of all batches (at least one)."""
        if len(batches) == 1:
            return batches[0]
        return Routing(*(torch.cat(x) for x in zip(*(b.tensors() for b in batches), strict=True)))

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.logits, self.reached, self.entered


def align_experts_by(
    routing: tuple[Routing, Routing],
    weights: Sides,
    shape: MlpShape,
    use: Symmetries,
    act: Callable[[Tensor], Tensor] | None,
    stored: Sides | None = None,
    gated: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Solved:
    """Match the experts of a layer, and the neurons in each pair of them.

    Experts: maximises the sum of the covariances of the pairs' router logits over all tokens; router rows count with
    the likeliest share (`likeliest_order`). Neurons: as `align_mlp_by`, expert by expert, on the tokens that are sent
    to the expert in either model. An expert that no token reaches is matched by its weights.

    Args:
        routing: of the anchor and of the model, the same tokens.
        weights: the rows of axes expert (router), gate, up and down, [experts × neurons, …].
        shape: experts, neurons and which factors these have.
        use: what is admitted.
        act: the nonlinearity of the gates.
        stored: gate and up as the experts run, if ``weights`` are in another form (symmetry/residual/move.py).
        gated: what an expert makes of its gate and up, if that is not ``act(gate) · up``.

    Raises:
        ShapeError: if the models saw different tokens, or have another number of experts than the shape says.

    >>> generator = torch.Generator().manual_seed(0)
    >>> tokens, router, rows = (torch.randn(n, 4, generator=generator) for n in (50, 2, 6))
    >>> def routing(order):
    ...     return Routing(tokens @ router[order].T, torch.ones(50, 2, dtype=torch.bool), tokens)
    >>> swapped = rows[[3, 4, 5, 0, 1, 2]]  # two experts of three neurons, in the other order
    >>> weights = {axis: [(rows, swapped)] for axis in ("gate", "up", "down")} | {"expert": [(router, router[[1, 0]])]}
    >>> models = routing([0, 1]), routing([1, 0])
    >>> found = align_experts_by(models, weights, MlpShape(3, experts=2), Symmetries(), torch.nn.functional.silu)
    >>> found.element.actions["expert"].index.tolist(), found.element.actions["gate"].index.tolist()
    ([1, 0], [3, 4, 5, 0, 1, 2])
    """
    anchor, model = routing
    require_shape("router logits of the anchor", anchor.logits, (len(anchor.entered), shape.experts))
    require_shape("router logits of the model", model.logits, anchor.logits.shape)
    scale = shape.scale if use.neuron_scaling else NeuronScale.none
    if not use.permutation and scale is NeuronScale.none:
        return Solved(BlockElement({}), BY_ACTIVATIONS)
    order = _match_experts(routing, weights, shape.groups) if use.permutation else list(range(shape.experts))
    pairs = []
    for i, j in enumerate(order):
        at = _tokens_of(routing, i, j)
        own, running = (
            {axis: [(_of(a, i, shape), _of(b, j, shape)) for a, b in sides[axis]] for axis in _axes_of(shape)}
            for sides in (weights, stored or weights)
        )
        seen = _neurons_seen(running, (routing[0].entered, routing[1].entered), at, gated or _made_of(act, shape))
        pairs.append(match_neurons_by(seen, own, scale, permute=use.permutation))
    gate, up = (joined_experts([pair[k] for pair in pairs], order) for k in range(2))
    index = torch.tensor(order, device=routing[0].logits.device)
    actions = {"expert": Permutation(index), "gate": gate, "up": up, "down": up.dual()}
    if not shape.gated:
        del actions["gate"]
    return Solved(BlockElement(actions), BY_ACTIVATIONS)


def _axes_of(shape: MlpShape) -> tuple[str, ...]:
    return _NEURON_AXES if shape.gated else tuple(axis for axis in _NEURON_AXES if axis != "gate")


def _match_experts(routing: tuple[Routing, Routing], weights: Sides, groups: int) -> list[int]:
    """The model's expert for each of the anchor's."""
    logits = Covariance.of_rows([(routing[0].logits.mT, routing[1].logits.mT)])

    def assign(score: Tensor) -> Tensor:
        if groups == 1:
            return best_assignment(score)
        return grouped_assignment(-score, lambda i, j: -score[i, j], groups)

    rows = Covariance.of_rows(weights["expert"])
    order: list[int] = likeliest_order(Scores.of(logits), Scores.of(rows), assign)[0].tolist()
    return order


def _tokens_of(routing: tuple[Routing, Routing], i: int, j: int) -> Tensor:
    """The tokens that reach the anchor's expert ``i`` or the model's ``j``."""
    return torch.nonzero(routing[0].reached.select(1, i) | routing[1].reached.select(1, j)).flatten()


def _neurons_seen(
    own: Sides, entered: tuple[Tensor, Tensor], at: Tensor, gated: Callable[[Tensor, Tensor], Tensor]
) -> Covariance:
    """Covariance of a pair's neurons, ``act(gate x) · up x`` or what the experts make of it, over some tokens."""
    total = None
    for tokens in at.split(_TOKENS):
        hidden = []
        for side, x in enumerate(entered):
            x = x.index_select(0, tokens)
            gate, up = (_through(x, [pair[side] for pair in own.get(axis, own["up"])]) for axis in ("gate", "up"))
            hidden.append(gated(gate, up).mT)
        more = Covariance.of_rows([(hidden[0], hidden[1])])
        total = more if total is None else total + more
    assert total is not None  # `split` gives one part of nothing
    return total


def _made_of(act: Callable[[Tensor], Tensor] | None, shape: MlpShape) -> Callable[[Tensor, Tensor], Tensor]:
    """Of gate and up, which are the same where an expert has no gate."""
    assert act is not None
    return (lambda gate, up: act(gate) * up) if shape.gated else (lambda _, up: act(up))


def _through(x: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Through weights [neurons, hidden size], and a bias [neurons, 1] if there is one."""
    weight, *biases = (part.to(compute_dtype(part.dtype)) for part in sorted(rows, key=lambda part: -part.shape[1]))
    return torch.stack([x.to(weight.dtype) @ weight.mT, *(bias.mT.expand(len(x), -1) for bias in biases)]).sum(0)


def _of(x: Tensor, expert: int, shape: MlpShape) -> Tensor:
    return x.narrow(0, expert * shape.neurons, shape.neurons)
