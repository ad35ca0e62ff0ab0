"""Which head of the model belongs to which of the anchor: KV heads as a whole, then query heads within their group.

The cost of a pair of KV heads is the distance that remains after the best joint rotation and scale of the pair, with
its query heads matched inside. Solving all pairs would cost more than the rest of the alignment, and siblings do not
need it: a lower bound from the KV heads' own rows alone (and Cauchy–Schwarz for the query heads) rules most pairs out,
and a pair is solved only when the assignment wants it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.assignment.linear import lazy_assignment
from mergekit_symalign.symmetry.heads.gated import GATE
from mergekit_symalign.symmetry.heads.moments import Moments
from mergekit_symalign.symmetry.heads.order import HeadOrder
from mergekit_symalign.symmetry.heads.pairs import GroupMoments, HeadPairs, PlaneMoments
from mergekit_symalign.symmetry.heads.solve import (
    AttentionMoments,
    HeadActions,
    apart,
    solve_heads,
)
from mergekit_symalign.symmetry.options import Facts, HeadShape, Symmetries
from mergekit_symalign.symmetry.threads import in_parallel

_ROUNDS = 2  # of matching query heads by a rotation, and solving the rotation for the match
_PAIRS = 4  # of KV heads that one thread solves together


class HeadSource(Protocol):
    """Where the matching takes its products and proofs from: rows of weights, or covariances of activations."""

    @property
    def shape(self) -> HeadShape:
        """Of the block."""

    @property
    def use(self) -> Symmetries:
        """What is admitted."""

    @property
    def own(self) -> AttentionMoments:
        """Moments with the heads as they stand, of each side's own heads."""

    def solve(self, m: AttentionMoments) -> HeadActions:
        """The best action of every pair that is matched."""

    def group_moments(self, axis: str, i: Tensor, j: Tensor) -> GroupMoments | PlaneMoments:
        """Of anchor's KV heads ``i`` and model's ``j``."""

    def all_pairs(self, axis: str) -> Moments:
        """Moments of every pair of KV heads: cross [k, k, d, d], model [k, k, d]. Of value or key."""

    def identity_route(self, costs: Tensor) -> str | None:
        """By which bounds KV heads that cost so much [KV heads] are proven to stand best where they are, if by any."""

    def bounds(self) -> tuple[Tensor, Callable[[], Tensor] | None]:
        """Lower bounds of the pairs' costs [KV heads, KV heads], and where to get better ones."""

    def query_heads_stay(self, found: HeadActions) -> bool:
        """Whether query heads are proven to stand best where they are, under the actions of their KV heads."""


@dataclass(frozen=True)
class MatchedHeads:
    """How the model's heads are to be ordered.

    Attributes:
        order: the closest to the anchor's, or None if they are in that order already.
        route: ``identity`` (no head can be cheaper elsewhere), ``bounds`` (the same by bounds that took the products of
            all heads), ``pairs`` (some pairs were solved); None if there is a single head.
    """

    order: HeadOrder | None
    route: str | None

    @property
    def facts(self) -> Facts:
        return {} if self.route is None else {"heads_route": self.route}


def match_heads(problem: HeadProblem) -> MatchedHeads:
    """The order of the model's heads that is closest to the anchor.

    KV heads are assigned to the optimum of the pair costs. Query heads inside a pair are assigned for the pair's
    rotation, which is solved again for that order: two rounds, as rotation and order depend on each other.
    Heads that may not move stay, and so do all without ``heads``.
    """
    source, shape = problem.source, problem.source.shape
    if shape.query_heads == 1 or shape.locked or not source.use.heads:
        return MatchedHeads(None, None)
    kv = torch.arange(shape.kv_heads, device=source.own.value.model.device)
    route = source.identity_route(problem.standing_costs())
    if route is None:
        bounds, tighter = source.bounds()
        route, kv = "pairs", lazy_assignment(bounds, problem.cost, tighter)
        inner = torch.stack([problem.inner[i, j] for i, j in enumerate(kv.tolist())])
    elif source.query_heads_stay(problem.standing_actions):
        inner = torch.arange(shape.queries_per_kv, device=kv.device).expand(len(kv), -1)
    else:
        inner = problem.start(problem.pairs(kv, kv))
    query = (kv.unsqueeze(1) * shape.queries_per_kv + inner).flatten()
    same = all(bool((order == torch.arange(len(order), device=order.device)).all()) for order in (kv, query))
    return MatchedHeads(None if same else HeadOrder(kv, query), route)


@dataclass(frozen=True)
class HeadProblem:
    """All pairs of KV heads of one attention block.

    Attributes:
        source: of the products.
        inner: order of the query heads in each pair that was solved.
    """

    source: HeadSource
    inner: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    @cached_property
    def standing(self) -> AttentionMoments:
        """Moments of every KV head with its own number, all query heads where they are."""
        return self.source.own.per_kv_head(self.source.shape.kv_heads)

    @cached_property
    def standing_actions(self) -> HeadActions:
        """The best action of every KV head there."""
        return self.source.solve(self.standing)

    def standing_costs(self) -> Tensor:
        """What every KV head costs there without any action, less the anchor's norms [KV heads]."""
        return apart(self.standing, HeadActions(None, None))

    def cost(self, i: Tensor, j: Tensor) -> Tensor:
        """Distance that remains between anchor's KV head ``i[n]`` and model's ``j[n]``, less the anchor's norms."""
        few = _PAIRS if devices.on_cpu(i.device) else len(i)
        parts = in_parallel(
            lambda some: self._cost(*some), list(zip(i.split(few), j.split(few), strict=True)), i.device
        )
        costs, orders = (torch.cat(x) for x in zip(*parts, strict=True))
        self.inner.update({(a, b): x for a, b, x in zip(i.tolist(), j.tolist(), orders, strict=True)})
        return costs

    def _cost(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """The same, and the order of the query heads that belongs to it [n, heads]."""
        pairs = self.pairs(i, j)
        order = self.start(pairs)
        for _ in range(_ROUNDS):
            m = pairs.matched(order)
            found = self.source.solve(m)
            previous, order = order, pairs.order(found)
            if bool((order == previous).all()):
                break
        return apart(m, found), previous

    def pairs(self, i: Tensor, j: Tensor) -> HeadPairs:
        """Moments of some pairs."""
        value, key = (self.source.group_moments(axis, i, j).summed() for axis in ("value", "key"))
        attended, query = (self.source.group_moments(axis, i, j) for axis in ("attended", "query"))
        gate = self.source.group_moments(GATE, i, j) if self.source.own.gate is not None else None
        return HeadPairs(value, key, attended, query, gate)

    def start(self, pairs: HeadPairs) -> Tensor:
        """A first order of the query heads of each pair [pairs, heads], by the rotation of the KV heads alone."""
        return pairs.order(self._by_kv_heads(pairs.value, pairs.key))

    def _by_kv_heads(self, value: Moments, key: Moments) -> HeadActions:
        """The rotations that value and key alone ask for."""
        nothing = Moments(torch.zeros_like(value.cross), torch.zeros_like(value.model))
        by_kv = AttentionMoments(value, nothing, nothing, key)
        return solve_heads(by_kv, self.source.shape, replace(self.source.use, scaling=False))
