"""The laws that every group element promises (symmetry/groups.py)."""

from __future__ import annotations

import pytest
import torch

from mergekit_symalign.errors import ShapeError
from mergekit_symalign.symmetry.element import BlockElement, TensorAxes, unpack
from mergekit_symalign.symmetry.groups import (
    AxisAction,
    Chain,
    HeadMatrix,
    HeadRotation,
    InterleavedPlaneRotation,
    PartialRotation,
    PerHead,
    Permutation,
    PlaneRotation,
    Rotation,
    Scaling,
)

D = torch.float64


def _elements() -> dict[str, AxisAction]:
    g = torch.Generator().manual_seed(0)
    heads, d = 3, 8
    rotation = torch.linalg.qr(torch.randn(heads, d, d, generator=g, dtype=D)).Q
    permutation = Permutation(torch.randperm(24, generator=g))
    scaling = Scaling(torch.randn(24, generator=g, dtype=D) + 2)
    return {
        "permutation": permutation,
        "scaling": scaling,
        "rotation": Rotation(torch.linalg.qr(torch.randn(24, 24, generator=g, dtype=D)).Q),
        "head_matrix": HeadMatrix(torch.randn(heads, d, d, generator=g, dtype=D) + 2 * torch.eye(d, dtype=D)),
        "head_rotation": HeadRotation(rotation, torch.rand(heads, generator=g, dtype=D) + 0.5),
        "plane_rotation": PlaneRotation(
            torch.randn(heads, d // 2, generator=g, dtype=D), torch.rand(heads, d // 2, generator=g, dtype=D) + 0.5
        ),
        "interleaved_plane_rotation": InterleavedPlaneRotation(
            torch.randn(heads, d // 2, generator=g, dtype=D), torch.rand(heads, d // 2, generator=g, dtype=D) + 0.5
        ),
        "partial_rotation": PartialRotation(
            torch.randn(heads, 2, generator=g, dtype=D),
            torch.rand(heads, 2, generator=g, dtype=D) + 0.5,
            torch.linalg.qr(torch.randn(heads, 4, 4, generator=g, dtype=D)).Q,
            torch.rand(heads, generator=g, dtype=D) + 0.5,
        ),
        "chain": Chain((permutation, scaling, Permutation(permutation.index.flip(0)))),
    }


@pytest.fixture(params=list(_elements()))
def element(request: pytest.FixtureRequest) -> AxisAction:
    return _elements()[request.param]


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=D)


def test_inverse_undoes(element: AxisAction) -> None:
    for dim, x in ((0, _random(24, 5)), (1, _random(5, 24)), (0, _random(24)), (1, _random(2, 24, 3))):
        torch.testing.assert_close(element.inverse()(element(x, dim), dim), x)


def test_dual_keeps_every_contraction(element: AxisAction) -> None:
    written, read = _random(24, 7), _random(5, 24)
    torch.testing.assert_close(element.dual()(read, 1) @ element(written, 0), read @ written)
    torch.testing.assert_close(element.dual().dual()(written, 0), element(written, 0))


def test_acts_linearly_and_not_in_place(element: AxisAction) -> None:
    x, y = _random(24, 4), _random(24, 4) * 3
    before = x.clone()
    torch.testing.assert_close(element(x + 2 * y, 0), element(x, 0) + 2 * element(y, 0))
    torch.testing.assert_close(x, before, rtol=0, atol=0)


def test_pack_holds_tensors_only_and_unpacks(element: AxisAction) -> None:
    packed = element.pack()
    assert all(isinstance(t, torch.Tensor) for step in packed for numbers in step.values() for t in numbers)
    torch.testing.assert_close(unpack(packed)(_random(24, 4), 0), element(_random(24, 4), 0))


def test_differentiable_in_its_numbers() -> None:
    angle = torch.zeros(3, 4, dtype=D, requires_grad=True)
    PlaneRotation(angle, torch.ones(3, 4, dtype=D))(_random(24, 5), 0).square()[0].sum().backward()
    assert angle.grad is not None
    assert angle.grad.abs().sum() > 0


def test_identity_is_recognised_and_small_parts_are_snapped(element: AxisAction) -> None:
    assert not element.is_identity()
    assert not element.snapped(1e-6).is_identity()
    near = HeadRotation(torch.eye(4, dtype=D).repeat(2, 1, 1) + 1e-9, torch.ones(2, dtype=D) + 1e-9)
    assert not near.is_identity()
    assert near.snapped(1e-6).is_identity()
    for whole in (Rotation(near.matrix[0]), HeadMatrix(near.matrix)):
        assert not whole.is_identity()
        assert whole.snapped(1e-6).is_identity()


def test_plane_rotation_commutes_with_rope() -> None:
    g, d = _elements()["plane_rotation"], 8
    frequency = 10000.0 ** (-torch.arange(d // 2, dtype=D) * 2 / d)
    x = _random(24, 5)
    for position in (1, 17):
        rope = PlaneRotation((position * frequency).expand(3, -1), torch.ones(3, d // 2, dtype=D))
        torch.testing.assert_close(g(rope(x, 0), 0), rope(g(x, 0), 0))


@pytest.mark.parametrize("kind", ["head_rotation", "head_matrix"])
def test_query_heads_carry_their_kv_heads_element(kind: str) -> None:
    g = _elements()[kind]
    assert isinstance(g, PerHead)
    x = _random(3, 2, 8, 5)  # KV head, query head of its group, coordinate, column
    together = g.per_query_head(2)(x.reshape(48, 5), 0).reshape(x.shape)
    for i in range(2):
        torch.testing.assert_close(together[:, i].reshape(24, 5), g(x[:, i].reshape(24, 5), 0))


def test_bfloat16_is_transformed_in_float32_unless_numbers_only_move(element: AxisAction) -> None:
    moves = isinstance(element, Permutation)
    assert element(_random(24, 3).bfloat16(), 0).dtype is (torch.bfloat16 if moves else torch.float32)


def test_wrong_length_names_shape(element: AxisAction) -> None:
    with pytest.raises(ShapeError, match=r"axis 0 of a tensor of shape \(23, 2\)"):
        element(_random(23, 2), 0)


def test_block_element_passes_untouched_tensors_through() -> None:
    block = BlockElement({"gate": _elements()["permutation"]})
    x = _random(24, 4).bfloat16()
    assert block(x, TensorAxes(("up", "residual"))) is x
    gate = TensorAxes(("gate", "residual"))
    torch.testing.assert_close(block.inverse()(block(x, gate), gate), x)
    unpacked = BlockElement.unpack(block.pack())
    torch.testing.assert_close(unpacked(x, gate), block(x, gate))
