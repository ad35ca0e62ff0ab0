"""One block of multi-head latent attention: from the rows of anchor and model to the element that aligns the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch

from mergekit_symalign.symmetry.distance import total_distance
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import AxisAction
from mergekit_symalign.symmetry.latent.heads import MatchedLatentHeads, align_latent_heads, turned_latent_heads
from mergekit_symalign.symmetry.latent.latents import (
    READERS,
    Latents,
    are_same,
    best_signs,
    best_turns,
    may_rotate,
    other_readers,
    stored_actions,
    with_latents,
)
from mergekit_symalign.symmetry.options import LatentShape, Rotation, Sides, Symmetries
from mergekit_symalign.symmetry.solved import Solved

_ROUNDS = 4  # of heads for given latents, and latents for given heads
_STILL = 1e-4  # change of a latent's element after which rounds end


def align_latent(sides: Sides, shape: LatentShape, use: Symmetries) -> Solved:
    """Match heads and latents by the symmetries that ``use`` admits.

    The rows that write a latent tell where it comes from, whatever the heads do. From there heads and latents are
    solved in turns: each step has its optimum, and the distance falls.

    Args:
        sides: all axes of `LatentShape.lengths`.
        shape: of the block.
        use: what is admitted.

    Returns:
        The element; the route by which the order of the heads was proven, and the squared distances before and after.
    """
    before = _distance(sides, shape, {})
    found = min(_candidates(sides, shape, use, before), key=lambda one: one.distance)
    facts = {"distance_before": before, "distance_after": found.distance}
    route = {} if found.heads.route is None else {"heads_route": found.heads.route}
    return Solved(BlockElement(found.actions), route | facts)


def _candidates(sides: Sides, shape: LatentShape, use: Symmetries, before: float) -> Iterator[_Found]:
    """Where latents keep their order and signs or not, where they rotate, and where they stay if neither is closer.

    Both end in local optima, and a rotation has to bring the anchor's gains along.
    """
    signed = _Search(sides, shape, use, rotate=False)
    if use.rotation is Rotation.none:
        yield signed.with_still_latents()
        return
    found = [signed.best()]
    if found[0].distance > 0 and may_rotate(sides, shape):
        found.append(_Search(sides, shape, use, rotate=True).best(found[0].heads))
    yield from found
    if min(one.distance for one in found) > before:
        yield signed.with_still_latents()


@dataclass(frozen=True)
class _Found:
    """Where the rounds ended."""

    heads: MatchedLatentHeads
    actions: Mapping[str, AxisAction]
    distance: float


@dataclass(frozen=True)
class _Search:
    """What the rounds work on.

    Attributes:
        sides: as stored.
        shape, use: of the block.
        rotate: whether latents may rotate.
    """

    sides: Sides
    shape: LatentShape
    use: Symmetries
    rotate: bool

    def best(self, start: MatchedLatentHeads | None = None) -> _Found:
        """From the rows that write the latents, and from an order of the heads if one is known."""
        latents = self._latents(None, None)
        heads, matched = self._heads(latents, start), start is None
        for _ in range(_ROUNDS):
            following = self._latents(heads, latents)
            if are_same(latents, following, _STILL):
                break
            latents, matched = following, False
            heads = self._heads(latents, heads)
        if not matched:
            heads = align_latent_heads(self._moved(latents), self.shape, self.use, heads.planes)
        return self._found(heads, latents)

    def _latents(self, heads: MatchedLatentHeads | None, known: Latents | None) -> Latents:
        """The best latents for given heads."""
        actions = None if heads is None else heads.actions(self.shape)
        if self.rotate:
            return best_turns(self.sides, self.shape, actions, known)
        return best_signs(self.sides, self.shape, actions)

    def _heads(self, latents: Latents, known: MatchedLatentHeads | None) -> MatchedLatentHeads:
        """The best heads for given latents, in an order that is known if one is."""
        moved = self._moved(latents)
        if known is None:
            return align_latent_heads(moved, self.shape, self.use)
        return turned_latent_heads(moved, self.shape, self.use, known.order, known.route)

    def _moved(self, latents: Latents) -> Sides:
        """The rows with the model's latents moved."""
        actions = stored_actions(self.sides, latents, self._tolerance, rotate=self.rotate)
        reads = {axis: actions[f"{axis}_read"] for axis in latents if axis in actions}
        return with_latents(self.sides, self.shape, reads)

    @property
    def _tolerance(self) -> float:
        x = self.sides["value"][0][1]
        return max(torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps, 1e-12)

    def with_still_latents(self) -> _Found:
        return self._found(align_latent_heads(self.sides, self.shape, self.use), {})

    def _found(self, heads: MatchedLatentHeads, latents: Latents) -> _Found:
        tolerance = self._tolerance
        of_heads = {axis: g.snapped(tolerance) for axis, g in heads.actions(self.shape).items()}
        actions = of_heads | stored_actions(self.sides, latents, tolerance, rotate=self.rotate)
        return _Found(heads, actions, _distance(self.sides, self.shape, actions))


def _distance(sides: Sides, shape: LatentShape, actions: Mapping[str, AxisAction]) -> float:
    """Squared distance of all tensors, each counted once, under actions on rows and on columns."""
    reads = {axis: actions[f"{axis}_read"] for axis in shape.latents() if f"{axis}_read" in actions}
    moved = with_latents(sides, shape, reads)
    twice = {f"{axis}_read" for axis in READERS}
    pairs = [(pair, actions.get(axis)) for axis in sides.keys() - twice for pair in moved[axis]]
    pairs += [(pair, reads.get(axis)) for axis in shape.latents() for pair in other_readers(sides, axis)]
    return sum(total_distance(pair, action) for pair, action in pairs)
