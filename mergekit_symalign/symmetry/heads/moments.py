"""What rotations, angles and scales of heads need to know of the weights, or of activations: their moments.

A rotary plane is a pair of coordinates ``(i, i + d/2)`` of a head, or one complex number.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from mergekit_symalign.symmetry import devices
from mergekit_symalign.symmetry.compiled import arrays, bits, loops_for
from mergekit_symalign.symmetry.fitting import require_pair, require_shape
from mergekit_symalign.symmetry.options import Pair
from mergekit_symalign.symmetry.threads import in_parallel

_PLANES = 128  # that one thread takes together
_BLOCK = 1 << 16  # numbers in float64 that are worked on at once: several of these stay in the cache


@dataclass(frozen=True)
class Moments:
    """What the solvers need to know of one side (query, key, value or attended) of anchor A and model B.

    Attributes:
        cross: [heads, d, d], ``A Bᵀ`` over everything but the head's coordinates.
        model: [heads, d], squared norm of each of the model's coordinates.

    Raises:
        ShapeError: if one does not fit the other.
    """

    cross: Tensor
    model: Tensor

    def __post_init__(self) -> None:
        require_shape("cross of Moments", self.cross, (*self.model.shape, self.model.shape[-1]))

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.cross + other.cross, self.model + other.model)

    def some(self, heads: Tensor) -> Moments:
        """The same for some of the heads."""
        return Moments(self.cross.index_select(0, heads), self.model.index_select(0, heads))

    def at(self, coordinates: Sequence[int]) -> Moments:
        """The same for some coordinates of each head, in this order."""
        index = devices.whole_numbers(coordinates, self.cross.device)
        cross = self.cross.index_select(-1, index).index_select(-2, index)
        return Moments(cross, self.model.index_select(-1, index))

    def per_kv_head(self, kv_heads: int) -> Moments:
        """Sum over the query heads of each KV head's group (of the KV heads themselves: the same)."""
        return Moments(*(x.unflatten(0, (kv_heads, -1)).sum(1) for x in (self.cross, self.model)))


def moments(
    anchor: Tensor, model: Tensor, heads: int, order: Tensor | None = None, planes: Sequence[int] = ()
) -> tuple[Moments, Tensor]:
    """Of two matrices [heads · d, columns], in float64, on the CPU a head at a time.

    Args:
        anchor, model: the matrices.
        heads: their number of heads.
        order: which of the model's heads stands beside each of the anchor's, if not its own number.
        planes: where heads only turn in planes, first the first coordinates of all planes, then their partners: the
            moments are then as much as turns and scales of planes can see (`of_planes`), from far fewer products.

    Returns:
        The moments, and the squared norm of each of the anchor's coordinates [heads, d].

    Raises:
        ShapeError: if anchor and model differ, or do not consist of so many heads.
    """
    require_pair("rows of heads", (anchor, model))
    require_shape("rows of heads", anchor, (len(anchor) // heads * heads, anchor.shape[1]))
    number = torch.arange(heads, device=anchor.device)
    if planes and (loops := loops_for(anchor, model)) is not None:
        correlation, own, norms = _planes_by_loops(loops, (anchor, model), number, order, planes)
        return Moments(of_planes(correlation, planes), norms), own
    a, b = (x.unflatten(0, (heads, -1)) for x in (anchor, model))

    def of_heads(some: Pair) -> tuple[Tensor, Tensor, Tensor]:
        x, y = (_selected(side, at) for side, at in zip((a, b), some, strict=True))
        if planes:
            return _seen_by_planes(x, y, planes)
        x, y = x.double(), y.double()
        return _products(x, y), _norms(x), _norms(y)

    few = 1 if devices.on_cpu(anchor.device) else heads
    beside = number if order is None else order
    parts = in_parallel(of_heads, list(zip(number.split(few), beside.split(few), strict=True)), anchor.device)
    seen, own, norms = (torch.cat(x) for x in zip(*parts, strict=True))
    return Moments(of_planes(seen, planes) if planes else seen, norms), own


def _planes_by_loops(
    loops: ModuleType, pair: Pair, number: Tensor, order: Tensor | None, planes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """`_seen_by_planes` of all heads by compiled loops, some planes for each thread."""
    anchor, model = map(bits, pair)
    size, half = len(anchor) // len(number), len(planes) // 2
    ends = torch.tensor([planes[:half], planes[half:]]).mT  # [planes, 2]
    own, other = ((size * x.view(-1, 1, 1) + ends).flatten(0, 1) for x in (number, number if order is None else order))
    found = torch.empty(len(own), 6, dtype=torch.float64)

    def see(piece: tuple[Tensor, Tensor, Tensor]) -> None:
        loops.planes(anchor, model, *arrays(*piece))

    in_parallel(see, list(zip(*(x.split(_PLANES) for x in (own, other, found)), strict=True)))
    real, imaginary, *norms = found.unflatten(0, (len(number), half)).unbind(-1)
    place = torch.argsort(devices.whole_numbers(planes, found.device))
    of_anchor, of_model = (torch.cat(x, dim=1)[:, place] for x in (norms[:2], norms[2:]))
    return torch.complex(real, imaginary), of_anchor, of_model


def _selected(heads: Tensor, at: Tensor) -> Tensor:
    """Some heads; on the CPU a single one as it is stored: a copy of columns as rows takes longer than all the rest."""
    if len(at) > 1 or not devices.on_cpu(at.device):
        return heads.index_select(0, at)
    head = heads.narrow(0, int(at), 1)
    return head if head.stride(-1) == 1 else head.mT.contiguous().mT


def _products(a: Tensor, b: Tensor) -> Tensor:
    """``A Bᵀ`` of each head [heads, d, d]; of a single one as matrices, which take half as long as a batch of one."""
    return (a.squeeze(0) @ b.squeeze(0).mT).reshape(len(a), a.shape[1], -1)


def _norms(x: Tensor) -> Tensor:
    """Squared norm of each row [heads, d], some rows at a time."""
    blocks = x.split(_rows_at_once(x), dim=1)
    return torch.cat([torch.linalg.vecdot(rows, rows) for rows in blocks], dim=1)


def _seen_by_planes(a: Tensor, b: Tensor, planes: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """`plane_correlation` of ``A Bᵀ`` from the rows [heads, d, columns]: [heads, d/2]; and squared norms of both
    [heads, d]."""
    if a.stride(-1) != 1 or not devices.on_cpu(a.device):
        a, b = a.double(), b.double()
        return _correlation(*_ends(a, b, planes)), torch.linalg.vecdot(a, a), torch.linalg.vecdot(b, b)
    few, half = _rows_at_once(a), len(planes) // 2
    ends = list(zip(planes[:half], planes[half:], strict=True))
    some = [ends[at : at + few] for at in range(0, half, few)]
    parts = [_of_some_planes(a, b, [end for side in zip(*of_few, strict=True) for end in side]) for of_few in some]
    correlation, first, partner, other_first, other_partner = (torch.cat(x, dim=1) for x in zip(*parts, strict=True))
    place = torch.argsort(devices.whole_numbers(planes, a.device))
    own, other = (torch.cat(x, dim=1)[:, place] for x in ((first, partner), (other_first, other_partner)))
    return correlation, own, other


def _of_some_planes(a: Tensor, b: Tensor, planes: Sequence[int]) -> list[Tensor]:
    """Correlations of some planes [heads, planes]; then squared norms, of the anchor's first coordinates and of their
    partners, and of the model's."""
    ends = _ends(a, b, planes)
    return [_correlation(*ends), *(torch.linalg.vecdot(x, x) for x in ends)]


def _ends(a: Tensor, b: Tensor, planes: Sequence[int]) -> list[Tensor]:
    """The first coordinates of some planes and their partners, of anchor and then of model [heads, planes, columns]."""
    half = len(planes) // 2
    return [_coordinates(x, at).double() for x in (a, b) for at in (planes[:half], planes[half:])]


def _correlation(a_i: Tensor, a_j: Tensor, b_i: Tensor, b_j: Tensor) -> Tensor:
    dot = torch.linalg.vecdot
    return torch.complex(dot(a_i, b_i) + dot(a_j, b_j), dot(a_j, b_i) - dot(a_i, b_j))


def _rows_at_once(heads: Tensor) -> int:
    """Rows of each head [heads, d, columns] that are worked on together: as many as stay in the cache."""
    if not devices.on_cpu(heads.device):
        return heads.shape[1]
    return max(1, _BLOCK // max(1, len(heads) * heads.shape[2]))


def _coordinates(heads: Tensor, at: Sequence[int]) -> Tensor:
    """Some coordinates of each head, without a copy where they follow each other."""
    if heads.stride(-1) == 1 and list(at) == list(range(at[0], at[0] + len(at))):
        return heads.narrow(1, at[0], len(at))
    return heads.index_select(1, devices.whole_numbers(at, heads.device))


def plane_correlation(cross: Tensor) -> Tensor:
    """``Σ q_A conj(q_B)`` of each plane [*, d/2], complex, from ``A Bᵀ`` [*, d, d]."""
    half = cross.shape[-1] // 2
    planes = cross.unflatten(-1, (2, half)).unflatten(-3, (2, half)).diagonal(dim1=-3, dim2=-1)  # [*, 2, 2, half]
    (ii, ij), (ji, jj) = (row.unbind(-2) for row in planes.unbind(-3))
    return torch.complex(ii + jj, ji - ij)


def of_planes(correlation: Tensor, planes: Sequence[int]) -> Tensor:
    """The least matrices [*, d, d] with this `plane_correlation` [*, d/2]: all that turns and scales of planes can see.

    Args:
        correlation: complex.
        planes: first the first coordinates of all planes, then their partners.
    """
    real, imaginary = torch.diag_embed(correlation.real / 2), torch.diag_embed(correlation.imag / 2)
    cross = torch.cat((torch.cat((real, -imaginary), dim=-1), torch.cat((imaginary, real), dim=-1)), dim=-2)
    place = torch.argsort(devices.whole_numbers(planes, cross.device))
    return cross.index_select(-1, place).index_select(-2, place)


def plane_norm(coordinates: Tensor) -> Tensor:
    """Sum over the two coordinates of each plane: [*, d] to [*, d/2]."""
    first, second = coordinates.chunk(2, dim=-1)
    return first + second
