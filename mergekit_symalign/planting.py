"""Random exact symmetries: the same function in foreign coordinates. For tests, demos and trying alignment out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.families.towers import Layer
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import (
    AxisAction,
    Chain,
    HeadMatrix,
    HeadRotation,
    Permutation,
    PlaneRotation,
    Rotation,
    Scaling,
    rotary_action,
)
from mergekit_symalign.symmetry.heads.order import HeadOrder, moved_axes
from mergekit_symalign.symmetry.heads.solve import per_query_head
from mergekit_symalign.symmetry.options import GainScope, HeadShape, MlpShape, NeuronScale
from mergekit_symalign.symmetry.residual.kinds import GAIN, STREAM, ResidualKind, centred_basis

Elements = dict[tuple[Layer, BlockKind], BlockElement]


@dataclass(frozen=True)
class Planted:
    """Which symmetries to plant.

    Scales are drawn log-uniformly from ``[1/spread, spread]``. With a ``condition`` above 1 values get a general matrix
    for each KV head, of at most that condition number; one of 1 leaves them a rotation and a scale.
    """

    permutation: bool = True
    heads: bool = True
    rotation: bool = True
    scaling: bool = True
    neuron_scaling: bool = False
    spread: float = 2.0
    condition: float = 1.0


def random_elements(layout: ModelLayout, seed: int, what: Planted | None = None) -> Elements:
    """A random element of the exact group of every block of a model."""
    draw = _Draw(torch.Generator().manual_seed(seed), what or Planted())
    return {block: draw.block(layout.block_shape(*block)) for block in layout.blocks()}


def random_stream(kind: ResidualKind, hidden: int, seed: int) -> BlockElement:
    """A random change of coordinates of the residual stream."""
    draw = _Draw(torch.Generator().manual_seed(seed), Planted())
    if kind is ResidualKind.none:
        return BlockElement({})
    if not kind.rotates:
        order = Permutation(draw._order(hidden))
        signs = Scaling(draw._signs(hidden))
        signed = kind is ResidualKind.signed_permutation
        return BlockElement({STREAM: Chain((order, signs)) if signed else order, GAIN: order})
    if kind is ResidualKind.rotation:
        return BlockElement({STREAM: Rotation(torch.linalg.qr(draw._normal(hidden, hidden)).Q)})
    basis = centred_basis(hidden)
    inside = basis @ torch.linalg.qr(draw._normal(hidden - 1, hidden - 1)).Q @ basis.mT
    return BlockElement({STREAM: Rotation(inside + 1 / hidden)})


def transform(state: Mapping[str, Tensor], layout: ModelLayout, elements: Elements) -> dict[str, Tensor]:
    """A state dict in other coordinates: every tensor of a block under that block's element."""
    result = {}
    for name, x in state.items():
        placed = layout.placed(name)
        if placed is None or placed.block is None:
            result[name] = x
        else:
            element = elements[placed.block]
            result[name] = element(x, placed.layout.axes(placed.claim.spec)).to(x.dtype)
    return result


@dataclass(frozen=True)
class _Draw:
    generator: torch.Generator
    what: Planted

    def block(self, shape: HeadShape | MlpShape) -> BlockElement:
        return self.mlp(shape) if isinstance(shape, MlpShape) else self.attention(shape)

    def attention(self, shape: HeadShape) -> BlockElement:
        value = self._values(shape.kv_heads, shape.head_dim)
        actions: dict[str, AxisAction] = {"value": value, "attended": per_query_head(value.dual(), shape)}
        if shape.qk_norm:
            sign = Scaling(self._norm_signs(shape))
            actions |= {"query": per_query_head(sign, shape), "key": sign} | self._gains(shape)
        else:
            query = self._query(shape)
            actions |= {"query": per_query_head(query, shape), "key": query.dual()}
        return BlockElement(self._after_head_permutation(actions, shape))

    def mlp(self, shape: MlpShape) -> BlockElement:
        neurons, experts, permute = shape.neurons, shape.experts, self.what.permutation
        order = self._order(experts) if permute else torch.arange(experts)
        inside = [self._order(neurons) if permute else torch.arange(neurons) for _ in range(experts)]
        gate = Permutation(torch.cat([x + j * neurons for x, j in zip(inside, order.tolist(), strict=True)]))
        up: AxisAction = gate
        if self.what.neuron_scaling and shape.scale is not NeuronScale.none:
            factor = self._scale(experts * neurons)
            signs = self._signs(experts * neurons) if shape.scale is NeuronScale.signed else torch.ones(())
            up = Chain((gate, Scaling(factor * signs)))
        actions: dict[str, AxisAction] = {"up": up, "down": up.dual()}
        actions |= {"gate": gate} if shape.gated else {}
        return BlockElement(actions | ({"expert": Permutation(order)} if experts > 1 else {}))

    def _query(self, shape: HeadShape) -> AxisAction:
        if shape.rotary == 0:
            return self._heads(shape.kv_heads, shape.head_dim)
        angle = self._normal(shape.kv_heads, shape.rotary // 2) * torch.pi * self.what.rotation
        planes = PlaneRotation(angle, self._scale(*angle.shape))
        free = shape.head_dim - shape.rotary
        rest = self._heads(shape.kv_heads, free) if free else None
        return rotary_action(planes, rest, interleaved=shape.interleaved)

    def _gains(self, shape: HeadShape) -> dict[str, AxisAction]:
        heads, group = (shape.kv_heads, shape.queries_per_kv) if shape.norm.per_head else (1, 1)
        half = (heads, shape.head_dim // 2)
        factor = self._paired(self._scale(*half) * self._signs(*half), shape)
        return {
            "query_gain": Scaling(factor.repeat_interleave(group, dim=0).flatten()),
            "key_gain": Scaling(1 / factor.flatten()),
        }

    def _after_head_permutation(self, actions: dict[str, AxisAction], shape: HeadShape) -> dict[str, AxisAction]:
        if not self.what.heads or shape.locked_heads:
            return actions
        kv = torch.randperm(shape.kv_heads, generator=self.generator)
        inner = [torch.randperm(shape.queries_per_kv, generator=self.generator) for _ in kv]
        order = HeadOrder(kv, (kv.unsqueeze(1) * shape.queries_per_kv + torch.stack(inner)).flatten())
        moved = moved_axes(shape)
        return {
            axis: Chain((order.permutation(axis, shape.head_dim), action)) if axis in moved else action
            for axis, action in actions.items()
        }

    def _heads(self, heads: int, d: int) -> HeadRotation:
        rotation = torch.eye(d, dtype=torch.float64).expand(heads, d, d)
        if self.what.rotation:
            rotation = torch.linalg.qr(self._normal(heads, d, d)).Q
        return HeadRotation(rotation, self._scale(heads))

    def _values(self, heads: int, d: int) -> AxisAction:
        if self.what.condition <= 1:
            return self._heads(heads, d)
        left, right = (torch.linalg.qr(self._normal(heads, d, d)).Q for _ in range(2))
        even = torch.rand(heads, d, generator=self.generator, dtype=torch.float64) - 0.5
        return HeadMatrix((left * self.what.condition ** even.unsqueeze(1)) @ right)

    def _norm_signs(self, shape: HeadShape) -> Tensor:
        """±1 for every coordinate of the KV heads: for each plane, or for each head if the norm subtracts the mean."""
        if shape.norm is GainScope.centred:
            return self._signs(shape.kv_heads).repeat_interleave(shape.head_dim)
        return self._paired(self._signs(shape.kv_heads, shape.head_dim // 2), shape).flatten()

    def _paired(self, planes: Tensor, shape: HeadShape) -> Tensor:
        """The same number for both coordinates of each plane [*, d/2] to [*, d]."""
        return torch.cat((planes, planes), dim=-1).index_select(-1, torch.argsort(torch.tensor(shape.planes())))

    def _order(self, n: int) -> Tensor:
        """A random order that is not the identity (of more than one)."""
        order = torch.randperm(n, generator=self.generator)
        return order.roll(1) if bool((order == torch.arange(n)).all()) else order

    def _normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _scale(self, *shape: int) -> Tensor:
        uniform = torch.rand(shape, generator=self.generator, dtype=torch.float64)
        spread = self.what.spread if self.what.scaling else 1.0
        return torch.as_tensor(spread, dtype=torch.float64) ** (2 * uniform - 1)

    def _signs(self, *shape: int) -> Tensor:
        if not self.what.rotation:
            return torch.ones(shape, dtype=torch.float64)
        return torch.randint(2, shape, generator=self.generator).double() * 2 - 1
