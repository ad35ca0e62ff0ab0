"""The residual element from what two models' streams are on the same tokens (SYMMETRIES.md, section 10).

A norm gives every token the same length before it multiplies by its gain, and that is all that the model reads of the
stream. So tokens are compared with their length taken out (and, under LayerNorm, their mean): some tokens are a
thousand times longer than the others, and would drown them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mergekit_symalign.symmetry.by_activations.evidence import GRAIN, Agreement, Shares, most_likely
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.fitting import require_shape
from mergekit_symalign.symmetry.residual.cross import StreamSums, hidden_size, inner, standing_distance, stream_sums
from mergekit_symalign.symmetry.residual.kinds import STREAM, ResidualKind, best_element
from mergekit_symalign.symmetry.residual.move import Elements, comparable
from mergekit_symalign.symmetry.residual.scope import Scope, Tensors


@dataclass(frozen=True)
class SeenStream:
    """Products of the anchor's and the model's stream over tokens, at any number of norms.

    Attributes:
        cross: ``Σ x_A x_Bᵀ`` [hidden, hidden] of tokens of length 1, float64.
        rows: how many tokens, at every norm.
    """

    cross: Tensor
    rows: int

    @staticmethod
    def of_rows(anchor: Tensor, model: Tensor) -> SeenStream:
        """Of `unit_rows` [tokens, hidden].

        Raises:
            ShapeError: if they are not of the same tokens.
        """
        require_shape("stream of the model", model, anchor.shape)
        return SeenStream((anchor.mT @ model).double(), len(anchor))

    def __add__(self, other: SeenStream) -> SeenStream:
        return SeenStream(self.cross + other.cross, self.rows + other.rows)

    def agreement(self, element: BlockElement) -> float:
        """Mean cosine between a token in the anchor and the same token in the model, under an element; 1 at most."""
        return inner(element, STREAM, self.cross) / self.rows if self.rows else 0.0

    def both(self, element: BlockElement, weights: StreamSums) -> Agreement:
        """How well tokens and weights agree under an element."""
        shown = weights.constant > 0
        return Agreement(self.agreement(element), 1 - weights.distance(element) / weights.constant if shown else 0.0)

    def best(self, kind: ResidualKind, weights: StreamSums, share: float = GRAIN) -> BlockElement:
        """The element of a kind under which the two agree best.

        Args:
            kind: of the element.
            weights: of both models.
            share: of the weights in the evidence; the least leaves to them what no token shows.

        >>> rows = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        >>> q = torch.linalg.qr(rows[:4])[0]
        >>> a, b = unit_rows(rows, centred=False), unit_rows(rows @ q, centred=False)
        >>> nothing = torch.zeros(4, 4, dtype=torch.float64)
        >>> found = SeenStream.of_rows(a, b).best(ResidualKind.rotation, StreamSums(nothing, nothing))
        >>> torch.allclose(found.actions["residual"](b, 1), a)
        True
        """
        unit = 2 * share / weights.constant if weights.constant > 0 else 0.0
        seen = (1 - share) / max(self.rows, 1) * self.cross
        return best_element(kind, seen + unit * weights.cross, unit * weights.gains)

    def likeliest(self, kind: ResidualKind, weights: StreamSums) -> BlockElement:
        """The element with the likeliest share of the weights (`most_likely`)."""

        def solved(shares: Shares) -> BlockElement:
            return self.best(kind, weights, shares[STREAM])

        return most_likely(solved, lambda element: {STREAM: self.both(element, weights)}, (STREAM,))[0]


@dataclass(frozen=True)
class SeenWeights:
    """What both models' weights have in common, over some scopes whose blocks are aligned.

    Attributes:
        sums: for the stream's element.
        standing: squared distance before anything is moved.
    """

    sums: StreamSums
    standing: float

    @staticmethod
    def of_scope(scope: Scope, anchor: Tensors, model: Tensors, kind: ResidualKind, blocks: Elements) -> SeenWeights:
        """Of one scope.

        Args:
            scope: of the tensors.
            anchor, model: the tensors as stored.
            kind: of the stream's element.
            blocks: elements of the model's blocks.

        Raises:
            ShapeError: if anchor and model differ in shape.
        """
        a, b = (comparable(scope, x, kind) for x in (anchor, model))
        return SeenWeights(stream_sums(scope, a, b, hidden_size(scope, a), blocks), standing_distance(a, b))

    def __add__(self, other: SeenWeights) -> SeenWeights:
        return SeenWeights(self.sums + other.sums, self.standing + other.standing)


def unit_rows(x: Tensor, *, centred: bool) -> Tensor:
    """Tokens [tokens, hidden] with length 1, and with mean 0 if ``centred``; zeros stay zeros."""
    x = x - x.mean(-1, keepdim=True) if centred else x
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(length > 0, length, 1)
