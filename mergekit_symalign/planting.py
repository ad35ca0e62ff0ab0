"""Random exact symmetries: the same function in foreign coordinates. For tests, demos and trying alignment out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.schema import BlockKind, MlpKind
from mergekit_symalign.symmetry.attention import per_query_head
from mergekit_symalign.symmetry.blocks import moved_axes
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import (
    AxisAction,
    Chain,
    HeadRotation,
    InterleavedPartialRotation,
    InterleavedPlaneRotation,
    PartialRotation,
    Permutation,
    PlaneRotation,
    Scaling,
)
from mergekit_symalign.symmetry.heads import HeadOrder
from mergekit_symalign.symmetry.options import GainScope, HeadShape

Elements = dict[tuple[int, BlockKind], BlockElement]


@dataclass(frozen=True)
class Planted:
    """Which symmetries to plant; scales are drawn log-uniformly from ``[1/spread, spread]``."""

    permutation: bool = True
    heads: bool = True
    rotation: bool = True
    scaling: bool = True
    neuron_scaling: bool = False
    spread: float = 2.0


def random_elements(layout: ModelLayout, seed: int, what: Planted | None = None) -> Elements:
    """A random element of the exact group of every block of a model."""
    draw = _Draw(torch.Generator().manual_seed(seed), what or Planted())
    gated = layout.family.mlp is MlpKind.gated
    return {
        (layer, kind): draw.attention(layout.head_shape(layer))
        if kind is BlockKind.attention
        else draw.mlp(layout.geometry.neurons, gated=gated)
        for layer in range(layout.layers)
        for kind in BlockKind
    }


def transform(state: Mapping[str, Tensor], layout: ModelLayout, elements: Elements) -> dict[str, Tensor]:
    """A state dict in other coordinates: every tensor of a block under that block's element."""
    result = {}
    for name, x in state.items():
        claim = layout.claim(name)
        kind = claim.spec.block if claim is not None else None
        if claim is None or claim.layer is None or kind is None:
            result[name] = x
        else:
            element = elements[claim.layer, kind]
            result[name] = element(x, layout.axes(claim.spec), claim.spec.offset).to(x.dtype)
    return result


@dataclass(frozen=True)
class _Draw:
    generator: torch.Generator
    what: Planted

    def attention(self, shape: HeadShape) -> BlockElement:
        value = self._heads(shape.kv_heads, shape.head_dim)
        actions: dict[str, AxisAction] = {"value": value, "attended": per_query_head(value.dual(), shape)}
        if shape.qk_norm:
            sign = Scaling(self._paired(self._signs(shape.kv_heads, shape.head_dim // 2)).flatten())
            actions |= {"query": per_query_head(sign, shape), "key": sign} | self._gains(shape)
        else:
            query = self._query(shape)
            actions |= {"query": per_query_head(query, shape), "key": query.dual()}
        return BlockElement(self._after_head_permutation(actions, shape))

    def mlp(self, neurons: int, *, gated: bool) -> BlockElement:
        index = torch.randperm(neurons, generator=self.generator) if self.what.permutation else torch.arange(neurons)
        gate = Permutation(index)
        up: AxisAction = gate
        if self.what.neuron_scaling and gated:
            up = Chain((gate, Scaling(self._scale(neurons) * self._signs(neurons))))
        return BlockElement({"gate": gate, "up": up, "down": up.dual()} if gated else {"up": up, "down": up.dual()})

    def _query(self, shape: HeadShape) -> AxisAction:
        if shape.rotary == 0:
            return self._heads(shape.kv_heads, shape.head_dim)
        angle = self._normal(shape.kv_heads, shape.rotary // 2) * torch.pi * self.what.rotation
        planes = PlaneRotation(angle, self._scale(*angle.shape))
        if shape.interleaved:
            planes = InterleavedPlaneRotation(*planes.tensors())
        if shape.rotary == shape.head_dim:
            return planes
        partial = InterleavedPartialRotation if shape.interleaved else PartialRotation
        return partial.of(planes, self._heads(shape.kv_heads, shape.head_dim - shape.rotary))

    def _gains(self, shape: HeadShape) -> dict[str, AxisAction]:
        heads = shape.kv_heads if shape.norm is GainScope.all else 1
        group = shape.queries_per_kv if shape.norm is GainScope.all else 1
        half = (heads, shape.head_dim // 2)
        factor = self._paired(self._scale(*half) * self._signs(*half))
        return {
            "query_gain": Scaling(factor.repeat_interleave(group, dim=0).flatten()),
            "key_gain": Scaling(1 / factor.flatten()),
        }

    def _after_head_permutation(self, actions: dict[str, AxisAction], shape: HeadShape) -> dict[str, AxisAction]:
        if not self.what.heads:
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

    def _paired(self, planes: Tensor) -> Tensor:
        """The same number for both coordinates of each plane of the half-split layout [*, d/2] to [*, d]."""
        return torch.cat((planes, planes), dim=-1)

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
