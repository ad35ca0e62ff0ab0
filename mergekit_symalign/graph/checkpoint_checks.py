"""What the files' headers can tell: missing, surplus, misshapen and quantised tensors, before any is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

import torch
from mergekit.architecture import WeightInfo
from mergekit.architecture.conversion import convert_checkpoint_tensors
from mergekit.common import ModelReference

from mergekit_symalign.errors import CheckpointError
from mergekit_symalign.families.resolve import Claim, ModelLayout
from mergekit_symalign.graph.fresh import reopened
from mergekit_symalign.graph.headers import Header, read_headers

MERGE_PLAINLY = "Use MergeKit's own method for this merge, or a checkpoint of the expected layout"


@dataclass(frozen=True)
class Checkpoint:
    """The files of one model, and what its architecture says should be in them.

    Attributes:
        model: whose they are.
        model_type: as transformers calls it, for MergeKit's conversion of tensors that are stored in pieces.
        layout: its architecture.
        headers: of all stored tensors, by name.
    """

    model: ModelReference
    model_type: str
    layout: ModelLayout
    headers: Mapping[str, Header]
    _converted: dict[str, Header | None] = field(default_factory=dict)

    @staticmethod
    def open(model: ModelReference, model_type: str, layout: ModelLayout) -> Checkpoint:
        return Checkpoint(model, model_type, layout, read_headers(reopened(model).index))

    def stored(self, info: WeightInfo) -> Header | None:
        """Header of a planned tensor, under its name, an alias or the tensor it is tied to, or as MergeKit will join
        its pieces; None if absent."""
        names = (info.name, *(info.aliases or ()), *(info.tied_names or ()))
        found = next((self.headers[name] for name in names if name in self.headers), None)
        return found if found is not None else self._joined(info.name)

    def pieces(self, name: str) -> set[str]:
        """The stored tensors that a planned one is made of, where it has other names in checkpoints."""
        return {
            stored for pattern in self.layout.stored_as(name) for stored in self.headers if fnmatchcase(stored, pattern)
        }

    def aliases(self, name: str) -> tuple[str, ...] | None:
        """Other names under which a checkpoint may have this tensor in one piece, for a load."""
        return self.layout.other_names(name) or None

    def _joined(self, name: str) -> Header | None:
        """What MergeKit's own conversion gives for a tensor that is stored in pieces, on tensors without data."""
        if name not in self._converted:
            pieces = {piece: self.headers[piece] for piece in self.pieces(name)}
            plain = {
                piece: torch.empty(header.shape, dtype=header.dtype, device="meta")
                for piece, header in pieces.items()
                if header.dtype is not None
            }
            whole = convert_checkpoint_tensors(self.model_type, plain, name) if len(plain) == len(pieces) > 0 else None
            quantised = next((header for header in pieces.values() if header.dtype is None), None)
            self._converted[name] = quantised if whole is None else Header(whole.dtype, "", tuple(whole.shape))
        return self._converted[name]

    def check(self, planned: Iterable[WeightInfo]) -> None:
        """Check every planned tensor of this model, and that the merge loses none.

        Raises:
            CheckpointError: naming the tensor, the model and the remedy.
        """
        planned = [info for info in planned if not self.layout.is_buffer(info.name)]
        claims = {info.name: self._claim(info.name) for info in planned}
        for info in planned:
            self._check_tensor(info, claims[info.name])
        layers = {claim.layer for claim in claims.values() if claim.layer is not None}
        self._check_complete({info.name for info in planned}, layers)
        self._check_outside({name for info in planned for name in (info.name, *(info.aliases or ()))})

    def _claim(self, name: str) -> Claim:
        claim = self.layout.claim(name)
        if claim is None:
            raise CheckpointError(
                f"tensor {name} of model {self.model}",
                f"MergeKit merges it, but family {self.layout.family.name} does not know it",
                MERGE_PLAINLY,
            )
        return claim

    def _check_tensor(self, info: WeightInfo, claim: Claim) -> None:
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
        expected = self.layout.shape(claim.spec)
        fits = len(expected) == len(header.shape) and all(
            want in (None, got) for want, got in zip(expected, header.shape, strict=True)
        )
        if not fits:
            wanted = " x ".join("any" if n is None else str(n) for n in expected)
            raise CheckpointError(
                where,
                f"its shape is {' x '.join(map(str, header.shape))}; the model's config asks for {wanted}",
                "Check that config.json belongs to these weights",
            )

    def _check_complete(self, planned: set[str], layers: set[int]) -> None:
        """No tensor of a merged layer may be left out: neither by the checkpoint nor by MergeKit."""
        pieces = {piece for name in planned for piece in self.pieces(name)}
        for layer in sorted(layers):
            prefix = self.layout.name(layer, "")
            expected = {self.layout.name(layer, part) for part, spec in self.layout.inside.items() if not spec.optional}
            for name in sorted(expected - planned - set(self.headers)):
                raise CheckpointError(
                    f"tensor {name} of model {self.model}",
                    "the model's config promises it, but the checkpoint does not have it",
                    "Check that config.json belongs to these weights",
                )
            there = {name for name in self.headers if name.startswith(prefix)}
            for name in sorted(there - planned - pieces):
                if not self.layout.is_buffer(name):
                    raise CheckpointError(
                        f"tensor {name} of model {self.model}",
                        "it is part of a layer that is merged, but MergeKit's architecture file does not list it and "
                        "would silently drop it",
                        "The merged model would not compute what these models compute: merge other checkpoints, or "
                        "teach MergeKit this architecture",
                    )

    def _check_outside(self, planned: set[str]) -> None:
        """No embedding, norm or task head may be left out either."""
        for name in sorted(self.layout.outside.keys() & self.headers.keys() - planned):
            raise CheckpointError(
                f"tensor {name} of model {self.model}",
                "MergeKit's architecture file does not list it and would silently drop it",
                "Merge the model without this head (MergeKit's override_architecture, for example BertModel), or teach "
                "MergeKit this architecture",
            )


def merged_dtype(headers: Iterable[Header | None]) -> torch.dtype | None:
    """The dtype that MergeKit promotes these stored tensors to."""
    result: torch.dtype | None = None
    for header in headers:
        if header is not None and header.dtype is not None:
            result = header.dtype if result is None else torch.promote_types(result, header.dtype)
    return result
