"""The residual stream of a model, by tensor name: its norms, what reads them, and what may be done to it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from mergekit_symalign.errors import ParameterError
from mergekit_symalign.families.resolve import ModelLayout, lookup
from mergekit_symalign.families.schema import BlockKind, StreamNorm, TensorSpec
from mergekit_symalign.symmetry.element import TensorAxes
from mergekit_symalign.symmetry.options import AttentionShape, Symmetries
from mergekit_symalign.symmetry.residual.kinds import GAIN, STREAM, Residual, ResidualKind
from mergekit_symalign.symmetry.residual.scope import Block, Norm, Scope

_WEIGHT, _BIAS = "weight", "bias"
_SCORES = ("vocabulary", STREAM)  # axes of the embedding and of the head


@dataclass(frozen=True)
class ResidualGroup:
    """What keeps the function of a model, of all that may be done to its residual stream.

    Attributes:
        permutation: what ``residual: permutation`` means; None if the model admits none.
        rotation: what ``residual: rotation`` means; None if no rotation is exact.
        reason: why none is.
        remedy: what is exact instead.
    """

    permutation: ResidualKind | None
    rotation: ResidualKind | None = None
    reason: str = ""
    remedy: str = ""

    @property
    def kinds(self) -> tuple[ResidualKind, ...]:
        """All that is admitted, the smallest group first."""
        found = (ResidualKind.none, self.permutation, self.rotation)
        return tuple(kind for kind in found if kind is not None)

    def of(self, wanted: Residual) -> ResidualKind | None:
        """What the parameter means; None if it is not exact."""
        return {Residual.permutation: self.permutation, Residual.rotation: self.rotation}.get(wanted, ResidualKind.none)


def residual_group(layout: ModelLayout, tied: bool) -> ResidualGroup:
    """Which changes of coordinates of the residual stream are exact, from the family's tables alone.

    Args:
        layout: of the model.
        tied: whether the head is the embedding (`ties_embeddings`).
    """
    if layout.family.stream.returned:
        return ResidualGroup(None, None, *_RETURNED)
    if layout.family.stream.computed_positions:
        return ResidualGroup(None, None, *_COMPUTED)
    if layout.family.stream.shared:
        return ResidualGroup(None, None, *_SHARED)
    plain = layout.family.stream.norm is StreamNorm.rms
    permutation = ResidualKind.signed_permutation if plain else ResidualKind.permutation
    if (refused := _why_no_rotation(layout, tied=tied)) is not None:
        return ResidualGroup(permutation, None, *refused)
    return ResidualGroup(permutation, ResidualKind.rotation if plain else ResidualKind.mean_keeping_rotation)


def residual_kind(layout: ModelLayout, tied: bool, wanted: Residual) -> ResidualKind:
    """What the parameter ``residual`` means for a model.

    Args:
        layout: of the model.
        tied: whether the head is the embedding, after ``untie``.
        wanted: the parameter.

    Raises:
        ParameterError: if that is not exact, with the reason and what would be.
    """
    group = residual_group(layout, tied)
    if (kind := group.of(wanted)) is None:
        where = f"residual: {wanted.value} with {layout.family.title}"
        raise ParameterError(where, f"it would change what the model computes, because {group.reason}", group.remedy)
    return kind


def ties_embeddings(config: Any, layout: ModelLayout) -> bool:
    """Whether a model's head is its embedding: by its config, where there is an embedding that a norm's reader is."""
    return bool(lookup(config, "tie_word_embeddings")) and head_name(layout) is not None


def head_name(layout: ModelLayout) -> str | None:
    """The matrix that turns the stream into scores of tokens, behind the last norm; None if no tensor does."""
    return next((name for name in _read_by_last_norm(layout) if layout.outside[name].axes == _SCORES), None)


def heads_of(layout: ModelLayout) -> frozenset[str]:
    """All names that such a matrix may have."""
    return frozenset(name for name in _read_by_last_norm(layout) if layout.outside[name].axes == _SCORES)


def embedding_name(layout: ModelLayout) -> str | None:
    """The matrix that turns tokens into the stream; None if no tensor does."""
    scores = (name for name, spec in layout.outside.items() if spec.axes == _SCORES)
    return next((name for name in scores if name not in heads_of(layout)), None)


def may_untie(layout: ModelLayout) -> bool:
    """Whether models of the family may have a head that is not their embedding."""
    return layout.family.variants.get("tie_word_embeddings") != (True,)


def untying_helps(layout: ModelLayout) -> bool:
    """Whether a rotation is exact once the head is no longer the embedding."""
    return may_untie(layout) and _why_no_rotation(layout, tied=False) is None


def outside_scope(layout: ModelLayout, names: Collection[str]) -> Scope:
    """What lies outside the layers of a model, by full name.

    Args:
        layout: of the model.
        names: of all its tensors.
    """
    return _scope(layout, {name: spec for name, spec in layout.outside.items() if name in names}, {})


def layer_scope(
    layout: ModelLayout,
    layer: int,
    names: Collection[str],
    use: Mapping[str, Symmetries] | None = None,
    heads: AttentionShape | None = None,
) -> Scope:
    """A layer of a model, by the names inside it.

    Args:
        layout: of the model.
        layer: its index.
        names: of all tensors of the model.
        use: for each kind of block that is to be aligned the symmetries that it may use; all of them if not given.
        heads: of the layer, where it is not the model's layer of that index.
    """
    inside = {part: spec for part, spec in layout.parts(layer).items() if layout.name(layer, part) in names}
    shapes = {kind: layout.block_shape(layer, kind) for kind in layout.kinds(layer)}
    if heads is not None and BlockKind.attention in shapes:
        shapes[BlockKind.attention] = heads
    blocks = {
        kind.value: Block(
            shape,
            tuple(part for part, spec in inside.items() if spec.block is kind),
            Symmetries() if use is None else use[kind.value],
        )
        for kind, shape in shapes.items()
        if use is None or kind.value in use
    }
    return _scope(layout, inside, blocks)


def untied(layout: ModelLayout, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors outside the layers with a head of their own: a copy of the embedding, where it was the head."""
    head = head_name(layout)
    if head is None or any(name in tensors for name in _read_by_last_norm(layout)):
        return dict(tensors)
    embedding = next(x for name, x in tensors.items() if layout.outside[name].axes == _SCORES)
    return {**tensors, head: embedding.clone()}


def is_gain(name: str, spec: TensorSpec) -> bool:
    """Whether a tensor is the gain of a norm on the stream: the weights of all else have two axes or more."""
    return spec.axes == (STREAM,) and name.rpartition(".")[2] == _WEIGHT


def _read_by_last_norm(layout: ModelLayout) -> list[str]:
    return [reader for spec in layout.outside.values() for reader in spec.read_by]


def _scope(layout: ModelLayout, specs: Mapping[str, TensorSpec], blocks: Mapping[str, Block]) -> Scope:
    axes = {name: _axes(layout, name, spec) for name, spec in specs.items()}
    norms = tuple(_norm(name, spec, specs) for name, spec in specs.items() if is_gain(name, spec))
    return Scope(axes, norms, blocks)


def _axes(layout: ModelLayout, name: str, spec: TensorSpec) -> TensorAxes:
    axes = layout.axes(spec)
    return replace(axes, names=(GAIN,)) if is_gain(name, spec) else axes


def _norm(gain: str, spec: TensorSpec, specs: Mapping[str, TensorSpec]) -> Norm:
    readers = tuple(reader for reader in spec.read_by if reader in specs)
    biases = tuple(name for reader in readers if (name := _bias_of(reader)) in specs)
    bias = _bias_of(gain)
    return Norm(gain, bias if bias in specs else None, readers, biases if len(biases) == len(readers) else ())


def _bias_of(name: str) -> str:
    return name.removesuffix(_WEIGHT) + _BIAS


_PERMUTE = "Use residual: permutation, which is exact"
_RETURNED = (
    "it returns the residual stream itself, in whose coordinates others read it",
    "Use residual: none, or the class of this model that has a task head",
)
_COMPUTED = (
    "positions are added to the residual stream that are calculated in fixed coordinates and stored nowhere",
    "Use residual: none",
)
_SHARED = (
    "encoder and decoder share the coordinates of their residual streams",
    "Use residual: none",
)


def _why_no_rotation(layout: ModelLayout, *, tied: bool) -> tuple[str, str] | None:
    """Reason and remedy; None where one is exact."""
    if scaled := _scaled(layout.inside):
        return f"it scales each coordinate of what a block adds ({scaled})", _PERMUTE
    if stays := _staying(layout.inside):
        return f"it normalises behind the block ({stays})", _PERMUTE
    if stays := _staying(layout.outside):
        return f"it normalises behind the embeddings ({stays})", _PERMUTE
    if not tied:
        return None
    reason = "its head is its embedding, and the two would have to turn differently"
    if not may_untie(layout):
        return reason, _PERMUTE
    return reason, f"{_PERMUTE}, or untie: true, which gives the merged model a head of its own"


def _scaled(specs: Mapping[str, TensorSpec]) -> str | None:
    """The first vector of the stream's length that is neither a bias nor a norm's gain."""
    vectors = (name for name, spec in specs.items() if spec.axes == (STREAM,))
    return next((name for name in vectors if not name.endswith((_WEIGHT, _BIAS))), None)


def _staying(specs: Mapping[str, TensorSpec]) -> str | None:
    """The first norm whose output goes on along the stream."""
    return next((name for name, spec in specs.items() if is_gain(name, spec) and not spec.read_by), None)
