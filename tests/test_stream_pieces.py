"""Embeddings and heads some tokens at a time: the same numbers as whole, with less memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from streams import State, case, split, stored
from torch import Tensor

from mergekit_symalign.families.resolve import resolve
from mergekit_symalign.families.stream import residual_group
from mergekit_symalign.graph import pieces, stream_pieces
from mergekit_symalign.graph.stream_pieces import moved_tensor
from mergekit_symalign.planting import random_stream
from mergekit_symalign.symmetry.element import BlockElement, TensorAxes
from mergekit_symalign.symmetry.groups import Permutation, Rotation
from mergekit_symalign.symmetry.residual import outside
from mergekit_symalign.symmetry.residual import pieces as scope_pieces
from mergekit_symalign.symmetry.residual.kinds import ResidualKind
from mergekit_symalign.symmetry.residual.move import move_scope
from mergekit_symalign.symmetry.residual.outside import outside_sums
from mergekit_symalign.symmetry.residual.scope import Scope, around, norms_of

MODELS = ["llama", "phi2", "gpt2", "vit-classifier", "bert-classifier", "gemma2"]


def _outside(name: str) -> list[tuple[ResidualKind, Scope, State, State]]:
    """What lies outside the layers of a model and another one of its shape, for every kind that it admits."""
    states = [{part: x.float() for part, x in stored(case(name, seed, num_hidden_layers=1)).items()} for seed in (0, 5)]
    layout = resolve(case(name, num_hidden_layers=1).config, model="m")
    tied = name in ("gpt2", "bert-classifier")
    scope = split(layout, states[0])[0][0]
    first, other = (split(layout, state)[1][0] for state in states)
    return [(kind, scope, first, other) for kind in residual_group(layout, tied).kinds[1:]]


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_moved_some_at_a_time(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (pieces, stream_pieces):
        monkeypatch.setattr(module, "PIECE", 7 * 48)
    seen: list[int] = []

    def watched(scope: Scope, tensors: State, *args: Any) -> State:
        seen.append(max(x.numel() for x in tensors.values()))
        return move_scope(scope, tensors, *args)

    monkeypatch.setattr(stream_pieces, "move_scope", watched)
    for kind, scope, tensors, norms in _outside(name):
        stream = random_stream(kind, 48, 1)
        whole = move_scope(scope, tensors, kind, stream, {}, norms_of(scope, norms))
        for part, x in tensors.items():
            one = around(scope, (part,), folds=kind.rotates)
            own = {other: tensors[other] for other in one.axes}
            seen.clear()
            found = moved_tensor(part, one, own, kind, stream, {}, norms_of(one, norms))
            assert found.dtype == whole[part].dtype
            torch.testing.assert_close(found, whole[part], rtol=1e-5, atol=1e-5)
            calculated = kind is not ResidualKind.permutation
            if "vocabulary" in scope.axes[part].names and x.ndim > 1 and calculated:
                assert len(seen) == -(-len(x) // 7) + 1
            if calculated and any("vocabulary" in axes.names for axes in one.axes.values()):
                assert max(seen) <= 7 * 48


@pytest.mark.parametrize("name", MODELS)
def test_sums_over_tokens_do_not_depend_on_the_ranges(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    for kind, scope, anchor, model in _outside(name):
        whole = outside_sums(scope, anchor, model, kind)
        calls.clear()
        with monkeypatch.context() as few:
            few.setattr(scope_pieces, "_NUMBERS", 7 * 48)
            few.setattr(outside, "at_range", lambda *args: (calls.append(args[2]), scope_pieces.at_range(*args))[1])
            found = outside_sums(scope, anchor, model, kind)
        tokens = any("vocabulary" in axes.names for axes in scope.axes.values())
        assert len(set(calls)) == (-(-97 // 7) if tokens else 1)
        for a, b in ((found.sums.cross, whole.sums.cross), (found.sums.gains, whole.sums.gains)):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(found.in_units, whole.in_units, rtol=1e-5, atol=1e-6)
        assert found.sums.constant == pytest.approx(whole.sums.constant, rel=torch.finfo(torch.float32).eps)
        assert found.standing == pytest.approx(whole.standing, rel=torch.finfo(torch.float32).eps)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_matrices_are_moved_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Along both axes, with an offset, and at the end of a row: what the element gives for the whole."""
    turn, order = Rotation(torch.linalg.qr(_random(24, 24)).Q), Permutation(torch.randperm(24))
    element = BlockElement({"residual": turn, "up": order, "other": turn})
    for names in (("up", "residual"), ("residual", "up"), ("other", "residual"), ("residual", "none"), ("up", "none")):
        for offset in (0.0, 1.0):
            x, axes = _random(24, 24).float(), TensorAxes(names, offset=offset)
            whole = scope_pieces.moved_in_pieces(element, x, axes)
            assert torch.equal(whole, element(x, axes))
            with monkeypatch.context() as small:
                small.setattr(scope_pieces, "_PIECE", 24 * 5)
                found = scope_pieces.moved_in_pieces(element, x, axes)
            assert found.dtype == whole.dtype
            torch.testing.assert_close(found, whole, rtol=1e-5, atol=1e-5)
