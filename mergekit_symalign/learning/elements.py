"""What is learned of an element: its numbers as leaves, and the element that they make.

An element is taken apart into what stays (orders of coordinates, signs) and numbers. What stays is applied to the model
once. The numbers then act on the result, in each step anew.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from mergekit_symalign.learning.adam import Leaf
from mergekit_symalign.learning.canonical import canonical, shortest
from mergekit_symalign.learning.manifolds import Flat, Invertible, Log, Manifold, MeanKeeping, Orthogonal
from mergekit_symalign.learning.orders import Scores, SoftOrder, first_scores, straight_through
from mergekit_symalign.symmetry.admitted import gain_heads
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import (
    AxisAction,
    Chain,
    HeadMatrix,
    HeadRotation,
    PartialRotation,
    PerHead,
    PlaneRotation,
    Rotation,
    Scaling,
    rotary_action,
)
from mergekit_symalign.symmetry.heads.gated import GATE
from mergekit_symalign.symmetry.heads.order import moved_axes
from mergekit_symalign.symmetry.heads.solve import GAIN_AXES, HEAD_AXES, NUMBERS, query_actions, value_actions
from mergekit_symalign.symmetry.options import (
    BlockShape,
    HeadShape,
    HeadValues,
    LatentShape,
    MlpShape,
    NeuronScale,
    Symmetries,
    ValueOutput,
)
from mergekit_symalign.symmetry.options import Rotation as Turns
from mergekit_symalign.symmetry.residual.kinds import GAIN, STREAM, ResidualKind
from mergekit_symalign.symmetry.solve import without_identities

Numbers = Mapping[str, Tensor]
_SCALES = ("scale", "plane_scale")  # of queries and keys
_QUERIES = ("query", "attended", GATE, "query_gain", NUMBERS)  # axes that have every query head


class Learned(ABC):
    """An element of which some numbers are learned.

    Attributes:
        fixed: what stays of it, and acts first.
        numbers: all other numbers, by name, float64.
        manifolds: of those that are learned.
    """

    fixed: BlockElement
    numbers: Numbers
    manifolds: Mapping[str, Manifold]

    @abstractmethod
    def element(self, numbers: Numbers) -> BlockElement:
        """What acts behind ``fixed``; a differentiable function of the numbers."""

    def leaves(self) -> dict[str, Leaf]:
        """What is learned."""
        return {name: Leaf(self.numbers[name], manifold) for name, manifold in self.manifolds.items()}

    def acting(self, numbers: Numbers) -> BlockElement:
        """`element` with the learned numbers in place of those at the start, on their device and in their dtype."""
        like = next(iter(numbers.values()), None)
        rest = {name: x if like is None else x.to(like) for name, x in self.numbers.items() if name not in numbers}
        return self.element({**rest, **numbers})

    def composed(self, numbers: Numbers) -> BlockElement:
        """The whole element, exactly a member of its group, float64 on the CPU."""
        exact = {name: manifold.exact(numbers[name].cpu()) for name, manifold in self.manifolds.items()}
        acting = self.acting(exact).actions
        axes = dict.fromkeys((*self.fixed.actions, *acting))
        steps = {axis: tuple(of[axis] for of in (self.fixed.actions, acting) if axis in of) for axis in axes}
        return without_identities(BlockElement({axis: shortest(Chain(of)) for axis, of in steps.items()}))


@dataclass(frozen=True)
class Still(Learned):
    """An element of which nothing is learned: heads that share a latent stay as they were solved."""

    fixed: BlockElement
    numbers: Numbers = field(default_factory=dict)
    manifolds: Mapping[str, Manifold] = field(default_factory=dict)

    def element(self, numbers: Numbers) -> BlockElement:
        return BlockElement({})


@dataclass(frozen=True)
class LearnedStream(Learned):
    """The residual stream's element: its rotation, if it has one."""

    fixed: BlockElement
    numbers: Numbers = field(default_factory=dict)
    manifolds: Mapping[str, Manifold] = field(default_factory=dict)

    @staticmethod
    def of(element: BlockElement, kind: ResidualKind, hidden: int, *, orders: bool = False) -> LearnedStream:
        """
        Args:
            element: where to start; a permutation is a rotation too.
            kind: what it is to be.
            hidden: size of the stream.
            orders: whether a permutation is learned.
        """
        if not kind.rotates:
            learned = orders and kind is not ResidualKind.none
            numbers = {"scores": first_scores(1, hidden)} if learned else {}
            return LearnedStream(element, numbers, {"scores": Scores()} if learned else {})
        eye = torch.eye(hidden, dtype=torch.float64)
        action = element.actions.get(STREAM)
        start = eye if action is None else action(eye, 0)
        manifold = MeanKeeping() if kind is ResidualKind.mean_keeping_rotation else Orthogonal()
        return LearnedStream(BlockElement({}), {"matrix": start}, {"matrix": manifold})

    def element(self, numbers: Numbers) -> BlockElement:
        if "scores" in numbers:
            order = SoftOrder(straight_through(numbers["scores"]))
            return BlockElement({STREAM: order, GAIN: order})
        return BlockElement({STREAM: Rotation(numbers["matrix"])} if numbers else {})


@dataclass(frozen=True)
class LearnedHeads(Learned):
    """An attention block's element: values, planes or rotations of queries, factors of a QK-norm's gains.

    Attributes:
        shape: of the heads.
        general: whether values carry any invertible matrix.
    """

    shape: HeadShape
    general: bool
    fixed: BlockElement
    numbers: Numbers
    manifolds: Mapping[str, Manifold]

    @staticmethod
    def of(element: BlockElement, shape: HeadShape, use: Symmetries, *, orders: bool = False) -> LearnedHeads:
        lengths = {axis: shape.heads(axis) * shape.head_dim for axis in HEAD_AXES}
        if shape.qk_norm:
            lengths |= {axis: gain_heads(axis, shape) * shape.head_dim for axis in GAIN_AXES}
        lengths |= {NUMBERS: shape.query_heads} if shape.numbered else {}
        lengths |= {GATE: lengths["attended"]} if shape.gated else {}
        if shape.of_keys:
            del lengths["value"]
        parts = {axis: canonical(element.actions.get(axis), size) for axis, size in lengths.items()}
        fixed: dict[str, AxisAction] = {axis: part.order for axis, part in parts.items()}
        value = parts["value"].step if "value" in parts else None
        wanted = use.value_output is ValueOutput.general and shape.values is HeadValues.free
        general = wanted or isinstance(value, HeadMatrix)
        numbers = _values(value, shape, general=general)
        if shape.qk_norm:
            for axis in ("query", "key", *(("attended",) if shape.of_keys else ())):
                step = parts[axis].step
                fixed[axis] = fixed[axis] if step is None else Chain((fixed[axis], step))
            numbers |= _factors(parts["key_gain"].step, lengths["key_gain"], shape)
        else:
            key = parts["key"].step
            numbers |= _queries(None if key is None else key.dual(), shape)
        if orders and use.heads and not shape.locked:
            sizes = {"kv_scores": (1, shape.kv_heads), "query_scores": (shape.kv_heads, shape.queries_per_kv)}
            numbers |= {name: first_scores(*size) for name, size in sizes.items() if size[1] > 1}
        lost = (*(("value_scale",) if shape.values is HeadValues.normed else ()), *(_SCALES if shape.unit else ()))
        bare = replace(use, scaling=False)
        found = {name: _manifold(name, bare if name in lost else use, general=general) for name in numbers}
        manifolds = {name: manifold for name, manifold in found.items() if manifold is not None}
        return LearnedHeads(shape, general, BlockElement(fixed), numbers, manifolds)

    def element(self, numbers: Numbers) -> BlockElement:
        value: AxisAction | None = None
        if self.shape.of_keys:
            pass
        elif self.shape.gated:
            value = Scaling(numbers["value_factor"].exp() * numbers["value_sign"])
        elif self.general:
            value = HeadMatrix(numbers["value_matrix"])
        else:
            value = HeadRotation(numbers["value_matrix"], numbers["value_scale"].exp())
        actions: dict[str, AxisAction] = {}
        if value is not None:
            actions |= value_actions(value, self.shape)
        actions |= self._gains(numbers) if self.shape.qk_norm else self._queries(numbers)
        orders = self._orders(numbers)
        axes = dict.fromkeys((*orders, *actions))
        steps = {axis: tuple(of[axis] for of in (orders, actions) if axis in of) for axis in axes}
        return BlockElement({axis: of[0] if len(of) == 1 else Chain(of) for axis, of in steps.items()})

    def _orders(self, numbers: Numbers) -> dict[str, AxisAction]:
        """KV heads move as wholes with their group; query heads move within it."""
        scores = [numbers.get(name) for name in ("kv_scores", "query_scores")]
        if all(x is None for x in scores):
            return {}
        group, d = self.shape.queries_per_kv, self.shape.head_dim
        one = next(x for x in scores if x is not None)
        still = [one.new_ones(n, 1, 1) for n in (1, self.shape.kv_heads)]
        kv, inner = (none if x is None else straight_through(x) for x, none in zip(scores, still, strict=True))
        query = (kv.reshape(len(inner), 1, -1, 1) * inner.unsqueeze(2)).reshape(1, len(inner) * group, -1)
        sizes = {axis: 1 if axis == NUMBERS else d for axis in moved_axes(self.shape)}
        of_axis = {axis: SoftOrder(query if axis in _QUERIES else kv, size) for axis, size in sizes.items()}
        return dict(of_axis)

    def _queries(self, numbers: Numbers) -> dict[str, AxisAction]:
        rest = HeadRotation(numbers["matrix"], numbers["scale"].exp()) if "matrix" in numbers else None
        query: PerHead | None = rest
        if "angle" in numbers:
            planes = PlaneRotation(numbers["angle"], numbers["plane_scale"].exp())
            query = rotary_action(planes, rest, interleaved=self.shape.interleaved)
        assert query is not None
        return query_actions(query, self.shape)

    def _gains(self, numbers: Numbers) -> dict[str, AxisAction]:
        """What the keys' gains are divided by, the queries' are multiplied by; both coordinates of a plane alike."""
        every, half = [*self.shape.planes(), *self.shape.rest()], self.shape.rotary // 2
        place = torch.argsort(torch.tensor(every, device=numbers["gain"].device))
        both = (torch.cat((numbers[name][:, :half], numbers[name]), -1) for name in ("gain", "gain_sign"))
        log, sign = (x.index_select(-1, place) for x in both)
        factor = log.exp() * sign
        group = gain_heads("query_gain", self.shape) // len(factor)
        wide = factor.repeat_interleave(group, dim=0)
        return {"query_gain": Scaling(wide.flatten()), "key_gain": Scaling(1 / factor.flatten())}


@dataclass(frozen=True)
class LearnedNeurons(Learned):
    """An MLP's element: the scale between up and down of each neuron, where the activation admits one."""

    fixed: BlockElement
    numbers: Numbers = field(default_factory=dict)
    manifolds: Mapping[str, Manifold] = field(default_factory=dict)
    gated: bool = True

    @staticmethod
    def of(element: BlockElement, shape: MlpShape, use: Symmetries, *, orders: bool = False) -> LearnedNeurons:
        size = shape.experts * shape.neurons
        fixed: dict[str, AxisAction] = {}
        for axis in element.actions:
            fixed[axis] = canonical(element.actions[axis], shape.experts if axis == "expert" else size).order
        numbers: dict[str, Tensor] = {}
        manifolds: dict[str, Manifold] = {}
        if shape.scale is not NeuronScale.none:
            step = canonical(element.actions.get("up"), size).step
            factor = step.factor.double() if isinstance(step, Scaling) else torch.ones(size, dtype=torch.float64)
            numbers |= {"scale": factor.abs().log(), "sign": factor.sign()}
            manifolds |= {"scale": Log()} if use.neuron_scaling else {}
        if orders and use.permutation:
            numbers |= {"scores": first_scores(shape.experts, shape.neurons)}
            manifolds |= {"scores": Scores()}
        return LearnedNeurons(BlockElement(fixed), numbers, manifolds, shape.gated)

    def element(self, numbers: Numbers) -> BlockElement:
        order = SoftOrder(straight_through(numbers["scores"])) if "scores" in numbers else None
        scale = Scaling(numbers["scale"].exp() * numbers["sign"]) if "scale" in numbers else None
        of_axis = {"gate": (order,) if self.gated else (), "up": (order, scale)}
        of_axis["down"] = (order, None if scale is None else scale.dual())
        steps = {axis: tuple(step for step in of if step is not None) for axis, of in of_axis.items()}
        return BlockElement({axis: Chain(of) for axis, of in steps.items() if of})


def learned_block(element: BlockElement, shape: BlockShape, use: Symmetries, *, orders: bool = False) -> Learned:
    """What is learned of a block's element.

    Args:
        element: where to start.
        shape: of the block.
        use: which symmetries are learned.
        orders: whether orders of heads and neurons are.
    """
    if isinstance(shape, MlpShape):
        return LearnedNeurons.of(element, shape, use, orders=orders)
    if isinstance(shape, LatentShape):
        return Still(element)
    return LearnedHeads.of(element, shape, use, orders=orders)


def _values(step: AxisAction | None, shape: HeadShape, *, general: bool) -> dict[str, Tensor]:
    heads, d = shape.kv_heads, shape.head_dim
    if shape.of_keys:
        return {}
    if shape.gated:
        factor = step.factor.double() if isinstance(step, Scaling) else torch.ones(heads * d, dtype=torch.float64)
        return {"value_factor": factor.abs().log(), "value_sign": factor.sign()}
    found = step if step is not None else _unturned(heads, d)
    if general:
        eye = torch.eye(d, dtype=torch.float64).repeat(heads, 1)
        return {"value_matrix": found.transform(eye).unflatten(0, (heads, d))}
    assert isinstance(found, HeadRotation)
    return {"value_matrix": found.matrix.double(), "value_scale": found.scale.double().log()}


def _queries(step: AxisAction | None, shape: HeadShape) -> dict[str, Tensor]:
    """What the queries of each KV head carry."""
    heads, turning, free = shape.kv_heads, shape.rotary // 2, shape.head_dim - shape.rotary
    planes = PlaneRotation(*torch.stack((torch.zeros(heads, turning), torch.ones(heads, turning))).double())
    rest = _unturned(heads, free)
    if isinstance(step, PlaneRotation):
        planes = step
    elif isinstance(step, PartialRotation):
        planes, rest = step.planes, step.rest
    elif isinstance(step, HeadRotation):
        rest = step
    turned = {"angle": planes.angle.double(), "plane_scale": planes.scale.double().log()} if turning else {}
    return turned | ({"matrix": rest.matrix.double(), "scale": rest.scale.double().log()} if free else {})


def _factors(step: AxisAction | None, size: int, shape: HeadShape) -> dict[str, Tensor]:
    """The logarithms and signs of what the keys' gains are divided by: of each plane, then of each other coordinate."""
    factor = 1 / step.factor.double() if isinstance(step, Scaling) else torch.ones(size, dtype=torch.float64)
    free = [*shape.planes()[: shape.rotary // 2], *shape.rest()]
    own = factor.unflatten(0, (-1, shape.head_dim))[:, free]
    return {"gain": own.abs().log(), "gain_sign": own.sign()}


def _unturned(heads: int, d: int) -> HeadRotation:
    eye = torch.eye(d, dtype=torch.float64).repeat(heads, 1, 1)
    return HeadRotation(eye, torch.ones(heads, dtype=torch.float64))


def _manifold(name: str, use: Symmetries, *, general: bool) -> Manifold | None:
    """Where a number of a head lives; None if it is not learned."""
    if name == "value_matrix" and general:
        return Invertible(use.condition)
    if name.endswith("scores"):
        return Scores()
    if name.endswith("matrix"):
        return Orthogonal() if use.rotation is not Turns.none else None
    if name == "angle":
        return Flat() if use.rotation is not Turns.none else None
    return Log() if use.scaling and not name.endswith("sign") else None
