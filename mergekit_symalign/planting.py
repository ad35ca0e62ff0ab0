"""Random exact symmetries: the same function in foreign coordinates. For tests, demos and trying alignment out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

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
    PerHead,
    Permutation,
    PlaneRotation,
    Rotation,
    Scaling,
    behind,
    rotary_action,
)
from mergekit_symalign.symmetry.heads.coordinates import order_within, within_heads
from mergekit_symalign.symmetry.heads.of_keys import with_attended, with_own_values
from mergekit_symalign.symmetry.heads.order import HeadOrder, moved_axes
from mergekit_symalign.symmetry.heads.solve import query_actions, value_actions
from mergekit_symalign.symmetry.latent.heads import MatchedLatentHeads
from mergekit_symalign.symmetry.options import (
    BlockShape,
    GainScope,
    HeadShape,
    HeadValues,
    LatentShape,
    MlpShape,
    NeuronScale,
)
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

    def block(self, shape: BlockShape) -> BlockElement:
        if isinstance(shape, MlpShape):
            return self.mlp(shape)
        return self.latent(shape) if isinstance(shape, LatentShape) else self.attention(shape)

    def latent(self, shape: LatentShape) -> BlockElement:
        of_values = HeadShape(shape.heads, shape.heads, shape.value, rotary=0)
        still, value = self._heads(shape.heads, shape.nope), self._values(of_values)
        query = self._query(HeadShape(1, 1, shape.rope, shape.rope, shape.interleaved))
        assert isinstance(query, PerHead)
        actions: dict[str, AxisAction] = {"value": value, "attended": value.dual()}
        actions |= {"q_nope": still, "k_nope": still.dual()}
        actions |= {"q_pe": query.per_query_head(shape.heads), "k_pe": query.dual()}
        order = torch.randperm(shape.heads, generator=self.generator) if self.what.heads else None
        moved = MatchedLatentHeads(order, None, None, actions).actions(shape)
        for axis, size in shape.latents().items() if self.what.rotation else ():
            index = Permutation(self._order(size))
            signed = Chain((index, Scaling(self._signs(size))))
            moved |= {axis: signed, f"{axis}_read": signed, f"{axis}_gain": index}
        return BlockElement(moved)

    def attention(self, shape: HeadShape) -> BlockElement:
        if shape.of_keys:
            own = self.attention(with_own_values(shape)).actions
            return BlockElement(with_attended(own))
        actions = value_actions(self._values(shape), shape)
        if shape.qk_norm:
            rows = self._coordinates(shape)
            actions |= query_actions(rows, shape) | self._gains(shape, rows)
        else:
            actions |= query_actions(self._query(shape), shape)
        return BlockElement(self._after_head_permutation(actions, shape))

    def mlp(self, shape: MlpShape) -> BlockElement:
        neurons, experts, permute = shape.neurons, shape.experts, self.what.permutation
        order = self._experts(shape) if permute else torch.arange(experts)
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
        if shape.unit and self.what.scaling:
            return _Draw(self.generator, replace(self.what, scaling=False))._query(shape)
        if shape.rotary == 0:
            return self._heads(shape.kv_heads, shape.head_dim)
        angle = self._normal(shape.kv_heads, shape.rotary // 2) * torch.pi * self.what.rotation
        planes = PlaneRotation(angle, self._scale(*angle.shape))
        free = shape.head_dim - shape.rotary
        rest = self._heads(shape.kv_heads, free) if free else None
        return rotary_action(planes, rest, interleaved=shape.interleaved)

    def _coordinates(self, shape: HeadShape) -> AxisAction:
        """Under a QK-norm: an order of the coordinates that do not turn, and signs."""
        signs, rest = Scaling(self._norm_signs(shape)), shape.rest()
        if not (shape.reorders and self.what.rotation):
            return signs
        orders = [torch.tensor(rest)[self._order(len(rest))] for _ in range(1 if shape.one_order else shape.kv_heads)]
        turning = torch.arange(shape.rotary).expand(len(orders), -1)
        order = torch.cat((turning, torch.stack(orders)), dim=1)
        return Chain((within_heads(order.expand(shape.kv_heads, -1)), signs))

    def _gains(self, shape: HeadShape, rows: AxisAction) -> dict[str, AxisAction]:
        """Of a QK-norm: the order of the rows, and factors that they trade."""
        heads, group = (shape.kv_heads, shape.queries_per_kv) if shape.norm.per_head else (1, 1)
        free = shape.head_dim - shape.rotary // 2
        factor = self._paired(self._scale(heads, free) * self._signs(heads, free), shape)
        gains: dict[str, AxisAction] = {
            "query_gain": Scaling(factor.repeat_interleave(group, dim=0).flatten()),
            "key_gain": Scaling(1 / factor.flatten()),
        }
        order = order_within(rows, shape.head_dim)
        if order is None:
            return gains
        wide = {"query_gain": order[:heads].repeat_interleave(group, dim=0), "key_gain": order[:heads]}
        return {axis: Chain((within_heads(wide[axis]), gain)) for axis, gain in gains.items()}

    def _after_head_permutation(self, actions: dict[str, AxisAction], shape: HeadShape) -> dict[str, AxisAction]:
        if not self.what.heads or shape.locked:
            return actions
        kv = torch.randperm(shape.kv_heads, generator=self.generator)
        inner = [torch.randperm(shape.queries_per_kv, generator=self.generator) for _ in kv]
        order = HeadOrder(kv, (kv.unsqueeze(1) * shape.queries_per_kv + torch.stack(inner)).flatten())
        orders = {axis: order.permutation(axis, shape.head_dim) for axis in moved_axes(shape)}
        return actions | {axis: behind(moved, actions.get(axis)) for axis, moved in orders.items()}

    def _heads(self, heads: int, d: int) -> HeadRotation:
        rotation = torch.eye(d, dtype=torch.float64).expand(heads, d, d)
        if self.what.rotation:
            rotation = torch.linalg.qr(self._normal(heads, d, d)).Q
        return HeadRotation(rotation, self._scale(heads))

    def _values(self, shape: HeadShape) -> AxisAction:
        heads, d = shape.kv_heads, shape.head_dim
        if shape.gated:
            factors = Scaling(self._scale(heads * d) * self._signs(heads * d))
            orders = torch.stack([self._order(d) for _ in range(heads)])
            return Chain((within_heads(orders), factors)) if self.what.rotation else factors
        if self.what.condition <= 1 or shape.values is HeadValues.normed:
            turned = self._heads(heads, d)
            return replace(turned, scale=torch.ones(heads)) if shape.values is HeadValues.normed else turned
        left, right = (torch.linalg.qr(self._normal(heads, d, d)).Q for _ in range(2))
        even = torch.rand(heads, d, generator=self.generator, dtype=torch.float64) - 0.5
        return HeadMatrix((left * self.what.condition ** even.unsqueeze(1)) @ right)

    def _norm_signs(self, shape: HeadShape) -> Tensor:
        """±1 for every coordinate of the KV heads: one for each plane, or each head if the norm subtracts the mean."""
        if shape.norm is GainScope.centred:
            return self._signs(shape.kv_heads).repeat_interleave(shape.head_dim)
        return self._paired(self._signs(shape.kv_heads, shape.head_dim - shape.rotary // 2), shape).flatten()

    def _paired(self, numbers: Tensor, shape: HeadShape) -> Tensor:
        """One number for each plane and for each other coordinate [*, r/2 + rest], for every coordinate [*, d]."""
        half = shape.rotary // 2
        place = torch.argsort(torch.tensor([*shape.planes(), *shape.rest()]))
        return torch.cat((numbers[..., :half], numbers), dim=-1).index_select(-1, place)

    def _experts(self, shape: MlpShape) -> Tensor:
        """A random order of experts inside their groups, and of the groups."""
        if shape.groups == 1:
            return self._order(shape.experts)
        size = shape.experts // shape.groups
        return torch.cat([self._order(size) + group * size for group in self._order(shape.groups).tolist()])

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
