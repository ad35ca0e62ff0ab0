"""Whether an alignment file fits a model: all of its blocks, and a symmetry of the model in each of them.

Sizes are compared before any tensor is read or repeated. So a file cannot ask for more memory than the model's blocks
need.
"""

from __future__ import annotations

from collections.abc import Mapping

from mergekit_symalign.alignment_file import AlignmentFile, BlockName, block_name
from mergekit_symalign.alignments.numbers import Steps
from mergekit_symalign.errors import AlignmentFileError, ParameterError, SymmetryError
from mergekit_symalign.families.resolve import ModelLayout
from mergekit_symalign.families.schema import BlockKind
from mergekit_symalign.families.stream import residual_kind, untying_helps
from mergekit_symalign.families.towers import Layer
from mergekit_symalign.sealed.text import shown
from mergekit_symalign.symmetry.admitted import Admitted, admitted
from mergekit_symalign.symmetry.groups import Permutation
from mergekit_symalign.symmetry.membership import STEPS, require_symmetry
from mergekit_symalign.symmetry.options import BlockShape
from mergekit_symalign.symmetry.residual.kinds import Residual
from mergekit_symalign.symmetry.residual.membership import admitted_steps, require_stream_symmetry

STREAM_BLOCK = "residual"  # the name of the residual stream's element in a file
_REMEDY = "Solve it again for the whole model: mergekit-symalign solve"
_UNTIE = "Add untie: true to the merge, which gives the merged model a head of its own"
_OF_STORED_OFFSETS = 2.0**10  # gains stored as γ − 1 lose what their factor takes from them
_OF_HALVES = 2.0**8  # float16 has few exponents: weights must neither overflow nor vanish


def require_fits(file: AlignmentFile, layout: ModelLayout, *, halves: bool = False) -> bool:
    """Check every block of a file, and that it has all blocks of a model.

    Args:
        file: what to check.
        layout: of the model.
        halves: whether weights are stored in float16, which leaves factors less room.

    Returns:
        Whether the aligned model computes what the original computes; false only where the file says so itself
        (``rotation: full``).

    Raises:
        AlignmentFileError: naming the block, the axis and the reason.
    """
    require_known_blocks(file, layout)
    blocks = layout.blocks()
    for layer, kind in blocks:
        require_block(file, layer, kind)
    exact = [require_fitting_block(file, layout, layer, kind, halves=halves) for layer, kind in blocks]
    return all(exact)


def require_known_blocks(file: AlignmentFile, layout: ModelLayout) -> None:
    """
    Raises:
        AlignmentFileError: if the file has a block that the model does not have.
    """
    known = {block_name(layer, kind.value) for layer, kind in layout.blocks()} | {STREAM_BLOCK}
    if unknown := file.blocks.keys() - known:
        where = f"{file.label}, block {shown(min(unknown))}"
        raise AlignmentFileError(where, f"the model has no such block in its {layout.layers} layers", _REMEDY)


def require_block(file: AlignmentFile, layer: Layer, kind: BlockKind) -> BlockName:
    """The name of a block in a file.

    Raises:
        AlignmentFileError: if it is not there.
    """
    name = block_name(layer, kind.value)
    if name not in file.blocks:
        reason = f"it has nothing for {name}: the merge that saved it did not align that block"
        raise AlignmentFileError(file.label, reason, _REMEDY)
    return name


def require_fitting_block(
    file: AlignmentFile, layout: ModelLayout, layer: Layer, kind: BlockKind, *, halves: bool = False
) -> bool:
    """Check one block of a file that has it. Takes, returns and raises what `require_fits` does."""
    name = block_name(layer, kind.value)
    shape = layout.block_shape(layer, kind)
    full = file.settings_of(name).get("rotation") == "full"
    largest = _largest(layout.stack(layer)[0], kind, halves=halves)
    try:
        for axis, steps in file.blocks[name].items():
            _check_sizes(file, axis, steps, admitted(axis, shape, full=full))
        element = file.element(name)
        require_symmetry(element, shape, full=full, largest=largest)
    except SymmetryError as error:
        raise AlignmentFileError(f"{file.label}, {name}, {error.where}", error.reason, _REMEDY) from error
    return not (full and _turns_freely(file.blocks[name], shape))


def require_fitting_stream(file: AlignmentFile, layout: ModelLayout, tied: bool) -> Residual:
    """Check the element of the residual stream of a file that has one.

    Args:
        file: what to check.
        layout: of the models.
        tied: whether the head is the embedding.

    Returns:
        The parameter ``residual`` with which it was solved.

    Raises:
        AlignmentFileError: naming the axis and the reason.
    """
    where, hidden = f"{file.label}, {STREAM_BLOCK}", layout.geometry.hidden
    try:
        wanted = Residual(str(file.settings_of(STREAM_BLOCK).get("residual")))
        kind = residual_kind(layout, tied, wanted)
        for axis, steps in file.blocks[STREAM_BLOCK].items():
            _check_sizes(file, axis, steps, admitted_steps(axis, kind, hidden))
        require_stream_symmetry(file.element(STREAM_BLOCK), kind, hidden)
    except SymmetryError as error:
        raise AlignmentFileError(f"{where}, {error.where}", error.reason, _REMEDY) from error
    except ParameterError as error:
        remedy = _UNTIE if tied and untying_helps(layout) else _REMEDY
        raise AlignmentFileError(where, error.reason, remedy) from error
    except ValueError as error:
        raise AlignmentFileError(
            where, f"it does not say which residual it was solved for ({error})", _REMEDY
        ) from error
    return wanted


def _turns_freely(axes: Mapping[str, Steps], shape: BlockShape) -> bool:
    """Whether queries or keys carry what positions do not admit."""
    return any(kind not in admitted(axis, shape) for axis, steps in axes.items() for kind, _ in steps)


def _check_sizes(file: AlignmentFile, axis: str, steps: Steps, kinds: Admitted) -> None:
    """Kinds and shapes of the steps of an axis, from what is known of the tensors without reading them.

    Raises:
        SymmetryError: naming the axis.
    """
    where = f"axis {shown(axis)}"
    if not kinds or not 0 < len(steps) <= STEPS:
        reason = f"it has {len(steps)} steps, not 1 to {STEPS}" if kinds else "the block has no such axis"
        raise SymmetryError(where, reason, _REMEDY)
    for kind, references in steps:
        if kind not in kinds:
            reason = f"it cannot have a {shown(kind)} (only {' or '.join(kinds)})"
            raise SymmetryError(where, reason, _REMEDY)
        found = tuple(file.stored[name].repeated(repeats) for name, repeats in references)
        if found != kinds[kind]:
            raise SymmetryError(where, f"its {kind} has shapes {found}, not {kinds[kind]}", _REMEDY)
        if any(file.stored[name].is_index != (kind == Permutation.kind) for name, _ in references):
            raise SymmetryError(where, f"its {kind} has numbers of the wrong type", _REMEDY)


def _largest(layout: ModelLayout, kind: BlockKind, *, halves: bool) -> dict[str, float]:
    """What the factors of each axis are limited to, where numbers are stored in a way that leaves them less room."""
    result = dict.fromkeys(kind.axes, _OF_HALVES) if halves else {}
    offset = [spec for spec in layout.block(kind).values() if spec.offset]
    limit = min(_OF_STORED_OFFSETS, _OF_HALVES) if halves else _OF_STORED_OFFSETS
    return result | {axis: limit for spec in offset for axis in layout.axes(spec).all_names()}
