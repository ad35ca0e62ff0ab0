"""From two checkpoints and an alignment to what is between them, and from learned numbers to a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_symalign.activations.sources import tied_names
from mergekit_symalign.alignment_file import AlignmentFile, block_name, save_alignment
from mergekit_symalign.alignments.fit import STREAM_BLOCK
from mergekit_symalign.commands.models import StoredModel
from mergekit_symalign.errors import ParameterError
from mergekit_symalign.families.stream import (
    layer_scope,
    outside_scope,
    residual_group,
    residual_kind,
    ties_embeddings,
)
from mergekit_symalign.families.towers import TowerLayer
from mergekit_symalign.graph.alignments import Alignments
from mergekit_symalign.graph.untie import UNTIE
from mergekit_symalign.hub.address import called
from mergekit_symalign.learning.between import STREAM_NAME, Between, Place
from mergekit_symalign.learning.descent import State
from mergekit_symalign.learning.elements import LearnedStream, learned_block
from mergekit_symalign.symmetry.describe import describe_heads, describe_neurons
from mergekit_symalign.symmetry.element import BlockElement
from mergekit_symalign.symmetry.membership import require_symmetry
from mergekit_symalign.symmetry.options import MlpShape, Rotation, Symmetries, ValueOutput
from mergekit_symalign.symmetry.residual.cross import standing_distance
from mergekit_symalign.symmetry.residual.kinds import Residual, ResidualKind
from mergekit_symalign.symmetry.residual.membership import describe_stream, require_stream_symmetry
from mergekit_symalign.symmetry.residual.move import comparable, moved_along

Facts = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Pair:
    """An anchor and a model that is moved to it.

    Attributes:
        anchor, model: their checkpoints.
        untied: whether heads that are embeddings become heads of their own.
    """

    anchor: StoredModel
    model: StoredModel
    untied: bool = False

    @staticmethod
    def of(anchor: StoredModel, model: StoredModel, *, untie: bool) -> Pair:
        """
        Raises:
            ArchitectureError: if heads that are embeddings have to stay so.
            ParameterError: if just one of the two has a head of its own.
        """
        tied = [of for of in (anchor, model) if of.has_tied_head()]
        if untie:
            for of in tied:
                of.untie_head()
        elif len(tied) == 1:
            raise ParameterError(
                "parameter untie",
                f"the head of {tied[0].name} is its embedding, and the other model has a head of its own",
                "Use untie: true (--untie), here and in the merge",
            )
        return Pair(anchor, model, untie)

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        config, layout = self.anchor.checkpoint.config, self.anchor.checkpoint.layout
        return not self.untied and ties_embeddings(config, layout)

    def strongest(self) -> Residual:
        """What moves the stream most, of all that is exact."""
        group = residual_group(self.anchor.checkpoint.layout, self.tied)
        return Residual.permutation if group.rotation is None else Residual.rotation

    def kind(self, wanted: Residual) -> ResidualKind:
        """
        Raises:
            ParameterError: if that is not exact.
        """
        return residual_kind(self.anchor.checkpoint.layout, self.tied, wanted)


@dataclass(frozen=True)
class Start:
    """Where a descent begins.

    Attributes:
        file: an alignment that was solved, or given.
        residual: what the stream is to be.
        use: which symmetries are learned.
        orders: whether permutations are.
    """

    file: AlignmentFile
    residual: Residual
    use: Symmetries
    orders: bool = False


def symmetries(parameters: Mapping[str, Any]) -> Symmetries:
    """What is learned, from the options; neurons' scales too unless they are switched off.

    Raises:
        ParameterError: if the elements would change what a model computes.
    """
    if parameters.get("rotation") == Rotation.full.value:
        raise ParameterError(
            "parameter rotation", "it is full, which changes what the model computes", "Use rotation: exact"
        )
    given = {name: x for name, x in parameters.items() if name in Symmetries.__dataclass_fields__ and x is not None}
    kinds = {"rotation": Rotation, "value_output": ValueOutput}
    chosen = {"neuron_scaling": True} | {name: kinds.get(name, lambda x: x)(x) for name, x in given.items()}
    return Symmetries(**chosen)


def started(pair: Pair, path: Path, parameters: Mapping[str, Any], *, orders: bool = False) -> Start:
    """An alignment file as a start.

    Raises:
        AlignmentFileError: if it is not one of these two models, or has not all of their blocks.
        ParameterError: if the stream is to be less than the file makes of it, or what is not exact.
    """
    known = {of.checkpoint.model: of.checkpoint for of in (pair.anchor, pair.model)}
    anchor, model = pair.anchor.checkpoint.model, pair.model.checkpoint.model
    alignments = Alignments(known)
    has_stream = alignments.has_stream(str(path), anchor, model)
    solved = Residual.none
    if has_stream:
        _, solved = alignments.read_stream(str(path), anchor, model, pair.tied)
    for block in pair.model.checkpoint.layout.blocks():
        alignments.read(str(path), anchor, model, block)
    if not alignments.exact:
        reason = "it was solved with rotation: full, which changes what the model computes"
        raise ParameterError(f"alignment {called(path)}", reason, "Solve it with rotation: exact")
    wanted = solved if parameters.get("residual") is None else Residual(parameters["residual"])
    order = list(Residual)
    if order.index(wanted) < order.index(solved):
        reason = f"it is {wanted.value}, but {called(path)} starts from {solved.value}"
        raise ParameterError("parameter residual", reason, "Leave it out, or start from another alignment")
    return Start(AlignmentFile.open(path), wanted, symmetries(parameters), orders)


def between(pair: Pair, start: Start, dtype: torch.dtype | None = None, *, checkpoints: bool = False) -> Between:
    """Both models' tensors in memory, and what is learned."""
    layout, file = pair.anchor.checkpoint.layout, start.file
    kind, hidden = pair.kind(start.residual), layout.geometry.hidden
    element = file.element(STREAM_BLOCK) if STREAM_BLOCK in file.blocks else BlockElement({})
    stream = LearnedStream.of(element, kind, hidden, orders=start.orders)
    first, second = _outside(pair.anchor), _outside(pair.model)
    outside = Place.of(outside_scope(layout, first), first, second, kind, stream, {})
    layers = []
    for i in range(layout.layers):
        a, b = pair.anchor.layer(i), pair.model.layer(i)
        scope = layer_scope(layout, i, {layout.name(i, part) for part in a})
        blocks = {
            of: learned_block(file.element(block_name(i, of)), block.shape, start.use, orders=start.orders)
            for of, block in scope.blocks.items()
        }
        layers.append(Place.of(scope, a, b, kind, stream, blocks, f"layer {i}"))
    return Between(pair.anchor.runner, stream, outside, layers, dtype, checkpoints)


def save_learned(
    path: Path,
    pair: Pair,
    start: Start,
    found: Between,
    state: State,
    told: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write what was learned as an alignment.

    Args:
        path: of the file.
        pair: the models.
        start: where it began.
        found: what is between them.
        state: where it ended.
        told: settings of the descent.
        facts: of the run, as they stand in reports beside the stream's.
    """
    elements = found.elements(state.best)
    if pair.kind(start.residual) is ResidualKind.none:
        elements.pop(STREAM_NAME)
    described = _described(pair, start, found, elements)
    if STREAM_NAME in described:
        described[STREAM_NAME] |= facts
    alignments = Alignments({of.checkpoint.model: of.checkpoint for of in (pair.anchor, pair.model)})
    own = {"residual": start.residual.value, UNTIE: pair.untied, "objective": "learned", **told}
    settings: dict[str, Mapping[str, Any]] = {block: {**_settings_of(start.file, block), **own} for block in elements}
    for name in _staying(pair, start.file):
        elements[name], settings[name] = start.file.element(name), start.file.settings_of(name)
        described[name] = dict(start.file.facts.get(name, {}))
    origin = alignments.origin(pair.anchor.checkpoint.model, pair.model.checkpoint.model, settings)
    save_alignment(path, origin, elements, described)


def _staying(pair: Pair, file: AlignmentFile) -> list[str]:
    """The blocks that are not learned: those of towers, which text does not pass through."""
    blocks = pair.model.checkpoint.layout.blocks()
    names = [block_name(layer, kind.value) for layer, kind in blocks if isinstance(layer, TowerLayer)]
    return [name for name in names if name in file.blocks]


def _settings_of(file: AlignmentFile, block: str) -> Mapping[str, Any]:
    return file.settings_of(block if block in file.blocks else next(iter(file.blocks)))


def _described(pair: Pair, start: Start, found: Between, elements: Mapping[str, BlockElement]) -> Facts:
    """What each element does, once it was found to be a symmetry."""
    kind, hidden = pair.kind(start.residual), pair.anchor.checkpoint.layout.geometry.hidden
    stream = elements.get(STREAM_NAME, BlockElement({}))
    require_stream_symmetry(stream, kind, hidden)
    facts: Facts = {}
    whole = [0.0, 0.0]
    for i, place in enumerate((found.outside, *found.layers)):
        sides = (_outside(of) if i == 0 else of.layer(i - 1) for of in (pair.anchor, pair.model))
        anchor, model = (comparable(place.scope, x, kind) for x in sides)
        blocks = {of: elements[place.key(of)] for of in place.blocks}
        turned, moved = (moved_along(place.scope, model, stream, of) for of in ({}, blocks))
        whole = [whole[0] + standing_distance(anchor, model), whole[1] + standing_distance(anchor, moved)]
        for of, element in blocks.items():
            block = place.scope.blocks[of]
            require_symmetry(element, block.shape)
            own = describe_neurons if isinstance(block.shape, MlpShape) else describe_heads
            ours = {part: anchor[part] for part in block.parts if part in anchor}
            named = _distances(*(standing_distance(ours, x) for x in (turned, moved)))
            facts[place.key(of)] = {**own(element, block.shape), **named, "objective": "learned"}  # type: ignore[arg-type]
    if kind is not ResidualKind.none:
        facts[STREAM_NAME] = {**_distances(*whole), **describe_stream(stream, hidden)}
    return facts


def _distances(before: float, after: float) -> dict[str, float]:
    return {"distance_before": before, "distance_after": after}


def _outside(model: StoredModel) -> dict[str, Tensor]:
    """Tensors outside the layers, tied ones under the name that the others are tied to; none that nothing moves."""
    first = {name: of[0] for of in map(list, tied_names(model.runner)) for name in of}
    claims = {name: model.checkpoint.layout.claim(name) for name in first.values()}
    passing = {name for name, claim in claims.items() if claim is not None and claim.spec.any_shape}
    return {first[name]: x for name, x in model.outside().items() if first[name] not in passing}
