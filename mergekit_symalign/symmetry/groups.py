"""Group elements: linear maps along one axis of a weight tensor.

Every element obeys, up to rounding, the laws that the tests check for each class::

    g.inverse()(g(x, dim), dim) == x
    g.dual().dual() == g                  # dual: the inverse transpose
    (g(W, rows)) contracted with (g.dual()(U, columns)) == W contracted with U

The last line is the reason why a model computes the same: whatever writes a coordinate carries ``g``, whatever
reads it carries ``g.dual()``. Elements act by differentiable torch operations, never in place, and on the device of
the tensor they are given.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor

from mergekit_symalign.errors import ShapeError
from mergekit_symalign.symmetry.rows import compute_dtype, select_last

Packed = tuple[dict[str, tuple[Tensor, ...]], ...]


class AxisAction(ABC):
    """An invertible linear map along one axis of length ``size``."""

    kind: ClassVar[str]

    @property
    def only_reorders(self) -> bool:
        """Whether numbers change places and nothing else, by the kind of element alone."""
        return False

    @property
    @abstractmethod
    def size(self) -> int:
        """Length of the axis this acts on."""

    @abstractmethod
    def transform(self, x: Tensor) -> Tensor:
        """The map along the first axis of ``x`` [size, columns]."""

    @abstractmethod
    def inverse(self) -> AxisAction:
        """The element that undoes this one."""

    @abstractmethod
    def dual(self) -> AxisAction:
        """The inverse transpose: what the axis carries that reads this one."""

    @abstractmethod
    def is_identity(self) -> Tensor:
        """Boolean scalar tensor: whether this leaves every tensor exactly as it is."""

    @abstractmethod
    def snapped(self, tolerance: float) -> AxisAction:
        """The same element with every part that is within ``tolerance`` of the identity replaced by it."""

    def simplified(self) -> AxisAction:
        """The same element without steps that change nothing (asks the device)."""
        return self

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        """Apply to axis ``dim`` of ``x``; returns the compute dtype (float32 at least).

        Raises:
            ShapeError: if that axis does not have length ``size``.
        """
        self._require_size(x, dim)
        rows = x.to(compute_dtype(x.dtype)).movedim(dim, 0)
        return self.transform(rows.reshape(self.size, -1)).reshape(rows.shape).movedim(0, dim)

    def _require_size(self, x: Tensor, dim: int) -> None:
        if x.shape[dim] != self.size:
            raise ShapeError(
                f"{self.kind} of size {self.size}",
                f"axis {dim} of a tensor of shape {tuple(x.shape)} has length {x.shape[dim]}",
                "Use an element that was solved for a model of this shape",
            )

    def tensors(self) -> tuple[Tensor, ...]:
        """The element's own numbers, in the order of its fields."""
        return tuple(getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]

    def pack(self) -> Packed:
        """As plain tensors: ``{kind: numbers}`` of each step, which MergeKit's executors move between devices."""
        return ({self.kind: self.tensors()},)


class PerHead(AxisAction):
    """An action with numbers of its own for every head: all its fields are [heads, …]."""

    def per_query_head(self, queries_per_kv: int) -> PerHead:
        """The same element for each query head of a KV head's group."""
        return type(self)(*(t.repeat_interleave(queries_per_kv, dim=0) for t in self.tensors()))


@dataclass(frozen=True, eq=False)
class Permutation(AxisAction):
    """Slot ``i`` takes what stood at ``index[i]``. Orthogonal, so its own dual.

    Attributes:
        index: int64 [size], a permutation of ``range(size)``.
    """

    kind: ClassVar[str] = "permutation"
    index: Tensor

    @property
    def only_reorders(self) -> bool:
        return True

    @property
    def size(self) -> int:
        return self.index.shape[0]

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        """Apply to axis ``dim`` of ``x``; the numbers only move, so they keep their dtype."""
        self._require_size(x, dim)
        index = self.index.to(x.device)
        return select_last(x, index) if x.ndim > 1 and dim in (-1, x.ndim - 1) else x.index_select(dim, index)

    def transform(self, x: Tensor) -> Tensor:
        return x.index_select(0, self.index.to(x.device))

    @staticmethod
    def of_wholes(order: Tensor, size: int) -> Permutation:
        """An order of wholes [n], such as heads, as one of their coordinates, ``size`` each."""
        within = torch.arange(size, device=order.device)
        return Permutation((order.unsqueeze(1) * size + within).flatten())

    def inverse(self) -> Permutation:
        return Permutation(torch.argsort(self.index))

    def dual(self) -> Permutation:
        return self

    def is_identity(self) -> Tensor:
        return (self.index == torch.arange(self.size, device=self.index.device)).all()

    def snapped(self, tolerance: float) -> Permutation:
        return self


@dataclass(frozen=True, eq=False)
class Scaling(AxisAction):
    """Coordinate ``i`` is multiplied by ``factor[i]``, any real number but 0 (signs included).

    Attributes:
        factor: [size].
    """

    kind: ClassVar[str] = "scaling"
    factor: Tensor

    @property
    def size(self) -> int:
        return self.factor.shape[0]

    def transform(self, x: Tensor) -> Tensor:
        return x * self.factor.to(x).unsqueeze(-1)

    def inverse(self) -> Scaling:
        return Scaling(1 / self.factor)

    def dual(self) -> Scaling:
        return self.inverse()

    def is_identity(self) -> Tensor:
        return (self.factor == 1).all()

    def snapped(self, tolerance: float) -> Scaling:
        return Scaling(_snap(self.factor, 1.0, tolerance))


@dataclass(frozen=True, eq=False)
class Rotation(AxisAction):
    """One orthogonal matrix (reflections included) for the whole axis. Its own dual.

    Attributes:
        matrix: [size, size], orthogonal.
    """

    kind: ClassVar[str] = "rotation"
    matrix: Tensor

    @property
    def size(self) -> int:
        return self.matrix.shape[0]

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        """Apply to axis ``dim`` of ``x``; along the last one rows stay rows as they are stored."""
        if x.ndim < 2 or dim not in (-1, x.ndim - 1):
            return super().__call__(x, dim)
        self._require_size(x, dim)
        rows = x.to(compute_dtype(x.dtype))
        return rows @ self.matrix.to(rows).mT

    def transform(self, x: Tensor) -> Tensor:
        return self.matrix.to(x) @ x

    def inverse(self) -> Rotation:
        return Rotation(self.matrix.mT)

    def dual(self) -> Rotation:
        return self

    def is_identity(self) -> Tensor:
        return (self.matrix == _eye(self.matrix)).all()

    def snapped(self, tolerance: float) -> Rotation:
        eye = _eye(self.matrix)
        return Rotation(torch.where((self.matrix - eye).abs().amax() <= tolerance, eye, self.matrix))


@dataclass(frozen=True, eq=False)
class HeadRotation(PerHead):
    """One orthogonal matrix (reflections included) and one scale for every head.

    Attributes:
        matrix: [heads, d, d], orthogonal.
        scale: [heads], positive.
    """

    kind: ClassVar[str] = "head_rotation"
    matrix: Tensor
    scale: Tensor

    @property
    def size(self) -> int:
        return self.matrix.shape[0] * self.matrix.shape[1]

    def transform(self, x: Tensor) -> Tensor:
        scaled = (self.matrix * self.scale.reshape(-1, 1, 1)).to(x)
        return (scaled @ x.unflatten(0, self.matrix.shape[:2])).flatten(0, 1)

    def inverse(self) -> HeadRotation:
        return HeadRotation(self.matrix.mT, 1 / self.scale)

    def dual(self) -> HeadRotation:
        return HeadRotation(self.matrix, 1 / self.scale)

    def is_identity(self) -> Tensor:
        return (self.matrix == _eye(self.matrix)).all() & (self.scale == 1).all()

    def snapped(self, tolerance: float) -> HeadRotation:
        eye = _eye(self.matrix)
        near = (self.matrix - eye).abs().amax((-2, -1), keepdim=True) <= tolerance
        return HeadRotation(torch.where(near, eye, self.matrix), _snap(self.scale, 1.0, tolerance))


@dataclass(frozen=True, eq=False)
class HeadMatrix(PerHead):
    """One invertible matrix for every head.

    Attributes:
        matrix: [heads, d, d], invertible.
    """

    kind: ClassVar[str] = "head_matrix"
    matrix: Tensor

    @property
    def size(self) -> int:
        return self.matrix.shape[0] * self.matrix.shape[1]

    def transform(self, x: Tensor) -> Tensor:
        return (self.matrix.to(x) @ x.unflatten(0, self.matrix.shape[:2])).flatten(0, 1)

    def inverse(self) -> HeadMatrix:
        return HeadMatrix(torch.linalg.inv(self.matrix))

    def dual(self) -> HeadMatrix:
        return HeadMatrix(torch.linalg.inv(self.matrix).mT)

    def is_identity(self) -> Tensor:
        return (self.matrix == _eye(self.matrix)).all()

    def snapped(self, tolerance: float) -> HeadMatrix:
        eye = _eye(self.matrix)
        near = (self.matrix - eye).abs().amax((-2, -1), keepdim=True) <= tolerance
        return HeadMatrix(torch.where(near, eye, self.matrix))


@dataclass(frozen=True, eq=False)
class PlaneRotation(PerHead):
    """One angle and one scale for every rotary plane of every head: what commutes with RoPE.

    The planes are the coordinate pairs ``(i, i + d/2)``, the half-split layout.

    Attributes:
        angle: [heads, d/2], radians.
        scale: [heads, d/2], positive.
    """

    kind: ClassVar[str] = "plane_rotation"
    pair_axis: ClassVar[int] = 1  # of [heads, 2, d/2, columns]
    angle: Tensor
    scale: Tensor

    @property
    def size(self) -> int:
        return self.angle.numel() * 2

    def transform(self, x: Tensor) -> Tensor:
        heads, planes = self.angle.shape
        split = (2, planes) if self.pair_axis == 1 else (planes, 2)
        first, second = x.reshape(heads, *split, -1).unbind(self.pair_axis)
        cos = (self.scale * torch.cos(self.angle)).to(x).unsqueeze(-1)
        sin = (self.scale * torch.sin(self.angle)).to(x).unsqueeze(-1)
        turned = torch.stack((cos * first - sin * second, sin * first + cos * second), dim=self.pair_axis)
        return turned.reshape(x.shape)

    def inverse(self) -> PlaneRotation:
        return type(self)(-self.angle, 1 / self.scale)

    def dual(self) -> PlaneRotation:
        return type(self)(self.angle, 1 / self.scale)

    def is_identity(self) -> Tensor:
        return (self.angle == 0).all() & (self.scale == 1).all()

    def snapped(self, tolerance: float) -> PlaneRotation:
        return type(self)(_snap(self.angle, 0.0, tolerance), _snap(self.scale, 1.0, tolerance))


class InterleavedPlaneRotation(PlaneRotation):
    """The same for planes that are neighbouring coordinates ``(2i, 2i + 1)`` (Cohere, GLM)."""

    kind: ClassVar[str] = "interleaved_plane_rotation"
    pair_axis: ClassVar[int] = 2  # of [heads, d/2, 2, columns]


@dataclass(frozen=True, eq=False)
class PartialRotation(PerHead):
    """Heads of which only the first coordinates turn with the position: planes there, any rotation on the rest.

    Attributes:
        angle: [heads, r/2], of the planes ``(i, i + r/2)`` of the first r coordinates.
        plane_scale: [heads, r/2].
        matrix: [heads, d − r, d − r], orthogonal.
        scale: [heads], of the rest.
    """

    kind: ClassVar[str] = "partial_rotation"
    plane_type: ClassVar[type[PlaneRotation]] = PlaneRotation
    angle: Tensor
    plane_scale: Tensor
    matrix: Tensor
    scale: Tensor

    @classmethod
    def joining(cls, planes: PlaneRotation, rest: HeadRotation) -> PartialRotation:
        return cls(*planes.tensors(), *rest.tensors())

    @property
    def planes(self) -> PlaneRotation:
        return self.plane_type(self.angle, self.plane_scale)

    @property
    def rest(self) -> HeadRotation:
        return HeadRotation(self.matrix, self.scale)

    @property
    def size(self) -> int:
        return self.planes.size + self.rest.size

    def transform(self, x: Tensor) -> Tensor:
        heads, turning = self.angle.shape[0], 2 * self.angle.shape[1]
        by_head = x.unflatten(0, (heads, -1))
        first, second = by_head.split((turning, by_head.shape[1] - turning), dim=1)
        parts = (self.planes.transform(first.flatten(0, 1)), self.rest.transform(second.flatten(0, 1)))
        return torch.cat([part.unflatten(0, (heads, -1)) for part in parts], dim=1).flatten(0, 1)

    def inverse(self) -> PartialRotation:
        return self.joining(self.planes.inverse(), self.rest.inverse())

    def dual(self) -> PartialRotation:
        return self.joining(self.planes.dual(), self.rest.dual())

    def is_identity(self) -> Tensor:
        return self.planes.is_identity() & self.rest.is_identity()

    def snapped(self, tolerance: float) -> PartialRotation:
        return self.joining(self.planes.snapped(tolerance), self.rest.snapped(tolerance))


class InterleavedPartialRotation(PartialRotation):
    """The same for planes that are neighbouring coordinates ``(2i, 2i + 1)`` (GLM)."""

    kind: ClassVar[str] = "interleaved_partial_rotation"
    plane_type: ClassVar[type[PlaneRotation]] = InterleavedPlaneRotation


def rotary_action(planes: PlaneRotation, rest: HeadRotation | None, *, interleaved: bool) -> PerHead:
    """What queries may carry under RoPE.

    Args:
        planes: angle and scale of each rotary plane.
        rest: of the coordinates of a head that do not turn with the position; None where all do.
        interleaved: planes are ``(2i, 2i + 1)``, not ``(i, i + r/2)``.
    """
    if rest is None:
        return InterleavedPlaneRotation(*planes.tensors()) if interleaved else planes
    return (InterleavedPartialRotation if interleaved else PartialRotation).joining(planes, rest)


@dataclass(frozen=True, eq=False)
class Chain(AxisAction):
    """Several elements, applied in order."""

    kind: ClassVar[str] = "chain"
    steps: tuple[AxisAction, ...]

    @property
    def only_reorders(self) -> bool:
        return all(step.only_reorders for step in self.steps)

    @property
    def size(self) -> int:
        return self.steps[0].size

    def __call__(self, x: Tensor, dim: int) -> Tensor:
        for step in self.steps:
            x = step(x, dim)
        return x

    def transform(self, x: Tensor) -> Tensor:
        for step in self.steps:
            x = step.transform(x)
        return x

    def inverse(self) -> Chain:
        return Chain(tuple(step.inverse() for step in reversed(self.steps)))

    def dual(self) -> Chain:
        return Chain(tuple(step.dual() for step in self.steps))

    def is_identity(self) -> Tensor:
        return torch.stack([step.is_identity() for step in self.steps]).all()

    def snapped(self, tolerance: float) -> Chain:
        return Chain(tuple(step.snapped(tolerance) for step in self.steps))

    def simplified(self) -> AxisAction:
        kept = tuple(step for step in self.steps if not bool(step.is_identity()))
        return kept[0] if len(kept) == 1 else Chain(kept or self.steps)

    def pack(self) -> Packed:
        return tuple(packed for step in self.steps for packed in step.pack())


def behind(first: Permutation, action: AxisAction | None) -> AxisAction:
    """An action behind an order; orders that follow one another are one."""
    if action is None:
        return first
    steps = action.steps if isinstance(action, Chain) else (action,)
    if isinstance(steps[0], Permutation):
        first, steps = Permutation(first.index[steps[0].index]), steps[1:]
    return Chain((first, *steps)) if steps else first


def _snap(x: Tensor, target: float, tolerance: float) -> Tensor:
    return torch.where((x - target).abs() <= tolerance, target, x)


def _eye(like: Tensor) -> Tensor:
    """The identity of the size of the last axis."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
