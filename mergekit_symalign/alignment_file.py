"""An alignment as a file: the group elements themselves, and what they belong to.

A safetensors file. Its tensors are the elements' own numbers (permutations as int32; angles, scales and orthogonal
matrices as they were solved, so that a merge from the file is the merge that saved it, bit for bit). Numbers that
repeat, along the query heads of a group or between axes, are stored once. One metadata entry, a JSON text, holds
the rest (alignments/schema.py), with a digest of all that the file says.

A file may come from a stranger. `AlignmentFile.open` believes nothing that is not well formed, and
`alignments.fit.require_fits` nothing that is no symmetry of the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from mergekit_symalign.alignments import numbers
from mergekit_symalign.alignments.numbers import ENTRY, Steps, Stored
from mergekit_symalign.alignments.schema import Content, FirstContent, finite_facts, parsed
from mergekit_symalign.errors import AlignmentFileError, OtherModelsError
from mergekit_symalign.families.towers import Layer, layer_name
from mergekit_symalign.hub.address import called, written_again
from mergekit_symalign.sealed.text import NewerFormatError, shown
from mergekit_symalign.symmetry.element import BlockElement

BlockName = str  # "layer 3 mlp": how a block is called in a file

_REMEDY = "Give a file that mergekit-symalign solve or save_alignment wrote"
_OTHER = "Use an alignment that was solved for this model"


@dataclass(frozen=True)
class Origin:
    """What an alignment belongs to, and how it was found.

    Attributes:
        anchor, model: names, for people.
        anchor_fingerprint, model_fingerprint: of their checkpoints (graph/fingerprint.py).
        family: the family file.
        sizes: geometry that both share, by name.
        settings: parameters of the solve; `DIFFERS` where blocks differ.
        versions: of the packages that solved it.
        settings_by_block: the parameters in which blocks differ, by name of block.
    """

    anchor: str
    model: str
    anchor_fingerprint: str
    model_fingerprint: str
    family: str
    sizes: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    settings_by_block: Mapping[BlockName, Mapping[str, Any]] = field(default_factory=dict)


def block_name(layer: Layer, kind: str) -> BlockName:
    return f"{layer_name(layer)} {kind}"


def save_alignment(
    path: Path,
    origin: Origin,
    elements: Mapping[BlockName, BlockElement],
    facts: Mapping[BlockName, Mapping[str, Any]] | None = None,
) -> None:
    """Write an alignment; the file appears under its name only when it is whole.

    Args:
        path: of the file.
        origin: what the alignment belongs to.
        elements: of each block.
        facts: what is known of each block's solve, for the reports of merges that use the file.
    """
    store = numbers.Store()
    blocks = {
        block: {axis: store.steps(f"{block} {axis}", action) for axis, action in element.actions.items()}
        for block, element in elements.items()
    }
    known = {block: finite_facts(of_block) for block, of_block in (facts or {}).items()}
    numbers.write(path, {"origin": asdict(origin), "blocks": blocks, "facts": known}, store.tensors)


@dataclass(frozen=True)
class AlignmentFile:
    """A file that was opened and found well formed.

    Attributes:
        path: where it is.
        origin: what it belongs to.
        blocks: by name of block and axis, the steps of the element.
        sha256: of all that it says (of its numbers, in format 1).
        facts: what was known of each block when it was solved; empty for files that do not say.
        stored: its tensors.
    """

    path: Path
    origin: Origin
    blocks: Mapping[BlockName, Mapping[str, Steps]]
    sha256: str
    facts: Mapping[BlockName, Mapping[str, Any]] = field(default_factory=dict)
    stored: Mapping[str, Stored] = field(default_factory=dict)

    @staticmethod
    def open(path: Path) -> AlignmentFile:
        """Read the text and check every number against its digest.

        Raises:
            AlignmentFileError: if the file is absent, of another kind, of a newer format, or damaged.
        """
        found = AlignmentFile.described(path)
        with _opened(path) as file:
            if all(stored.sha256 is not None for stored in found.stored.values()):
                for name, stored in found.stored.items():
                    numbers.tensor(file, name, stored)
            elif numbers.first_digest(file) != found.sha256:
                raise ValueError("its numbers are damaged: they differ from what was saved")
        return found

    @staticmethod
    def described(path: Path) -> AlignmentFile:
        """Read the text alone. Raises as `open` does, except for the numbers."""
        with _opened(path) as file:
            text = (file.metadata() or {}).get(ENTRY)
            if text is None:
                raise ValueError("it is a safetensors file, but not an alignment")
            try:
                content = parsed(text)
                stored = _matched(numbers.headers(file), content)
            except NewerFormatError:
                raise
            except (ValueError, RecursionError) as error:
                raise ValueError(f"its metadata are damaged: {error}") from error
        return AlignmentFile(
            path=path,
            origin=Origin(**content.origin.model_dump()),
            blocks=content.blocks,
            sha256=content.sha256,
            facts=content.facts,
            stored=stored,
        )

    def element(self, block: BlockName) -> BlockElement:
        """The element of one block; only its own tensors are read. Their sizes are those that `require_fits` checks.

        Raises:
            AlignmentFileError: if they are not those that were saved.
        """
        with _opened(self.path) as file:
            return BlockElement(
                {axis: numbers.read_action(file, steps, self.stored) for axis, steps in self.blocks[block].items()}
            )

    def settings_of(self, block: BlockName) -> Mapping[str, Any]:
        """The parameters that a block was solved with."""
        return {**self.origin.settings, **self.origin.settings_by_block.get(block, {})}

    @cached_property
    def label(self) -> str:
        return f"alignment {called(self.path)}"

    def require_family(self, family: str, sizes: Mapping[str, Any], model: str) -> None:
        """
        Raises:
            OtherModelsError: if the model is of another family or size.
        """
        if self.origin.family != family:
            reason = f"it is for family {shown(self.origin.family)}, but model {model} is of family {family}"
            raise OtherModelsError(self.label, reason, _OTHER)
        differences = [f"{shown(k)} {v} != {sizes.get(k)}" for k, v in self.origin.sizes.items() if sizes.get(k) != v]
        if differences:
            reason = f"it is for another size than model {model}: {', '.join(differences)}"
            raise OtherModelsError(self.label, reason, _OTHER)

    def require_model(self, name: str, fingerprint: str) -> None:
        """
        Raises:
            OtherModelsError: if it was solved for another checkpoint.
        """
        self._require("model", self.origin.model, self.origin.model_fingerprint, name, fingerprint)

    def require_anchor(self, name: str, fingerprint: str) -> None:
        """
        Raises:
            OtherModelsError: if it was solved towards another checkpoint.
        """
        self._require("anchor", self.origin.anchor, self.origin.anchor_fingerprint, name, fingerprint)

    def _require(self, role: str, known: str, wanted: str, name: str, fingerprint: str) -> None:
        if fingerprint != wanted:
            raise OtherModelsError(
                self.label,
                f"it was solved for {role} {known}, but {name} has other weights (fingerprint {fingerprint[:12]}, not "
                f"{shown(wanted[:12])})",
                f"Solve it again: mergekit-symalign solve ANCHOR MODEL -o {written_again(self.path)}",
            )


def renamed(file: AlignmentFile, path: Path, origin: Origin) -> AlignmentFile:
    """Write an alignment again with another origin; its numbers stay as they are."""
    with _opened(file.path) as opened:
        tensors = {name: numbers.tensor(opened, name, stored) for name, stored in file.stored.items()}
    content = {"origin": asdict(origin), "blocks": file.blocks, "facts": file.facts}
    numbers.write(path, content, tensors)
    return AlignmentFile.open(path)


def _matched(found: Mapping[str, Stored], content: FirstContent) -> dict[str, Stored]:
    """The tensors of a file, with their digests, if they are those that its text describes and uses.

    Raises:
        ValueError: if they are not.
    """
    used = {name for axes in content.blocks.values() for steps in axes.values() for _, of in steps for name, _ in of}
    if other := used ^ found.keys():
        raise ValueError(f"tensor {shown(min(other))} is {'missing' if other & used else 'not used by any block'}")
    if not isinstance(content, Content):
        return dict(found)
    told = {name: Stored(dtype, tuple(shape), sha256) for name, (dtype, shape, sha256) in content.tensors.items()}
    if {name: Stored(x.dtype, x.shape) for name, x in told.items()} != found:
        raise ValueError("they describe other tensors than the file has")
    return told


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The file, with whatever goes wrong while it is read as one error that names it."""
    where = f"alignment {called(path)}"
    try:
        if not path.is_file():
            raise OtherModelsError(where, "it cannot be read (there is no such file)", _REMEDY)
        with safe_open(path, framework="pt") as file:
            yield file
    except NewerFormatError as error:
        raise AlignmentFileError(where, str(error), "Install a newer mergekit-symalign") from error
    except (OSError, SafetensorError) as error:
        raise AlignmentFileError(where, f"it cannot be read ({shown(error, 200)})", _REMEDY) from error
    except ValueError as error:
        raise AlignmentFileError(where, shown(error, 300), _REMEDY) from error
