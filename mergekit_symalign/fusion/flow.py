"""How transport maps flow through a model: what enters a layer decides how its units are compared.

Every linear layer gets the map of its outputs from its weights, with its inputs already in the anchor's coordinates, or
from what it computes. The residual stream carries a map of its own from layer to layer.

References: Singh & Jaggi, Model Fusion via Optimal Transport (2020); Imfeld et al., Transformer Fusion with Optimal
Transport (2024).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import partial
from typing import Any

import torch
from torch import Tensor

from mergekit_symalign.families.flow import Place
from mergekit_symalign.families.schema import ATTENTION_AXES
from mergekit_symalign.fusion.correlations import TokenSums, activation_costs
from mergekit_symalign.fusion.maps import Map, attended_map, identity, mean, over_heads
from mergekit_symalign.fusion.transport import Transported, transport, weight_costs
from mergekit_symalign.symmetry.by_activations.attention import align_attention_by
from mergekit_symalign.symmetry.element import TensorAxes, acted, rows_by_axis
from mergekit_symalign.symmetry.fitting import Values
from mergekit_symalign.symmetry.groups import Permutation
from mergekit_symalign.symmetry.heads.solve import HEAD_AXES
from mergekit_symalign.symmetry.options import Facts, HeadShape, Pair, Symmetries
from mergekit_symalign.symmetry.solve import solve_block

Action = Callable[[Tensor, int], Tensor]  # a map, or an element of a symmetry, along one axis of a tensor
NEURON_AXES = ("gate", "up")
_EVERY_HEAD = ("query", "key", "value")


class Residual(str, Enum):
    """Which map the residual stream carries on from where something is added to it."""

    mean = "mean"  # of the stream's own and the one of what is added
    branch = "branch"  # the one of what is added
    skip = "skip"  # the stream's own
    identity = "identity"  # none: the stream keeps its coordinates, and so does what is added to it
    weighted = "weighted"  # the mean, weighted by how large both are in the anchor on the prompts


class Heads(str, Enum):
    """What is done with the heads of an attention block."""

    ignore = "ignore"  # query, key and value are matched over their full width, by a map each
    respect = "respect"  # the exact alignment: KV heads as whole units, inside them what keeps the function


@dataclass(frozen=True)
class Policy:
    """The choices of a layer.

    Attributes:
        regularization: of the transport; 0: exact.
        residual, heads: as above.
    """

    regularization: float = 0.0
    residual: Residual = Residual.mean
    heads: Heads = Heads.ignore


@dataclass(frozen=True)
class Part:
    """One tensor of anchor and model.

    Attributes:
        axes: what its axes are.
        place: where it stands in the residual stream, if it is an axis of it.
        anchor, model: as stored.
    """

    axes: TensorAxes
    place: Place | None
    anchor: Tensor
    model: Tensor

    @property
    def is_matrix(self) -> bool:
        return self.anchor.ndim > 1

    def rows(self, axis: str, columns: Action | None = None) -> Pair:
        """Rows of an axis, anchor's and model's [axis, columns], with something done to the model's columns."""
        anchor, model = (rows_by_axis(x, self.axes)[axis] for x in (self.anchor, self.model))
        return anchor, model if columns is None else columns(model, 1)


Parts = Mapping[str, Part]


@dataclass(frozen=True)
class Evidence:
    """What anchor and model do on prompts, if that is what is compared.

    Attributes:
        outputs: sums over the tokens by what they are of: query, key, value, attended, gate, up, attention, mlp.
        sizes: mean absolute value of the anchor's stream and of what is added to it, by place.
        dtype: in which products were taken.
    """

    outputs: Mapping[str, TokenSums] | None = None
    sizes: Mapping[Place, float] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32

    def costs(self, names: Sequence[str], rows: Callable[[], list[Pair]]) -> Tensor:
        """Costs of the units with these outputs: from what they compute, or else from their rows."""
        if self.outputs is None:
            return weight_costs(rows())
        return activation_costs([self.outputs[name] for name in names], self.dtype)


@dataclass(frozen=True)
class Flow:
    """The maps of one model in one layer.

    Attributes:
        axes: of the axes inside the blocks.
        places: of the residual stream, and of what is added to it.
        facts: what is known of each block.
    """

    axes: Mapping[str, Action]
    places: Mapping[Place, Map]
    facts: Mapping[str, Facts] = field(default_factory=dict)

    def __call__(self, part: Part) -> Tensor:
        """The model's tensor in the anchor's coordinates."""
        actions: dict[str, Action] = dict(self.axes)
        if part.place is not None:
            actions["residual"] = self.places[part.place]
        for axis in ("query_gain", "key_gain"):
            if axis in part.axes.names and axis not in actions:
                actions[axis] = _gain_action(actions[axis.removesuffix("_gain")], part)
        acting = (action for axis, action in actions.items() if axis in part.axes.all_names())
        mixes = all(isinstance(action, Map) for action in acting)  # columns sum to one, so an offset passes through
        return acted(part.model, replace(part.axes, offset=0.0) if mixes else part.axes, actions)


def through_layer(
    parts: Parts, stream: Map, heads: HeadShape, policy: Policy, evidence: Evidence, *, parallel: bool = False
) -> Flow:
    """The maps of one model through one layer.

    Args:
        parts: the layer's tensors, by name.
        stream: the map of the residual stream that enters it.
        heads: shape of the attention.
        policy: the choices.
        evidence: what is compared beside the weights.
        parallel: attention and MLP read the same stream.

    Returns:
        Maps of all axes and places; ``places[Place.leaving]`` enters the next layer.
    """
    step = partial(_added, parts, policy=policy, evidence=evidence, like=stream)
    inner, facts = _attention(parts, stream, heads, policy, evidence)
    attention, of_attention = step(Place.attention, "attended", inner["attended"])
    own = _junction(policy, evidence, (stream, Place.entering), (attention, Place.attention))
    middle = stream if parallel else own
    neurons = _solved(policy, evidence, NEURON_AXES, lambda: _readers(parts, NEURON_AXES, middle))
    mlp, of_mlp = step(Place.mlp, "down", neurons.map)
    if parallel:
        both = mean((attention, mlp), (0.5, 0.5))
        leaving = _junction(policy, evidence, (stream, Place.entering), (both, Place.mlp))
    else:
        leaving = _junction(policy, evidence, (middle, Place.middle), (mlp, Place.mlp))
    places = {Place.entering: stream, Place.attention: attention, Place.middle: middle, Place.mlp: mlp}
    known = {"attention": {**facts, **of_attention}, "mlp": {**_facts("neurons", neurons), **of_mlp}}
    return Flow(
        {**inner, **dict.fromkeys(("gate", "up", "down"), neurons.map)}, {**places, Place.leaving: leaving}, known
    )


def through_front(parts: Parts, size: int, policy: Policy, evidence: Evidence) -> Flow:
    """The maps in front of the layers: of the embeddings of words (or patches) and of positions, and of their sum.

    From activations there is one map, of what enters the first layer.

    Args:
        parts: all tensors in front of the layers.
        size: of the residual stream.
        policy: the choices.
        evidence: with ``outputs["stream"]``, what enters the first layer.
    """
    device = next(iter(parts.values())).anchor.device
    added = (Place.words, Place.positions)
    if policy.residual is Residual.identity:
        return Flow({}, dict.fromkeys((*added, Place.front), identity(size, device)))
    if evidence.outputs is not None:
        found = transport(evidence.costs(("stream",), list), policy.regularization)
        return Flow({}, dict.fromkeys((*added, Place.front), found.map), {"stream": _facts("stream", found)})
    tables = {at: [p.rows("residual") for p in parts.values() if p.place is at and p.is_matrix] for at in added}
    solved = {at: transport(weight_costs(rows), policy.regularization) for at, rows in tables.items() if rows}
    facts = {"stream": {k: v for at, x in solved.items() for k, v in _facts(at.value, x).items()}}
    maps: dict[Place, Map] = {at: x.map for at, x in solved.items()}
    both = [maps[at] for at in (Place.positions, Place.words) if at in maps]  # skip, then branch
    front = both[0] if len(both) == 1 else _junction(policy, evidence, (both[0], None), (both[1], None))
    return Flow({}, {**maps, Place.front: front}, facts)


def through_end(parts: Parts, stream: Map, words: Map, policy: Policy, *, tied: bool) -> Flow:
    """The maps behind the layers: what reads the stream takes its map, and what it predicts is not transported.

    The hidden layer of a task head is matched by its weights, whatever the other layers are matched by.

    Args:
        parts: all tensors behind the layers.
        stream: the map of the residual stream that leaves the last layer.
        words: the map of the embedding.
        policy: the choices.
        tied: whether the matrix that predicts words is the embedding.
    """
    hidden = next((p for p in parts.values() if p.place is Place.hidden), None)
    axes: dict[str, Action] = {}
    if hidden is not None:
        classifies = any(p.place is Place.output and "vocabulary" not in p.axes.names for p in parts.values())
        own = classifies or not tied
        costs = weight_costs([hidden.rows("hidden", stream)]) if own else None
        axes["hidden"] = words if costs is None else transport(costs, policy.regularization).map
    return Flow(axes, {**dict.fromkeys(Place, stream), Place.words: words})


def _attention(
    parts: Parts, stream: Map, heads: HeadShape, policy: Policy, evidence: Evidence
) -> tuple[dict[str, Action], Facts]:
    """Actions on query, key, value and attended (and gains, if heads are respected)."""
    if policy.heads is Heads.respect:
        return _exact_attention(parts, stream, heads, evidence)
    solved = {
        axis: _solved(policy, evidence, (axis,), partial(_readers, parts, (axis,), stream)) for axis in _EVERY_HEAD
    }
    maps = {axis: x.map for axis, x in solved.items()}
    attended = attended_map(maps["value"], maps["query"], heads.kv_heads, heads.head_dim)
    facts = {name: value for axis, x in solved.items() for name, value in _facts(axis, x).items()}
    return {**maps, "attended": attended}, facts


def _exact_attention(
    parts: Parts, stream: Map, heads: HeadShape, evidence: Evidence
) -> tuple[dict[str, Action], Facts]:
    """The symmetry that the aligned methods would find, with the residual stream already transported."""
    sides: dict[str, list[Pair]] = {}
    for part in parts.values():
        for axis in part.axes.all_names() & ATTENTION_AXES:
            sides.setdefault(axis, []).append(
                part.rows(axis, stream if part.place is not None and part.is_matrix else None)
            )
    align = None
    if evidence.outputs is not None:
        seen = {axis: evidence.outputs[axis].covariance() for axis in HEAD_AXES}
        align = partial(align_attention_by, seen, shape=heads, use=Symmetries())
    solved = solve_block(sides, heads, Symmetries(), align and (lambda rows: align(weights=rows)), values=Values.finite)
    actions: dict[str, Any] = dict(solved.element.actions)
    return {**dict.fromkeys(ATTENTION_AXES, _stays), **actions}, dict(solved.facts)


def _stays(x: Tensor, dim: int) -> Tensor:
    return x


def _readers(parts: Parts, axes: Sequence[str], stream: Map) -> list[Pair]:
    """Rows of the matrices that write these axes, with the model's stream transported."""
    written = ((axis, p) for axis in axes for p in parts.values() if axis in p.axes.all_names() and p.is_matrix)
    return [part.rows(axis, stream) for axis, part in written if part.place is not None]


def _added(
    parts: Parts, place: Place, read: str, action: Action, *, policy: Policy, evidence: Evidence, like: Map
) -> tuple[Map, Facts]:
    """The map of what a block adds to the stream, where its inputs are acted upon."""
    if policy.residual is Residual.identity:
        return like, {}
    writers = [p for p in parts.values() if p.place is place and read in p.axes.all_names()]
    found = _solved(policy, evidence, (place.value,), lambda: [p.rows("residual", action) for p in writers])
    return found.map, _facts("output", found)


def _solved(policy: Policy, evidence: Evidence, axes: Sequence[str], rows: Callable[[], list[Pair]]) -> Transported:
    if evidence.outputs is not None:
        axes = [axis for axis in axes if axis in evidence.outputs]  # a plain MLP has no gate
    return transport(evidence.costs(axes, rows), policy.regularization)


def _junction(
    policy: Policy, evidence: Evidence, skip: tuple[Map, Place | None], branch: tuple[Map, Place | None]
) -> Map:
    """The map of the stream behind a point where something is added to it."""
    (own, before), (added, what) = skip, branch
    share = 0.5
    if policy.residual is Residual.weighted and before is not None and what is not None:
        sizes = evidence.sizes[before], evidence.sizes[what]
        share = sizes[0] / sum(sizes) if sum(sizes) > 0 else 0.5
    shares = {Residual.skip: 1.0, Residual.identity: 1.0, Residual.branch: 0.0}
    share = shares.get(policy.residual, share)
    if share in (0.0, 1.0):
        return own if share else added
    return mean((own, added), (share, 1 - share))


def _gain_action(of: Action, part: Part) -> Action:
    """What a gain takes: the map of its axis, or its mean over the heads where all heads share it."""
    assert isinstance(of, Map)
    length = part.axes.read(part.anchor).shape[0]
    size = of.size if isinstance(of, Permutation) else len(of.matrix)
    return of if length == size else over_heads(of, length)


def _facts(name: str, found: Transported) -> Facts:
    facts: Facts = {f"{name}_cost_before": found.before, f"{name}_cost_after": found.after}
    if found.error:
        facts[f"{name}_marginal_error"] = found.error
    return facts
