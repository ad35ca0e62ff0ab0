"""Alignment files with the element of a residual stream: damaged, for others or no symmetry, each refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from fuzz import stream_files
from streams import case

from mergekit_symalign.alignment_file import AlignmentFile, Origin, save_alignment
from mergekit_symalign.alignments import fit
from mergekit_symalign.alignments.fit import require_fits, require_fitting_stream
from mergekit_symalign.errors import AlignmentFileError
from mergekit_symalign.families.resolve import ModelLayout, resolve
from mergekit_symalign.families.stream import ties_embeddings
from mergekit_symalign.planting import random_stream
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.groups import AxisAction, HeadMatrix, Permutation, Rotation, Scaling
from mergekit_symalign.symmetry.residual.kinds import GAIN, STREAM, Residual, ResidualKind

N, COUNT = 48, 100
K = ResidualKind


def _stream(kind: ResidualKind, seed: int = 1) -> dict[str, AxisAction]:
    return dict(random_stream(kind, N, seed).actions)


def _noisy(kind: ResidualKind, by: float) -> dict[str, AxisAction]:
    matrix = _stream(kind)[STREAM].matrix  # type: ignore[attr-defined]
    noise = torch.randn(N, N, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {STREAM: Rotation(matrix + by * noise)}


def _reflected() -> dict[str, AxisAction]:
    """Orthogonal, and Q 1 = −1: it keeps no mean."""
    return {STREAM: Rotation(-_stream(K.mean_keeping_rotation)[STREAM].matrix)}  # type: ignore[attr-defined]


ORDER = Permutation(torch.arange(N).roll(1))
WRONG: dict[str, tuple[str, str, Callable[[], dict[str, AxisAction]], str]] = {
    "not orthogonal": ("llama", "rotation", lambda: _noisy(K.rotation, 1e-4), "axis residual: its matrix is not orth"),
    "not finite": ("llama", "rotation", lambda: _noisy(K.rotation, float("nan")), "rotation has numbers that are not"),
    "infinite": ("llama", "rotation", lambda: _noisy(K.rotation, float("inf")), "rotation has numbers that are not"),
    "the mean lost": ("phi2", "rotation", lambda: _stream(K.rotation), "axis residual: it does not keep the mean"),
    "the mean reversed": ("phi2", "rotation", _reflected, "axis residual: it does not keep the mean"),
    "another size": ("llama", "rotation", lambda: {STREAM: Rotation(torch.eye(N + 2).double())}, "shapes .*not"),
    "a rotation called permutation": ("llama", "permutation", lambda: _stream(K.rotation), "cannot have a rotation"),
    "a permutation called rotation": ("llama", "rotation", lambda: {STREAM: ORDER}, "cannot have a permutation"),
    "signs for layer norms": (
        *("phi2", "permutation", lambda: _stream(K.signed_permutation)),
        r"axis residual: it cannot have a scaling \(only permutation\)",
    ),
    "gains elsewhere": (
        *("llama", "permutation", lambda: {**_stream(K.signed_permutation), GAIN: ORDER}),
        "axis residual_gain: gains do not move as the stream does",
    ),
    "gains left behind": (
        *("llama", "permutation", lambda: {STREAM: _stream(K.signed_permutation)[STREAM]}),
        "axis residual_gain: gains do not move as the stream does",
    ),
    "gains under a rotation": (
        *("llama", "rotation", lambda: {**_stream(K.rotation), GAIN: ORDER}),
        "axis residual_gain: the block has no such axis",
    ),
    "no signs": (
        *("llama", "permutation", lambda: {STREAM: Scaling(torch.full((N,), 2.0).double())}),
        "factors that are no signs",
    ),
    "no permutation": (
        *("phi2", "permutation", lambda: dict.fromkeys((STREAM, GAIN), Permutation(torch.zeros(N).long()))),
        "its index is not a permutation",
    ),
    "an axis of a block": ("llama", "rotation", lambda: {"up": ORDER}, "axis up: the block has no such axis"),
    "tied models": (
        *("llama-tied", "rotation", lambda: _stream(K.rotation)),
        "would change what the model computes, because its head is its embedding",
    ),
    "norms behind the block": (
        *("gemma2", "rotation", lambda: _stream(K.rotation)),
        "would change what the model computes, because it normalises behind the block",
    ),
    "models that return the stream": (
        *("bert", "permutation", lambda: _stream(K.permutation)),
        "would change what the model computes, because it returns the residual stream",
    ),
    "a stream for none": ("llama", "none", lambda: _stream(K.rotation), "the block has no such axis"),
    "a word that is none": ("llama", "sideways", lambda: _stream(K.rotation), "does not say which residual"),
}


def _saved(path: Path, layout: ModelLayout, wanted: str, **more: BlockElement) -> AlignmentFile:
    blocks = {f"layer {i} {kind.value}": BlockElement({}) for i, kind in layout.blocks()}
    origin = Origin("a", "m", "0", "1", layout.family.name, {}, {"residual": wanted})
    save_alignment(path, origin, blocks | {name.replace("_", " "): element for name, element in more.items()})
    return AlignmentFile.open(path)


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_symmetry_of_the_stream_is_refused(tmp_path: Path, name: str) -> None:
    family, wanted, actions, reason = WRONG[name]
    config = case(family, num_hidden_layers=1).config
    layout = resolve(config, model="m")
    file = _saved(tmp_path / "a.safetensors", layout, wanted, residual=BlockElement(actions()))
    require_fits(file, layout)  # its blocks are sound
    with pytest.raises(AlignmentFileError, match=rf"a.safetensors, residual.*{reason}"):
        require_fitting_stream(file, layout, ties_embeddings(config, layout))


@pytest.mark.parametrize("kind", [K.rotation, K.signed_permutation])
def test_what_is_a_symmetry_is_taken(tmp_path: Path, kind: ResidualKind) -> None:
    layout = resolve(case("llama", num_hidden_layers=1).config, model="m")
    wanted = "rotation" if kind.rotates else "permutation"
    file = _saved(tmp_path / "a", layout, wanted, residual=BlockElement(_stream(kind)))
    assert require_fitting_stream(file, layout, False) is Residual(wanted)


def test_values_whose_readers_do_not_undo_them_are_refused_beside_a_stream(tmp_path: Path) -> None:
    layout = resolve(case("llama", num_hidden_layers=1).config, model="m")
    g = HeadMatrix(2 * torch.eye(16, dtype=torch.float64).repeat(2, 1, 1))
    more = {"residual": BlockElement(_stream(K.rotation)), "layer_0_attention": BlockElement({"value": g})}
    file = _saved(tmp_path / "a.safetensors", layout, "rotation", **more)
    with pytest.raises(AlignmentFileError, match="layer 0 attention, axis attended: it is not the inverse transpose"):
        require_fits(file, layout)


def test_each_changed_file_is_refused_by_name_or_does_no_harm() -> None:
    found = stream_files.sweep(COUNT, seed=2)
    assert found["tried"] == COUNT
    assert found["other"] == 0
    assert min(found["refused"], found["exact"]) > COUNT // 50


@pytest.mark.parametrize("check", ["require_stream_symmetry", "require_symmetry"])
def test_the_sweep_finds_what_a_missing_check_lets_through(check: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, check, lambda *_, **__: None)
    assert stream_files.sweep(40, seed=0)["other"] > 0
