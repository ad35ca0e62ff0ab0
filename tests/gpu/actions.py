"""Every group element on a device and on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from gpu.solvers import Found, Kernel
from mergekit_symalign.symmetry.groups import (
    AxisAction,
    Chain,
    HeadMatrix,
    HeadRotation,
    InterleavedPartialRotation,
    InterleavedPlaneRotation,
    PartialRotation,
    Permutation,
    PlaneRotation,
    Rotation,
    Scaling,
)

_HEADS, _SIZE = 3, 8  # of the axis that is acted on: 24 numbers
_N = _HEADS * _SIZE


def actions() -> dict[str, Kernel]:
    """By the kind of element."""
    return {f"action, {action.kind}": partial(_acted, action) for action in _elements()}


def _elements() -> Iterator[AxisAction]:
    g = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def orthogonal(*shape: int) -> torch.Tensor:
        return torch.linalg.qr(normal(*shape))[0]

    def factors(*shape: int) -> torch.Tensor:
        return (0.3 * normal(*shape)).exp()

    order = Permutation(torch.randperm(_N, generator=g))
    partly = (normal(_HEADS, 2), factors(_HEADS, 2), orthogonal(_HEADS, 4, 4), factors(_HEADS))
    yield from (order, Scaling(normal(_N)), Rotation(orthogonal(_N, _N)))
    yield HeadRotation(orthogonal(_HEADS, _SIZE, _SIZE), factors(_HEADS))
    yield HeadMatrix(normal(_HEADS, _SIZE, _SIZE))
    for planes in (PlaneRotation, InterleavedPlaneRotation):
        yield planes(normal(_HEADS, 4), factors(_HEADS, 4))
    for partial_rotation in (PartialRotation, InterleavedPartialRotation):
        yield partial_rotation(*partly)
    yield Chain((order, Scaling(factors(_N))))


def _acted(action: AxisAction, device: torch.device, dtype: torch.dtype) -> Found:
    """The element, its inverse and its dual along either axis of a tensor; their own numbers stay on the CPU."""
    x = torch.randn(_N, _N, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).to(device)
    forms = {"itself": action, "inverse": action.inverse(), "dual": action.dual()}
    return {f"{name} along {dim}": g(x, dim) for name, g in forms.items() for dim in (0, 1)}
