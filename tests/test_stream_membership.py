"""What may be a residual element, what may not, and how one is described."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from mergekit_symalign.errors import SymmetryError
from mergekit_symalign.planting import random_stream
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import AxisAction, Chain, Permutation, Rotation, Scaling
from mergekit_symalign.symmetry.residual.kinds import GAIN, STREAM, ResidualKind, best_element
from mergekit_symalign.symmetry.residual.membership import describe_stream, require_stream_symmetry

N = 12
K = ResidualKind


def _normal(seed: int = 0) -> torch.Tensor:
    return torch.randn(N, N, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("kind", list(ResidualKind))
def test_everything_planted_or_solved_is_admitted(kind: ResidualKind) -> None:
    for element in (random_stream(kind, N, 3), best_element(kind, _normal()), BlockElement({})):
        require_stream_symmetry(element, kind, N)
        require_stream_symmetry(BlockElement.unpack(element.pack()), kind, N)
        require_stream_symmetry(element.inverse(), kind, N)


def _planted(kind: ResidualKind, axis: str = STREAM) -> AxisAction:
    return random_stream(kind, N, 3).actions[axis]


ORDER = Permutation(torch.arange(N).roll(1))
WRONG: dict[str, tuple[ResidualKind, Callable[[], dict[str, AxisAction]], str]] = {
    "a rotation for a permutation": (K.permutation, lambda: {STREAM: _planted(K.rotation)}, "cannot have a rotation"),
    "a permutation for a rotation": (K.rotation, lambda: {STREAM: ORDER}, "cannot have a permutation"),
    "signs under a norm that subtracts the mean": (
        K.permutation,
        lambda: {STREAM: _planted(K.signed_permutation), GAIN: _planted(K.signed_permutation, GAIN)},
        "cannot have a scaling",
    ),
    "a rotation that does not keep the mean": (
        K.mean_keeping_rotation,
        lambda: {STREAM: _planted(K.rotation)},
        "does not keep the mean",
    ),
    "gains left behind": (K.permutation, lambda: {STREAM: ORDER}, "gains do not move as the stream does"),
    "gains elsewhere": (K.permutation, lambda: {STREAM: ORDER, GAIN: ORDER.inverse()}, "gains do not move"),
    "gains under a rotation": (K.rotation, lambda: {STREAM: _planted(K.rotation), GAIN: ORDER}, "does not move it"),
    "signed gains": (
        K.signed_permutation,
        lambda: dict.fromkeys((STREAM, GAIN), _planted(K.signed_permutation)),
        "axis residual_gain: it cannot have a scaling",
    ),
    "factors": (
        K.signed_permutation,
        lambda: {STREAM: Scaling(torch.full((N,), 1.1, dtype=torch.float64))},
        "no signs",
    ),
    "no permutation": (
        K.permutation,
        lambda: dict.fromkeys((STREAM, GAIN), Permutation(torch.zeros(N).long())),
        "index",
    ),
    "no rotation": (K.rotation, lambda: {STREAM: Rotation(_normal())}, "not orthogonal"),
    "numbers that are none": (K.rotation, lambda: {STREAM: Rotation(_normal() * math.nan)}, "not finite"),
    "another size": (K.rotation, lambda: {STREAM: Rotation(torch.eye(N + 1))}, r"shape \(13, 13\), not \(12, 12\)"),
    "an axis of a block": (K.rotation, lambda: {"up": ORDER}, "axis up: a rotation does not move it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_would_change_the_function_is_refused(name: str) -> None:
    kind, actions, reason = WRONG[name]
    with pytest.raises(SymmetryError, match=reason):
        require_stream_symmetry(BlockElement(actions()), kind, N)


def test_a_description_counts_moves_and_measures_angles() -> None:
    signs = torch.ones(N, dtype=torch.float64)
    signs[:3] = -1
    order = torch.arange(N)
    order[[0, 5]] = order[[5, 0]]
    element = BlockElement({STREAM: Chain((Permutation(order), Scaling(signs))), GAIN: Permutation(order)})
    assert describe_stream(element, N) == {"stream": N, "stream_moved": 2, "signs_flipped": 3}
    turn = torch.eye(N, dtype=torch.float64)
    angle = math.radians(30)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    found = describe_stream(BlockElement({STREAM: Rotation(turn)}), N)
    assert found["stream_angle_max"] == pytest.approx(30)
    assert found["stream_angle_median"] == pytest.approx(0)
