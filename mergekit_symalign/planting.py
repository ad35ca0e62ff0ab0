"""Random exact symmetries: the same function in foreign coordinates. For tests, demos and trying alignment out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.symmetry.blocks import HEAD_AXES
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import (
    AxisAction,
    Chain,
    HeadRotation,
    Permutation,
    PlaneRotation,
    Scaling,
)
from mergekit_symalign.symmetry.heads import HeadOrder

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
    draw = _Draw(layout, torch.Generator().manual_seed(seed), what or Planted())
    return {
        (layer, kind): draw.attention() if kind is BlockKind.attention else draw.mlp()
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
            result[name] = elements[claim.layer, kind](x, claim.spec.axes).to(x.dtype)
    return result


@dataclass(frozen=True)
class _Draw:
    layout: ModelLayout
    generator: torch.Generator
    what: Planted

    def attention(self) -> BlockElement:
        geometry = self.layout.geometry
        kv, d, group = geometry.kv_heads, geometry.head_dim, geometry.queries_per_kv
        rotation = torch.eye(d, dtype=torch.float64).expand(kv, d, d)
        if self.what.rotation:
            rotation = torch.linalg.qr(self._normal(kv, d, d)).Q
        value = HeadRotation(rotation, self._scale(kv))
        actions: dict[str, AxisAction] = {"value": value, "attended": value.dual().per_query_head(group)}
        if self.layout.has_qk_norm:
            sign = self._signs(kv, d // 2).repeat(1, 2)
            gain = Scaling(self._scale(d // 2).repeat(2) * self._signs(d // 2).repeat(2))
            actions |= {
                "query": Scaling(sign.repeat_interleave(group, 0).flatten()),
                "key": Scaling(sign.flatten()),
            }
            actions |= {"query_gain": gain, "key_gain": gain.dual()}
        else:
            angle = self._normal(kv, d // 2) * torch.pi * self.what.rotation
            query = PlaneRotation(angle, self._scale(kv, d // 2))
            actions |= {"query": query.per_query_head(group), "key": query.dual()}
        return BlockElement(self._after_head_permutation(actions))

    def _after_head_permutation(self, actions: dict[str, AxisAction]) -> dict[str, AxisAction]:
        if not self.what.heads:
            return actions
        geometry = self.layout.geometry
        kv = torch.randperm(geometry.kv_heads, generator=self.generator)
        inner = [torch.randperm(geometry.queries_per_kv, generator=self.generator) for _ in kv]
        query = (kv.unsqueeze(1) * geometry.queries_per_kv + torch.stack(inner)).flatten()
        order = HeadOrder(kv, query)
        return {
            axis: Chain((order.permutation(axis, action.size), action)) if axis in HEAD_AXES else action
            for axis, action in actions.items()
        }

    def mlp(self) -> BlockElement:
        n = self.layout.geometry.neurons
        index = torch.randperm(n, generator=self.generator) if self.what.permutation else torch.arange(n)
        gate = Permutation(index)
        up: AxisAction = gate
        if self.what.neuron_scaling:
            up = Chain((gate, Scaling(self._scale(n) * self._signs(n))))
        return BlockElement({"gate": gate, "up": up, "down": up.dual()})

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
