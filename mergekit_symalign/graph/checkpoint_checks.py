"""What the files' headers can tell: missing, surplus, misshapen and quantised tensors, before any is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from mergekit.architecture import WeightInfo
from mergekit.common import ModelReference

from mergekit_symalign.errors import CheckpointError
from mergekit_symalign.families.resolve import ModelLayout, Placed
from mergekit_symalign.families.towers import Layer
from mergekit_symalign.graph.fresh import forget_loader
from mergekit_symalign.graph.headers import Header
from mergekit_symalign.graph.joined import joined
from mergekit_symalign.graph.leftovers import unread
from mergekit_symalign.graph.names import Names, StoredNames, names_of
from mergekit_symalign.graph.opening import open_headers
from mergekit_symalign.graph.plain_merge import plain_merge
from mergekit_symalign.graph.text_parts import TextNames


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model, and what its architecture says should be in them.

    Attributes:
        model: whose they are.
        config: of transformers.
        layout: its architecture.
        headers: of all stored tensors that MergeKit finds, by name.
        unlisted: of those that are in the files and not in their index.
        own_layout: of a text model whose `layout` has the names of the model that it is merged into.
    """

    model: ModelReference
    config: Any
    layout: ModelLayout
    headers: Mapping[str, Header]
    unlisted: Mapping[str, Header]
    own_layout: ModelLayout | None = None
    _converted: dict[str, Header | None] = field(default_factory=dict)

    @staticmethod
    def open(
        model: ModelReference, config: Any, layout: ModelLayout, own_layout: ModelLayout | None = None
    ) -> Checkpoint:
        """
        Raises:
            ModelError, CheckpointError, ConfigError: if the model cannot be opened.
        """
        forget_loader(model)
        headers = open_headers(model)
        return Checkpoint(model, config, layout, headers.listed, headers.unlisted, own_layout)

    @cached_property
    def names(self) -> Names | StoredNames:
        """What transformers calls the stored tensors; built only where names alone do not tell."""
        if self.own_layout is not None:
            return TextNames(self.config, str(self.model), self.layout, self.own_layout)
        return names_of(self.config, self.layout, str(self.model))

    @property
    def family_name(self) -> str:
        """Of the model by itself."""
        return (self.own_layout or self.layout).family.name

    def own_name(self, name: str) -> str:
        """What transformers' model calls a tensor of the layout."""
        return self.names.own(name) if isinstance(self.names, TextNames) else name

    def has_place(self, name: str) -> bool:
        """Whether the model has such a tensor; a text model has none of a vision tower."""
        return self.own_layout is None or self.layout.claim(name) is not None

    def stored(self, info: WeightInfo) -> Header | None:
        """Header of a planned tensor, as a load finds it or as MergeKit will join its pieces; None if absent."""
        name = self.stored_name(info)
        return self._joined(info.name) if name is None else self.headers[name]

    def stored_name(self, info: WeightInfo) -> str | None:
        """The name under which a load finds a tensor in one piece: its own, one that MergeKit knows, or another from
        which transformers reads it."""
        known = (info.name, *(info.aliases or ()), *(info.tied_names or ()))
        found = next((name for name in known if name in self.headers), None)
        return found if found is not None else next(iter(self._others(info)), None)

    def other_names(self, info: WeightInfo) -> tuple[str, ...]:
        """What a load has to be told to find this tensor: nothing where it knows a name that is there."""
        known = (info.name, *(info.aliases or ()))
        if any(name in self.headers for name in known):
            return ()
        to_join = (self.own_name(info.name),) if self.own_layout is not None and self.pieces(info.name) else ()
        return to_join or tuple(self._others(info)[:1])

    def tied_names(self, info: WeightInfo) -> tuple[str, ...]:
        """Where an optional tensor is not stored because it is tied to another: the stored names of that one."""
        if not info.optional or self.stored_name(info) is not None:
            return ()
        return tuple(self._stored_with(info.name))

    def pieces(self, name: str) -> list[str]:
        """The stored tensors that a planned one is joined from, where it is not stored in one piece."""
        return self._stored_at(name, piece=True)

    def read_for(self, info: WeightInfo) -> set[str]:
        """The stored tensors that a load of this one reads."""
        name = self.stored_name(info)
        return set(self.pieces(info.name)) if name is None else {name}

    def _others(self, info: WeightInfo) -> list[str]:
        found = self._stored_at(info.name, piece=False)
        return found if found or info.optional else self._stored_with(info.name)

    def _stored_with(self, name: str) -> list[str]:
        """The stored tensors that transformers ties to this one."""
        place = self.names.place(name)
        tied = sorted(self.names.tied(place.name)) if place is not None else []
        return [stored for other in tied for stored in self._stored_at(other, piece=False)]

    def _stored_at(self, name: str, *, piece: bool) -> list[str]:
        if self._plainly_named and self.layout.has(name):
            return [name] if name in self.headers and not piece else []
        place = self.names.place(name)
        return [] if place is None else self._stored_by_place.get((place.name, piece), [])

    @cached_property
    def _plainly_named(self) -> bool:
        """Whether every stored tensor has the name that the family gives it: none then stands for another.

        transformers need not be asked, which takes longer to tell than all else in the plan of a small merge.
        """
        plain = self.own_layout is None and not self.layout.has_other_names
        return plain and all(self.layout.has(name) for name in self.headers)

    @cached_property
    def _stored_by_place(self) -> dict[tuple[str, bool], list[str]]:
        table: dict[tuple[str, bool], list[str]] = {}
        for stored, place in self.names.places(self.headers).items():
            for name in (place.name, *place.others):
                table.setdefault((name, place.piece), []).append(stored)
        return table

    def _joined(self, name: str) -> Header | None:
        """What MergeKit's own conversion gives for a tensor that is stored in pieces, on tensors without data."""
        if name not in self._converted:
            pieces = {piece: self.headers[piece] for piece in self.pieces(name)}
            plain = {
                piece: torch.empty(header.shape, dtype=header.dtype, device="meta")
                for piece, header in pieces.items()
                if header.dtype is not None
            }
            complete = len(plain) == len(pieces) > 0
            whole = joined(self.config, plain, (self.own_name(name),)) if complete else None
            quantised = next((header for header in pieces.values() if header.dtype is None), None)
            self._converted[name] = quantised if whole is None else Header(whole.dtype, "", tuple(whole.shape))
        return self._converted[name]

    def check(self, planned: Iterable[WeightInfo]) -> tuple[str, ...]:
        """Check every planned tensor of this model, and that the merge loses none that the model computes with.

        Returns:
            The stored tensors that the merge does not read, because the model has no place for them.

        Raises:
            CheckpointError: naming the tensor, the model and the remedy.
        """
        planned = [info for info in planned if not self.layout.is_buffer(info.name)]
        placed = self.check_tensors(planned)
        layers = frozenset(of.layer for of in placed if of.layer is not None)
        self._check_complete({info.name for info in planned}, layers)
        read = {name for info in planned for name in self.read_for(info)}
        return unread(self, read, frozenset(layer for layer in layers if isinstance(layer, int)))

    def check_tensors(self, infos: Sequence[WeightInfo]) -> list[Placed]:
        """Check that tensors are there, in a floating-point type and the right shape; gives where they stand.

        Raises:
            CheckpointError: naming the tensor, the model and the remedy.
        """
        placed = [self._placed(info.name) for info in infos]
        for info, of in zip(infos, placed, strict=True):
            self._check_tensor(info, of)
        return placed

    def _placed(self, name: str) -> Placed:
        placed = self.layout.placed(name)
        if placed is None and self.layout.is_absent(name):
            raise CheckpointError(
                f"tensor {name} of model {self.model}",
                "the checkpoint has it, but by the model's config this layer does not",
                "Check that config.json belongs to these weights",
            )
        if placed is None:
            raise CheckpointError(
                f"tensor {name} of model {self.model}",
                f"MergeKit merges it, but family {self.layout.family.name} does not know it",
                plain_merge(self.config, self.model, self.headers),
            )
        return placed

    def _check_tensor(self, info: WeightInfo, placed: Placed) -> None:
        claim = placed.claim
        header, where = self.stored(info), f"tensor {info.name} of model {self.model}"
        if header is None:
            if info.optional and claim.spec.optional:
                return
            raise CheckpointError(where, "the checkpoint does not have it", "Download or export the checkpoint again")
        if header.dtype is None:
            raise CheckpointError(
                where,
                f"it is stored as {header.stored}, not in a floating-point type: the checkpoint is quantised",
                "Use the model's unquantised checkpoint",
            )
        expected = placed.layout.shape(claim.spec)
        fits = claim.spec.any_shape or (
            len(expected) == len(header.shape)
            and all(want in (None, got) for want, got in zip(expected, header.shape, strict=True))
        )
        if not fits:
            wanted = " x ".join("any" if n is None else str(n) for n in expected)
            raise CheckpointError(
                where,
                f"its shape is {' x '.join(map(str, header.shape))}; the model's config asks for {wanted}",
                "Check that config.json belongs to these weights",
            )

    def _check_complete(self, planned: set[str], layers: frozenset[Layer]) -> None:
        """MergeKit plans every tensor that the config promises for a merged layer, or the checkpoint has none."""
        stacks = (self.layout.stack(layer) for layer in layers)
        parts = ((of.name(i, part), spec) for of, i in stacks for part, spec in of.parts(i).items())
        expected = {name for name, spec in parts if not spec.optional}
        for name in sorted(expected - {self.layout.canonical(name) for name in planned}):
            if self.stored(WeightInfo(name=name)) is None:
                raise CheckpointError(
                    f"tensor {name} of model {self.model}",
                    "the model's config promises it, but the checkpoint does not have it",
                    "Check that config.json belongs to these weights",
                )


def merged_dtype(headers: Iterable[Header | None]) -> torch.dtype | None:
    """The dtype that MergeKit promotes these stored tensors to."""
    result: torch.dtype | None = None
    for header in headers:
        if header is not None and header.dtype is not None:
            result = header.dtype if result is None else torch.promote_types(result, header.dtype)
    return result
