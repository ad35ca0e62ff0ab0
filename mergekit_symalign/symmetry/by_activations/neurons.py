"""Neurons of an MLP, matched by what they hand to the down projection and by their weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_symalign.symmetry.assignment.linear import best_assignment
from mergekit_symalign.symmetry.by_activations.covariance import (
    BY_ACTIVATIONS,
    TOLERANCE,
    Covariance,
    inverse_root,
    require_axis,
    size_ratio,
)
from mergekit_symalign.symmetry.by_activations.orders import Scores, likeliest_order
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import AxisAction, Chain, Permutation, Scaling
from mergekit_symalign.symmetry.neurons.costs import NeuronCosts, NeuronPairs, factors
from mergekit_symalign.symmetry.options import MlpShape, NeuronScale, Pair, Sides, Symmetries
from mergekit_symalign.symmetry.solved import Solved


def align_mlp_by(seen: Covariance, weights: Sides, shape: MlpShape, use: Symmetries) -> Solved:
    """Match the neurons of an MLP by what they hand to the down projection, and by their weights.

    Maximises the sum over the matched pairs of ``(1 − w) a_ij + w b_ij``: ``a`` is their covariance, ``b`` what their
    rows of weights have in common, each in units of both models' norms. The share ``w`` of the weights is the likeliest
    (`likeliest_order`). With ``neuron_scaling`` each pair has the factor that makes the model's neuron as large as the
    anchor's, with the sign of their covariance. Neurons that no token wakes are matched by their weights.

    Args:
        seen: axis down.
        weights: the rows of axes gate (if gated), up and down.
        shape: which factors the neurons have.
        use: what is admitted.

    Raises:
        ShapeError: if there is not a row and a column for each neuron.

    >>> seen = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))  # neurons, tokens
    >>> weights = {axis: [(torch.eye(3), torch.eye(3)[[2, 0, 1]])] for axis in ("gate", "up", "down")}
    >>> both = Covariance.of_rows([(seen, seen[[2, 0, 1]])])
    >>> align_mlp_by(both, weights, MlpShape(3), Symmetries()).element.actions["gate"].index.tolist()
    [1, 2, 0]
    """
    require_axis("down", {"down": seen}, shape.neurons)
    scale = shape.scale if use.neuron_scaling else NeuronScale.none
    if not use.permutation and scale is NeuronScale.none:
        return Solved(BlockElement({}), BY_ACTIVATIONS)
    gate, up = match_neurons_by(seen, weights, scale, permute=use.permutation)
    return Solved(BlockElement({"gate": gate, "up": up, "down": up.dual()}), BY_ACTIVATIONS)


def match_neurons_by(
    seen: Covariance, weights: Sides, scale: NeuronScale, *, permute: bool
) -> tuple[Permutation, AxisAction]:
    """The actions on gate rows and on up rows of the neurons of one MLP or expert (`align_mlp_by`)."""
    pairs = NeuronPairs(*(weights.get(axis, ()) for axis in ("gate", "up", "down")))
    standing = torch.arange(len(seen.anchor), device=seen.cross.device)
    assign = best_assignment if permute else lambda _: standing
    of_weights = _weight_scores(NeuronCosts(pairs, scale))
    index, share = likeliest_order(_activation_scores(seen, scale), of_weights, assign)
    gate = Permutation(index)
    if scale is NeuronScale.none:
        return gate, gate
    factor = _factors(seen, pairs, index, scale, share)
    return gate, Chain((gate, Scaling(factor).snapped(TOLERANCE)))


def _activation_scores(seen: Covariance, scale: NeuronScale) -> Scores:
    """What each pair adds to the correlation of the activations when matched."""
    if scale is NeuronScale.none:
        return Scores.of(seen)
    score = seen.cross.abs() if scale is NeuronScale.signed else seen.cross
    score = score * seen.anchor.sqrt().unsqueeze(1) * inverse_root(seen.model)  # as large as the anchor's
    return Scores(score, inverse_root(seen.anchor.sum()).square())


def _weight_scores(costs: NeuronCosts) -> Scores:
    """The same of their weights: 1 less the squared distance, in units of what it would be if nothing agreed."""
    pairs, score = costs.pairs, costs.scores().float()
    of_anchor = [(b, a) for a, b in pairs.all]
    size = _squares(of_anchor).sum() + _squares(pairs.fixed).sum()
    b, o = (_squares(side) for side in (pairs.scaled, pairs.divided))
    if costs.scale is NeuronScale.none:
        size = size + b.sum() + o.sum()
    else:  # factors leave the product of both norms
        size = size + 2 * (b * o).sqrt().sum()
        score = score - ((b + o) / 2 - (b * o).sqrt())
    return Scores(score, 2 * inverse_root(size).square())


def _squares(side: Sequence[Pair]) -> Tensor:
    """Squared norm of each of the model's neurons [neurons], or 0 where there are no rows; float64."""
    return NeuronCosts(NeuronPairs((), side, ()), NeuronScale.none).norms() if side else torch.zeros(())


def _factors(seen: Covariance, pairs: NeuronPairs, index: Tensor, scale: NeuronScale, share: float) -> Tensor:
    """Of each neuron under a permutation: what activations and weights ask for, by their shares.

    Minimises ``‖s B − A‖² / s`` of the activations, which treats both models alike; least squares would shrink whatever
    is noisy. Neurons that no token wakes have the factor of their weights.
    """
    signed = scale is NeuronScale.signed
    of_weights = factors(pairs, index, signed=signed).double()
    anchor, model = seen.anchor, seen.model.index_select(0, index)
    shown = (anchor > 0) & (model > 0)
    size = torch.where(shown, size_ratio(anchor, model) ** (1 - share) * of_weights.abs() ** share, of_weights.abs())
    cross = seen.cross.gather(1, index.unsqueeze(1)).squeeze(1)
    sign = torch.where(shown & (cross != 0), torch.sign(cross), torch.sign(of_weights))
    return torch.where(sign < 0, -size, size) if signed else size
