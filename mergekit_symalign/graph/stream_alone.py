"""Moving the residual stream of one model by a file, without a merge: the task of every tensor that moves along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from mergekit.architecture import WeightInfo
from mergekit.graph import Task

from mergekit_symalign.families.resolve import Claim
from mergekit_symalign.families.stream import heads_of, layer_scope, outside_scope
from mergekit_symalign.graph.checkpoint_checks import Checkpoint
from mergekit_symalign.graph.load import LoadFinite
from mergekit_symalign.graph.stream_tasks import ApplyStream
from mergekit_symalign.graph.streams import MovedStream, Place
from mergekit_symalign.graph.untie import tied_to_embedding
from mergekit_symalign.symmetry.residual.kinds import ResidualKind
from mergekit_symalign.symmetry.residual.scope import Scope

BlockKey = tuple[int, str]  # layer and kind


@dataclass(frozen=True)
class Left:
    """Stored tensors that do not move along.

    Attributes:
        unread: those that the architecture has no place for.
        copies: those whose numbers move under another name.
    """

    unread: tuple[str, ...]
    copies: tuple[str, ...]


@dataclass(frozen=True)
class StreamAlone:
    """A model whose residual stream is moved by itself.

    Attributes:
        checkpoint: of the model.
        kind: of the stream's element.
        norms: the model whose norms the result gets; None where the model keeps its own, as under a permutation.
        untied: whether a head that is the embedding becomes one of its own.
    """

    checkpoint: Checkpoint
    kind: ResidualKind
    norms: Checkpoint | None = None
    untied: bool = False

    @cached_property
    def new_heads(self) -> frozenset[str]:
        """The head that the result has beside the embedding, and the model has not."""
        return tied_to_embedding(self.checkpoint) & heads_of(self.checkpoint.layout) if self.untied else frozenset()

    def check(self) -> Left:
        """Check all tensors that move, and the norms of the other model.

        Returns:
            What is not to be written as it is, because it does not move along.

        Raises:
            CheckpointError: if a tensor is missing, misshapen or quantised, or one that the model uses would stay.
        """
        if self.norms is not None:
            names = [name for place, scope in self._scopes.items() for name in self._gains(place, scope)]
            self.norms.check_tensors([self._info(name) for name in names])
        infos = [self._info(name) for name in self._claims]
        layout = self.checkpoint.layout
        around = [WeightInfo(name=name) for name in self.checkpoint.headers if layout.is_around_text(name)]
        unread = self.checkpoint.check([*infos, *(info for info in around if info.name not in self._claims)])
        read = {stored for info in (*infos, *around) for stored in self.checkpoint.read_for(info)}
        others = self.checkpoint.headers.keys() - read - {*unread}
        return Left(unread, tuple(name for name in others if self.checkpoint.names.place(name) is not None))

    def tasks(self, stream: Task, blocks: Mapping[BlockKey, Task]) -> dict[str, ApplyStream]:
        """The task of every tensor that moves, by its name in the family.

        Args:
            stream: gives the stream's element.
            blocks: give the elements of the blocks.
        """
        loads = {place: self._loads(self.checkpoint, self._names(place)) for place in self._scopes}
        moved = MovedStream(self.kind, self._scopes, self._norm_loads(), loads, stream)
        tasks = {}
        for name, claim in self._claims.items():
            if claim.part in loads[claim.layer]:
                tasks[name] = moved.applied(claim.layer, claim.part, _of_block(claim, blocks))
        return tasks

    @cached_property
    def _claims(self) -> dict[str, Claim]:
        """The tensors that are stored, or have to be, by name; each stored one once, and again for a new head."""
        found, read = {}, set[str]()
        for name in self._known():
            claim = self.checkpoint.layout.claim(name)
            assert claim is not None
            stored = self.checkpoint.read_for(self._info(name))
            if (stored and not stored <= read) or not (stored or claim.spec.optional) or name in self.new_heads:
                found[name] = claim
                read |= stored
        return found

    def _known(self) -> list[str]:
        layout = self.checkpoint.layout
        inside = [layout.name(layer, part) for layer in range(layout.layers) for part in layout.parts(layer)]
        return [*layout.outside, *inside]

    @cached_property
    def _scopes(self) -> dict[Place, Scope]:
        layout, names = self.checkpoint.layout, self._claims.keys()
        scopes: dict[Place, Scope] = {None: outside_scope(layout, names)}
        return scopes | {layer: layer_scope(layout, layer, names) for layer in range(layout.layers)}

    def _names(self, place: Place) -> dict[str, str]:
        """Full names of the tensors of a scope, by their names in it."""
        return {claim.part: name for name, claim in self._claims.items() if claim.layer == place}

    def _gains(self, place: Place, scope: Scope) -> list[str]:
        """Full names of norms: gains and biases."""
        parts = [part for norm in scope.norms for part in (norm.gain, norm.bias) if part is not None]
        return [self._names(place)[part] for part in parts]

    def _norm_loads(self) -> dict[Place, dict[str, LoadFinite]]:
        if self.norms is None:
            return {place: {} for place in self._scopes}
        return {
            place: {part: load for part, load in self._loads(self.norms, self._names(place)).items() if part in wanted}
            for place, scope in self._scopes.items()
            for wanted in [{x for norm in scope.norms for x in (norm.gain, norm.bias)}]
        }

    def _loads(self, checkpoint: Checkpoint, names: Mapping[str, str]) -> dict[str, LoadFinite]:
        return {part: self._load(checkpoint, name) for part, name in names.items()}

    def _load(self, checkpoint: Checkpoint, name: str) -> LoadFinite:
        aliases = checkpoint.other_names(self._info(name)) or None
        return LoadFinite(model=checkpoint.model, tensor=name, aliases=aliases)

    def _info(self, name: str) -> WeightInfo:
        claim = self.checkpoint.layout.claim(name)
        optional = claim is not None and claim.spec.optional and name not in self.new_heads  # it is read as embedding
        return WeightInfo(name=name, optional=optional)


def _of_block(claim: Claim, blocks: Mapping[BlockKey, Task]) -> tuple[str, Task] | None:
    if claim.layer is None or claim.spec.block is None:
        return None
    kind = claim.spec.block.value
    return kind, blocks[claim.layer, kind]
