"""Some pairs of KV heads: how well their query heads fit each other, and the sums over those that are matched."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mergekit_symalign.symmetry.assignment.linear import best_assignments
from mergekit_symalign.symmetry.fitting import require_shape
from mergekit_symalign.symmetry.heads.gated import gate_matrix
from mergekit_symalign.symmetry.heads.moments import Moments, of_planes, plane_correlation
from mergekit_symalign.symmetry.heads.solve import AttentionMoments, HeadActions, dense


@dataclass(frozen=True)
class GroupMoments:
    """Moments of every query head of one group with every one of another.

    Attributes:
        cross: [pairs, anchor's heads, model's heads, d, d].
        model: [pairs, model's heads, d].
    """

    cross: Tensor
    model: Tensor

    def __post_init__(self) -> None:
        pairs, heads, d = self.model.shape
        require_shape("cross of GroupMoments", self.cross, (pairs, *self.cross.shape[1:2], heads, d, d))

    def along(self, matrix: Tensor) -> Tensor:
        """Inner products with one matrix for each pair [pairs, d, d]: [pairs, anchor's heads, model's heads]."""
        heads = self.cross.flatten(-2)
        along = matrix.flatten(-2).unsqueeze(1) @ heads.flatten(1, 2).mT  # the other way round takes five times as long
        return along.squeeze(1).unflatten(1, heads.shape[1:3])

    def summed(self) -> Moments:
        return Moments(self.cross.sum((1, 2)), self.model.sum(1))

    def matched(self, order: Tensor) -> Moments:
        """Sum over the heads, each of the anchor's with its partner ``order`` [pairs, heads]."""
        return Moments(_of_partners(self.cross, order), self.model.sum(1))


@dataclass(frozen=True)
class PlaneMoments:
    """The same of heads that only turn in their planes: as much of it as their turns and scales can see.

    Attributes:
        correlation: [pairs, anchor's heads, model's heads, planes], complex.
        model: [pairs, model's heads, d].
        planes: first the first coordinates of all planes, then their partners.
    """

    correlation: Tensor
    model: Tensor
    planes: list[int]

    def __post_init__(self) -> None:
        pairs, heads, d = self.model.shape
        anchors = self.correlation.shape[1:2]
        require_shape("correlation of PlaneMoments", self.correlation, (pairs, *anchors, heads, d // 2))

    def along(self, matrix: Tensor) -> Tensor:
        """Inner products with one matrix for each pair that turns and scales planes."""
        turn = plane_correlation(Moments(matrix, self.model.sum(1)).at(self.planes).cross) / 2
        return (self.correlation @ turn.conj()[:, None, :, None]).squeeze(-1).real

    def summed(self) -> Moments:
        return Moments(of_planes(self.correlation.sum((1, 2)), self.planes), self.model.sum(1))

    def matched(self, order: Tensor) -> Moments:
        return Moments(of_planes(_of_partners(self.correlation, order), self.planes), self.model.sum(1))


@dataclass(frozen=True)
class HeadPairs:
    """Moments of some pairs of KV heads."""

    value: Moments
    key: Moments
    attended: GroupMoments | PlaneMoments
    query: GroupMoments | PlaneMoments
    gate: GroupMoments | PlaneMoments | None = None

    def matched(self, order: Tensor) -> AttentionMoments:
        gate = None if self.gate is None else self.gate.matched(order)
        return AttentionMoments(self.value, self.attended.matched(order), self.query.matched(order), self.key, gate)

    def order(self, found: HeadActions) -> Tensor:
        """The query heads of each pair matched under the rotation that was found [pairs, heads]."""
        dual = found.value.dual() if found.value is not None else None
        score = self.attended.along(dense(dual, self.value)) + self.query.along(dense(found.query, self.key))
        if self.gate is not None:
            score = score + self.gate.along(gate_matrix(found.value, self.value.model))
        return best_assignments(score)


def _of_partners(x: Tensor, order: Tensor) -> Tensor:
    """Sum of ``x`` [pairs, anchor's heads, model's heads, …] over the anchor's heads with their partners."""
    index = order.reshape(*order.shape, *[1] * (x.ndim - 2)).expand(-1, -1, 1, *x.shape[3:])
    return x.gather(2, index).sum((1, 2))
