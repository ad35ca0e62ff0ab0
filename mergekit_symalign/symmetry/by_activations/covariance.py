"""Cross-covariances of anchor and model along one axis, and the same problems solved from them (docs/activations.md).

Whatever the solvers ask of rows is a product over columns. `Covariance` holds those products, so rows need not be kept:
the columns may be the tokens of a calibration set that streams by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import add

import torch
from torch import Tensor

from mergekit_symalign.errors import ShapeError
from mergekit_symalign.symmetry.assignment.linear import best_assignment, identity_is_optimal
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.fitting import require_shape
from mergekit_symalign.symmetry.groups import AxisAction, Chain, HeadRotation, Permutation, Scaling
from mergekit_symalign.symmetry.heads.bounds import whole_bounds
from mergekit_symalign.symmetry.heads.match import HeadProblem, MatchedHeads, match_heads
from mergekit_symalign.symmetry.heads.moments import Moments
from mergekit_symalign.symmetry.heads.of_keys import joined_rows, with_attended, with_own_values
from mergekit_symalign.symmetry.heads.order import HeadOrder, after, reordered_gains
from mergekit_symalign.symmetry.heads.pairs import GroupMoments
from mergekit_symalign.symmetry.heads.shared import orders, reordered, shared_order
from mergekit_symalign.symmetry.heads.solve import (
    GAIN_AXES,
    HEAD_AXES,
    AttentionMoments,
    HeadActions,
    query_actions,
    solve_gains,
    solve_query,
    solve_values,
    value_actions,
)
from mergekit_symalign.symmetry.neurons.costs import NeuronCosts, NeuronPairs
from mergekit_symalign.symmetry.options import (
    HeadShape,
    HeadValues,
    MlpShape,
    NeuronScale,
    Pair,
    Rotation,
    Sides,
    Symmetries,
)
from mergekit_symalign.symmetry.rows import compute_dtype
from mergekit_symalign.symmetry.solved import Solved

BY_ACTIVATIONS = {"objective": "activations"}  # what is known of such a solve
PRIOR = 1e-5  # weight of the weights beside the activations, both in units of their own norm
_SILENT = 1e-5  # largest score of neurons that no prompt wakes, in units of the others' mean
_TOLERANCE = 1e-6  # below this an angle or a factor's distance from 1 is rounding of sums in float32


@dataclass(frozen=True)
class Covariance:
    """Products of one axis over all columns (tokens, or the columns of weights).

    Attributes:
        cross: [n, n], ``A Bᵀ``.
        anchor: [n], squared norm of each of the anchor's coordinates.
        model: [n], the same of the model's.

    Raises:
        ShapeError: if they do not fit together.
    """

    cross: Tensor
    anchor: Tensor
    model: Tensor

    def __post_init__(self) -> None:
        n = len(self.anchor)
        for name, shape in (("anchor", (n,)), ("model", (n,)), ("cross", (n, n))):
            require_shape(f"{name} of Covariance", getattr(self, name), shape)

    @staticmethod
    def of_rows(side: Sequence[Pair]) -> Covariance:
        """Of matrices with this axis first, anchor's and model's [n, columns] each."""

        def of_pair(anchor: Tensor, model: Tensor) -> Covariance:
            a, b = (x.to(compute_dtype(x.dtype)) for x in (anchor, model))
            return Covariance((a @ b.mT).double(), a.double().square().sum(-1), b.double().square().sum(-1))

        return reduce(add, (of_pair(*pair) for pair in side))

    def __add__(self, other: Covariance) -> Covariance:
        return Covariance(self.cross + other.cross, self.anchor + other.anchor, self.model + other.model)

    def scaled(self, anchor: Tensor, model: Tensor) -> Covariance:
        """With every coordinate in units of its own, [n] each."""
        cross = self.cross * anchor.unsqueeze(1) * model
        return Covariance(cross, self.anchor * anchor.square(), self.model * model.square())

    def reordered(self, permutation: Permutation) -> Covariance:
        """With the model's coordinates in another order."""
        return Covariance(self.cross.index_select(1, permutation.index), self.anchor, permutation.transform(self.model))

    def by_head(self, heads: int) -> Tensor:
        """Blocks of ``A Bᵀ`` of every pair of heads [heads, heads, d, d]."""
        return self.cross.unflatten(1, (heads, -1)).unflatten(0, (heads, -1)).transpose(1, 2)

    def moments(self, heads: int, kv_heads: int) -> Moments:
        """Of heads that are paired as they stand, summed over the query heads of each group."""
        paired = self.by_head(heads).diagonal(dim1=0, dim2=1).movedim(-1, 0)
        return Moments(paired, self.model.unflatten(0, (heads, -1))).per_kv_head(kv_heads)


Covariances = Mapping[str, Covariance]


def align_attention_by(seen: Covariances, weights: Sides, shape: HeadShape, use: Symmetries) -> Solved:
    """Match heads, value/output and query/key by their activations.

    Queries and keys (in front of RoPE and of QK-norm) are matched as rows of weights are. Values and attended values
    are both written by the model's value coordinates, so both carry the same rotation; their scale is the one that
    makes the model's as large as the anchor's. Directions that no token shows are left where the weights put them: the
    weights count 1e-5 of the activations. The gains of a QK-norm are matched as they are.

    Args:
        seen: axes query, key, value, attended.
        weights: the rows of the same axes, and of the gains.
        shape: heads of the block.
        use: what is admitted.

    Raises:
        ShapeError: if an axis is missing or has another length than the shape says.

    >>> shape = HeadShape(query_heads=2, kv_heads=2, head_dim=4, rotary=4)
    >>> seen = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))  # coordinates, tokens
    >>> order = [4, 5, 6, 7, 0, 1, 2, 3]  # the two heads, in the other order
    >>> both = {axis: Covariance.of_rows([(seen, seen[order])]) for axis in HEAD_AXES}
    >>> weights = {axis: [(seen[:, :16], seen[order, :16])] for axis in HEAD_AXES}
    >>> found = align_attention_by(both, weights, shape, Symmetries())
    >>> torch.allclose(found.element.actions["query"](seen[order], 0), seen, atol=1e-5)
    True
    """
    for axis in HEAD_AXES:
        if axis != "value" or not shape.of_keys:
            _require_axis(axis, seen, shape.heads(axis) * shape.head_dim)
    if shape.of_keys:
        joined = {**seen, "query": _per_layer(seen["query"]) + _per_layer(seen["attended"])}
        joined |= {axis: _nothing(shape.heads(axis) * shape.head_dim, seen["key"]) for axis in ("value", "attended")}
        found = align_attention_by(joined, joined_rows(weights, shape), with_own_values(shape), use)
        return replace(found, element=BlockElement(with_attended(found.element.actions)))
    blended = _blended(seen, weights, shape)
    gains: Sides = {axis: weights[axis] for axis in GAIN_AXES if axis in weights}
    if not shape.one_order or use.rotation is Rotation.none:
        return _aligned_heads(blended, seen, gains, shape, use)

    def moments(order: HeadOrder | None) -> AttentionMoments:
        moved = blended if order is None else _reordered(blended, _of_heads(order, shape))
        return HeadProblem(HeadCovariances(moved, shape, use)).standing

    def source(order: Tensor) -> HeadCovariances:
        return HeadCovariances(_reordered(blended, orders(order, shape)), shape, use)

    shared = shared_order(source, moments, _grain_of(gains))
    of_axes = orders(shared.order, shape)
    gains = reordered(gains, shared.order, shape)
    solved = _aligned_heads(_reordered(blended, of_axes), _reordered(seen, of_axes), gains, shape, use, shared.heads)
    return Solved(BlockElement(shared.before(solved.element.actions, shape)), solved.facts)


def _aligned_heads(
    blended: Covariances,
    seen: Covariances,
    gains: Sides,
    shape: HeadShape,
    use: Symmetries,
    matched: MatchedHeads | None = None,
) -> Solved:
    """The same without an order of the coordinates that is one for all heads, and for heads that may be matched."""
    problem = HeadProblem(HeadCovariances(blended, shape, use))
    if matched is None:
        matched = match_heads(problem)
    order = matched.order
    if order is not None:
        moved = _of_heads(order, shape)
        problem = HeadProblem(HeadCovariances(_reordered(blended, moved), shape, use))
        seen = _reordered(seen, moved)
        gains = reordered_gains(gains, order, shape)
    found = problem.standing_actions
    if shape.own_orders:
        found = replace(found, query=solve_query(problem.standing, shape, use, _grain_of(gains)))
    actions: dict[str, AxisAction] = {}
    scaled = use.scaling and shape.values is not HeadValues.normed
    value = _with_scale(found.value, seen, shape) if scaled else found.value
    if value is not None:
        actions |= value_actions(value, shape)
    if found.query is not None:
        actions |= query_actions(found.query, shape)
    actions |= solve_gains(gains, shape, use, found.query)
    actions = {axis: action.snapped(_TOLERANCE) for axis, action in actions.items()}
    return Solved(BlockElement(actions if order is None else after(order, actions, shape)), BY_ACTIVATIONS)


def _nothing(size: int, like: Covariance) -> Covariance:
    """Of coordinates that no token shows."""
    return Covariance(like.cross.new_zeros(size, size), like.anchor.new_zeros(size), like.model.new_zeros(size))


def _of_heads(order: HeadOrder, shape: HeadShape) -> dict[str, Permutation]:
    return {axis: order.permutation(axis, shape.head_dim) for axis in HEAD_AXES}


def _reordered(of_axes: Covariances, orders: Mapping[str, Permutation]) -> dict[str, Covariance]:
    return {axis: c.reordered(orders[axis]) if axis in orders else c for axis, c in of_axes.items()}


def align_mlp_by(seen: Covariance, weights: Sides, shape: MlpShape, use: Symmetries) -> Solved:
    """Match the neurons of an MLP by what they hand to the down projection.

    Maximises ``Σ_i C[i, π(i)]`` of the cross-covariance ``C``. With ``neuron_scaling`` each pair has the factor that
    makes the model's neuron as large as the anchor's, with the sign of their covariance. Neurons that stay silent on
    all prompts are matched among themselves by their weights.

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
    _require_axis("down", {"down": seen}, shape.neurons)
    scale = shape.scale if use.neuron_scaling else NeuronScale.none
    if not use.permutation and scale is NeuronScale.none:
        return Solved(BlockElement({}), BY_ACTIVATIONS)
    gate, up = match_neurons_by(seen, weights, scale, permute=use.permutation)
    return Solved(BlockElement({"gate": gate, "up": up, "down": up.dual()}), BY_ACTIVATIONS)


def _require_axis(axis: str, seen: Covariances, length: int) -> None:
    if axis not in seen:
        raise ShapeError(f"axis {axis}", "nothing was measured of it", "Pass a Covariance for each axis of the block")
    require_shape(f"what was measured of axis {axis}", seen[axis].anchor, (length,))


def match_neurons_by(
    seen: Covariance, weights: Sides, scale: NeuronScale, *, permute: bool
) -> tuple[Permutation, AxisAction]:
    """The actions on gate rows and on up rows of the neurons of one MLP or expert (`align_mlp_by`)."""
    index = torch.arange(len(seen.anchor), device=seen.cross.device)
    if permute:
        index = best_assignment(_neuron_scores(seen, weights, scale))
    gate = Permutation(index)
    if scale is NeuronScale.none:
        return gate, gate
    cross = seen.cross.gather(1, index.unsqueeze(1)).squeeze(1)
    size = _size_ratio(seen.anchor, seen.model.index_select(0, index))
    factor = torch.where(cross < 0, -size, size) if scale is NeuronScale.signed else size
    return gate, Chain((gate, Scaling(factor).snapped(_TOLERANCE)))


@dataclass(frozen=True)
class HeadCovariances:
    """Covariances of a block's axes, as a `HeadSource`. Values come in units of their own norm.

    Attributes:
        covariances: axes query, key, value, attended.
        shape, use: as for the block.
    """

    covariances: Covariances
    shape: HeadShape
    use: Symmetries

    @cached_property
    def own(self) -> AttentionMoments:
        heads = {axis: self.shape.heads(axis) for axis in HEAD_AXES}
        return AttentionMoments(**{axis: self.covariances[axis].moments(n, n) for axis, n in heads.items()})

    def solve(self, m: AttentionMoments) -> HeadActions:
        value = solve_values(m, self.shape, replace(self.use, scaling=False))
        return HeadActions(value, solve_query(m, self.shape, self.use))

    def identity_route(self, costs: Tensor) -> str | None:
        return "bounds" if identity_is_optimal(costs, self.lower_bounds) else None

    def bounds(self) -> tuple[Tensor, None]:
        return self.lower_bounds, None

    def query_heads_stay(self, found: HeadActions) -> bool:
        return self.shape.queries_per_kv == 1

    @cached_property
    def lower_bounds(self) -> Tensor:
        """Lower bounds of the pairs' costs [KV heads, KV heads]."""
        scale = self.use.scaling and not (self.shape.qk_norm or self.shape.unit)
        norms = {axis: (self._of_groups(c.anchor), self._of_groups(c.model)) for axis, c in self.covariances.items()}
        value, key = (self.all_pairs(axis) for axis in ("value", "key"))
        turning = self.shape.turning(self.use.rotation)
        return whole_bounds(norms, value, key, turning, scale_values=False, scale_queries=scale)

    def all_pairs(self, axis: str) -> Moments:
        k, c = self.shape.kv_heads, self.covariances[axis]
        return Moments(c.by_head(k), c.model.unflatten(0, (k, -1)).expand(k, k, -1))

    def group_moments(self, axis: str, i: Tensor, j: Tensor) -> GroupMoments:
        k, c = self.shape.kv_heads, self.covariances[axis]
        group = self.shape.heads(axis) // k
        pairs = c.by_head(k * group).unflatten(1, (k, group)).unflatten(0, (k, group)).transpose(1, 2)
        at = (i * k + j.to(i)).long()
        return GroupMoments(
            pairs.flatten(0, 1).index_select(0, at), c.model.unflatten(0, (k, group, -1)).index_select(0, j)
        )

    def _of_groups(self, squares: Tensor) -> Tensor:
        """Sums over the query heads of each group [KV heads, d]."""
        return squares.unflatten(0, (self.shape.kv_heads, -1, self.shape.head_dim)).sum(1)


def _blended(seen: Covariances, weights: Sides, shape: HeadShape) -> dict[str, Covariance]:
    """Activations and a grain of weights, each in units of its own norm.

    Values and outputs are taken relative to the norm of each KV head of either model, which takes their scale out of
    the problem; relative to the norm of each coordinate where coordinates have factors of their own. Queries and keys
    are taken relative to the anchor's in the layer, as their scale trades one against the other.
    """
    rows = {axis: Covariance.of_rows(weights[axis]) for axis in HEAD_AXES}
    sizes = [_value_sizes(seen, side, shape) for side in (0, 1)]
    own = [_value_sizes(rows, side, shape) for side in (0, 1)]
    result = {}
    for axis in HEAD_AXES:
        if axis in ("value", "attended"):
            one, other = _in_units(seen[axis], sizes, shape), _in_units(rows[axis], own, shape)
        else:
            one, other = (_per_layer(c) for c in (seen[axis], rows[axis]))
        result[axis] = _blend(one, other)
    return result


def with_grain(seen: Covariance, weights: Covariance) -> Covariance:
    """Activations and a grain of weights, each in units of the anchor's norm."""
    return _blend(_per_layer(seen), _per_layer(weights))


def _blend(one: Covariance, other: Covariance) -> Covariance:
    grain = torch.full_like(other.anchor, PRIOR**0.5)
    return one + other.scaled(grain, grain)


def _grain_of(gains: Sides) -> Sides:
    """The gains of a QK-norm, so small that they count as much as weights beside activations."""
    size = torch.stack([a.double().square().sum() for pairs in gains.values() for a, _ in pairs]).sum()
    unit = PRIOR**0.5 * _inverse_root(size)
    return {axis: [(a * unit, b * unit) for a, b in pairs] for axis, pairs in gains.items()}


def _value_sizes(of_axes: Covariances, side: int, shape: HeadShape) -> Tensor:
    """Squared norm of values and attended values of each KV head, its query heads together [KV heads, 1].

    Where each coordinate has a factor of its own, the squared norm of each of them [KV heads, d].
    """
    sides = ((c.anchor, c.model)[side] for c in (of_axes["value"], of_axes["attended"]))
    sizes = torch.stack([x.unflatten(0, (shape.kv_heads, -1, shape.head_dim)).sum(1) for x in sides]).sum(0)
    return sizes if shape.gated else sizes.sum(-1, keepdim=True)


def _in_units(c: Covariance, sizes: Sequence[Tensor], shape: HeadShape) -> Covariance:
    anchor, model = (_inverse_root(size) * size.numel() ** -0.5 for size in sizes)
    heads = len(c.anchor) // shape.head_dim // shape.kv_heads
    wide = (x.repeat_interleave(heads, dim=0).expand(-1, shape.head_dim).flatten() for x in (anchor, model))
    return c.scaled(*wide)


def _per_layer(c: Covariance) -> Covariance:
    unit = _inverse_root(c.anchor.sum()).expand_as(c.anchor)
    return c.scaled(unit, unit)


def _inverse_root(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1.0).rsqrt()


def _with_scale(g: AxisAction | None, seen: Covariances, shape: HeadShape) -> AxisAction:
    """The same action with the scale that makes the model's values as large as the anchor's: of each head, or of each
    coordinate where each has a factor of its own.

    Minimises ``‖s V_B − V_A‖² / s``, which treats both alike; least squares would shrink whatever is noisy.
    """
    anchor, model = (_value_sizes(seen, side, shape) for side in (0, 1))
    if not shape.gated:
        ratio, d = _size_ratio(anchor, model).flatten(), shape.head_dim
        matrix = torch.eye(d, dtype=ratio.dtype, device=ratio.device).expand(len(ratio), d, d)
        return HeadRotation(g.matrix if isinstance(g, HeadRotation) else matrix, ratio)
    moved = model.reshape(-1, 1) if g is None else g.transform(model.reshape(-1, 1)).abs()
    factors = Scaling(_size_ratio(anchor.flatten(), moved.flatten()))
    return factors if g is None else Chain((*(g.steps if isinstance(g, Chain) else (g,)), factors))


def _size_ratio(anchor: Tensor, model: Tensor) -> Tensor:
    """``√(anchor / model)`` of squared norms; 1 where either shows nothing."""
    shown = (anchor > 0) & (model > 0)
    return torch.where(shown, anchor / torch.where(shown, model, 1.0), 1.0).sqrt()


def _neuron_scores(seen: Covariance, weights: Sides, scale: NeuronScale) -> Tensor:
    """What each pair of neurons contributes when matched [neurons, neurons]."""
    score = seen.cross
    if scale is not NeuronScale.none:
        score = score.abs() if scale is NeuronScale.signed else score
        score = score * seen.anchor.sqrt().unsqueeze(1) * _inverse_root(seen.model)
    rows, columns = _silent(seen.anchor), _silent(seen.model)
    if rows is None or columns is None:
        return score
    sides = (
        [(a.index_select(0, rows), b.index_select(0, columns)) for a, b in weights.get(axis, ())]
        for axis in ("gate", "up", "down")
    )
    silent = NeuronCosts(NeuronPairs(*sides), scale).scores()
    size = score.abs().mean()
    unit = torch.where(size > 0, _SILENT * size, 1.0)  # if all are silent, there is nothing to be smaller than
    silent = silent * (unit / silent.abs().max().clamp_min(torch.finfo(silent.dtype).tiny))
    return score.index_put((rows.unsqueeze(1), columns), silent.to(score.dtype))


def _silent(squares: Tensor) -> Tensor | None:
    """Which neurons no token wakes, or None if there are none."""
    index = torch.nonzero(squares <= 0).flatten()
    return index if len(index) else None
